"""Answers to held-out prompts: greedy, as transformers' own `generate` gives them, whatever else is in the batch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import KINDS, build, example_pairs
from transformers import GenerationConfig

from dpo_cli.evaluation.samples import Limits, Sampling, answered, sampled_pairs, stop_tokens
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.generation import Answer, greedy_answers, room
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from tests.builders import prepare_pairs, silent, stirred
from tests.conftest import write_rows
from tests.marks import slow_unless

PROMPTS = [pair.prompt.tolist() for pair in example_pairs()]
END, MOST = 2, 12

QUICK = (
    "llama", "qwen2", "qwen3_moe", "mistral with a window", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2", "bloom",
    "mamba",
)  # fmt: skip


def generated(model, prompt, ends=(END,), most=MOST):
    """What transformers' own `generate` answers to a prompt alone, up to its first end token."""
    tokens = torch.tensor([prompt])
    # A list of all that decides it, over whatever the model has.
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": most, "eos_token_id": list(ends)}
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **settings)
    answer = found[0, len(prompt) :].tolist()
    end = next((place for place, token in enumerate(answer) if token in ends), None)
    return Answer(tuple(answer[:end]), ended=end is not None)


@pytest.mark.parametrize("kind", slow_unless(lambda kind: kind in QUICK, KINDS))
def test_answers_are_those_of_generate_alone_and_in_a_batch_padded_on_the_left(kind):
    # A head that is the embeddings would have most of these models repeat their last token.
    model = build(kind, tie_word_embeddings=False)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    policy = Policy(model)
    assert [greedy_answers(policy, [prompt], {END}, MOST)[0] for prompt in PROMPTS] == expected
    assert greedy_answers(policy, PROMPTS, {END}, MOST) == expected
    assert any(len(set(answer.tokens)) > 1 for answer in expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_was_prepared_to_be_trained_answers_the_same(kind):
    """With attention over trees, and layers that are computed again, which would take no cache."""
    model = build(kind)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    policy = Policy(model)
    policy.read(LAYOUTS["packed"])
    policy.place(Accelerator(cpu=True), trained=True, recomputed=True)
    attention, marked = model.config._attn_implementation, [module.training for module in model.modules()]
    assert any(marked)
    assert greedy_answers(policy, PROMPTS, {END}, MOST) == expected
    assert model.config._attn_implementation == attention
    assert [module.training for module in model.modules()] == marked


def test_settings_of_sampling_that_a_model_has_change_nothing_and_warn_of_nothing(caplog):
    model = build("llama")
    expected = [generated(model, prompt) for prompt in PROMPTS]
    model.generation_config = own = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.5, top_k=3, repetition_penalty=5.0, no_repeat_ngram_size=2,
        max_length=3, min_new_tokens=9, num_beams=1, bad_words_ids=[[5]], eos_token_id=3,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy_answers(Policy(model), PROMPTS, {END}, MOST) == expected
    assert not caplog.records
    assert model.generation_config is own


def test_an_answer_takes_no_gradient_draws_no_random_number_and_leaves_weights_as_they_are():
    model = build("llama")
    weights, state = {name: one.clone() for name, one in model.named_parameters()}, torch.get_rng_state()
    greedy_answers(Policy(model), PROMPTS, {END}, MOST)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one.grad is None and torch.equal(one, weights[name]) for name, one in model.named_parameters())


def test_each_end_token_ends_an_answer_and_none_of_them_is_in_it():
    model = build("llama")
    free = generated(model, PROMPTS[0], ends=())
    ends = {free.tokens[5], free.tokens[3], 96}
    first = next(place for place, token in enumerate(free.tokens) if token in ends)
    answers = greedy_answers(Policy(model), PROMPTS, ends, MOST)
    assert answers == [generated(model, prompt, ends) for prompt in PROMPTS]
    assert answers[0] == Answer(free.tokens[:first], ended=True)
    assert answers[0].num_tokens == first + 1


def test_an_answer_that_ends_at_once_is_empty():
    model = build("llama")
    end = generated(model, PROMPTS[0], ends=()).tokens[0]
    answer = greedy_answers(Policy(model), PROMPTS, {end}, MOST)[0]
    assert (answer, answer.num_tokens) == (Answer((), ended=True), 1)


def test_without_any_end_token_the_limit_ends_answers():
    model = build("llama")
    assert greedy_answers(Policy(model), PROMPTS, (), 5) == [generated(model, prompt, (), 5) for prompt in PROMPTS]


def answers_of(model, prompts, most, batch_tokens=10_000):
    policy, accelerator = Policy(model), Accelerator(cpu=True)
    policy.place(accelerator, trained=False)
    return answered(policy, prompts, {END}, Limits(most, batch_tokens), accelerator, silent)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mpt"])
def test_the_models_context_ends_an_answer_and_no_other_in_the_batch(kind):
    """GPT-2 has no embedding for what is behind its last position."""
    prompts = [PROMPTS[0], (PROMPTS[0] * 20)[:125], (PROMPTS[1] * 20)[:128]]
    model = build(kind)
    answers = answers_of(model, prompts, MOST)
    assert [room(Policy(model), prompt, MOST) for prompt in prompts] == [MOST, 3, 0]
    assert answers == [
        *(generated(model, p, most=m) for p, m in zip(prompts, (MOST, 3), strict=False)),
        Answer((), False),
    ]


@pytest.mark.parametrize("batch_tokens", [1, 50, 100])
def test_however_few_prompts_are_in_a_batch_answers_are_the_same(batch_tokens):
    model = build("llama")
    assert answers_of(model, PROMPTS, MOST, batch_tokens) == [generated(model, prompt) for prompt in PROMPTS]


def test_with_an_adapter_the_base_answers_until_it_has_moved(tiny_llama):
    """A new adapter changes nothing; a trained one answers as PEFT's model of it does."""
    policy = Policy.load(str(tiny_llama), trained=Adapted(Lora(rank=4, dropout=0.5), 1, str(tiny_llama)))
    base = load_policy(str(tiny_llama))
    expected = [generated(base, prompt) for prompt in PROMPTS]
    assert greedy_answers(policy, PROMPTS, {END}, MOST) == expected
    stirred(policy)
    policy.merge()
    merged = [generated(policy.model, prompt) for prompt in PROMPTS]
    assert merged != expected
    other = Policy.load(str(tiny_llama), trained=Adapted(Lora(rank=4, dropout=0.5), 1, str(tiny_llama)))
    assert greedy_answers(stirred(other), PROMPTS, {END}, MOST) == merged


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer, demo_rows):
    """Thirty pairs of which every third prompt comes twice."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [row for number, row in enumerate(demo_rows[:20]) for row in [row] * (1 + (number % 2))]
    twice = [{**row, "chosen": row["chosen"] + "!" * number} for number, row in enumerate(rows)]
    return prepare_pairs(write_rows(folder / "pairs.jsonl", twice), tokenizer, folder / "prepared")


def prompts_of(pairs, indices):
    return [tuple(pairs[index].prompt.tolist()) for index in indices]


def test_prompts_are_different_spread_over_the_data_and_stay_where_there_are_more(prepared):
    everything = np.arange(len(prepared))
    before: set[int] = set()
    for number in range(1, 25):
        chosen = sampled_pairs(prepared, everything, number)
        assert chosen == sorted(chosen)
        assert len(set(prompts_of(prepared, chosen))) == len(chosen) == min(number, 20)
        assert before <= set(chosen)
        before = set(chosen)
        if 4 <= number <= 20:
            gaps = np.diff([0, *chosen, len(prepared)])
            assert gaps.max() <= 3.5 * len(prepared) / number
    assert sampled_pairs(prepared, everything, 0) == sampled_pairs(prepared, everything[:0], 4) == []


def test_rows_have_what_was_asked_answered_and_chosen(prepared, tokenizer, tiny_llama):
    policy, accelerator = Policy.load(str(tiny_llama)), Accelerator(cpu=True)
    policy.place(accelerator, trained=False)
    settings = policy.model.generation_config
    sampling = Sampling.of(prepared, [3, 8], tokenizer, settings, Limits(7, 1000))
    rows = sampling.rows(5, policy, accelerator, silent)
    assert [row["where"] for row in rows] == [prepared[3].origin, prepared[8].origin]
    for row, index in zip(rows, (3, 8), strict=True):
        pair = prepared[index]
        answer = generated(policy.model, pair.prompt.tolist(), {tokenizer.eos_token_id}, 7)
        # What the template writes before and behind a response is seen; what ends it is not part of its text.
        assert row["prompt"].endswith("<|im_start|>assistant\n")
        assert row["chosen"] + "<|im_end|>\n" == tokenizer.decode(pair.chosen.tolist())
        assert row == {
            "step": 5, "where": pair.origin, "prompt": tokenizer.decode(pair.prompt.tolist()),
            "answer": tokenizer.decode(list(answer.tokens)), "tokens": answer.num_tokens, "ended": answer.ended,
            "chosen": row["chosen"], "chosen_tokens": len(pair.chosen),
        }  # fmt: skip


@pytest.mark.parametrize(("own", "known"), [(None, set()), (5, {5}), ([5, 6], {5, 6})])
def test_answers_end_where_tokenizer_model_or_template_end_them(prepared, tokenizer, own, known):
    """The template may end a turn with another token than both name."""
    begins, ends = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    settings, response = GenerationConfig(eos_token_id=own), prepared[0].chosen.tolist()
    assert response[-2] == ends
    assert stop_tokens(tokenizer, settings) == {ends} | known
    assert stop_tokens(tokenizer, settings, [[*response[:-2], begins, response[-1]]]) == {begins, ends} | known
    # One that was cut has none.
    assert stop_tokens(tokenizer, settings, [response[:-3]]) == {ends} | known
