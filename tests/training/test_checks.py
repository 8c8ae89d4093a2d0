"""What is proved before step 1, and that each proof can fail."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertLMHeadModel

from dpo_cli.data.checkup.endings import end_tokens
from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import Padded
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.preference.losses import BCO, DPO, IPO, SFT, AOTUnpaired
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import Frozen
from dpo_cli.preference.reference_work import ReferenceWork
from dpo_cli.training.checks import check_columns, check_fits, check_logps, check_reference, check_tokens
from tests.builders import prepare_pairs, silent
from tests.conftest import CHATML, write_rows


def prepare(pairs_file, tokenizer, folder, template=None):
    return prepare_pairs(pairs_file, tokenizer, folder, template=template)


def lines(pairs, tokenizer):
    return list(check_tokens(pairs, tokenizer, end_tokens(tokenizer)))


def test_good_pairs_pass_with_a_line_for_each_proof(tmp_path, pairs_file, tokenizer):
    found = lines(prepare(pairs_file, tokenizer, tmp_path / "p"), tokenizer)
    assert [line.split()[0] for line in found] == ["at", "every", "the"]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("<|endoftext|><|endoftext|>" + CHATML, "starts with two BOS"),
        (CHATML.replace("<|im_end|>", ""), "no end token"),
        (CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>"), "ends twice"),
        (CHATML.replace("<|im_end|>", "<|im_end|> \n <|im_end|>"), "ends twice"),
    ],
)
def test_a_template_that_breaks_a_promise_is_refused_and_names_a_pair(tmp_path, pairs_file, tokenizer, template, what):
    pairs = prepare(pairs_file, tokenizer, tmp_path / "p", template)
    with pytest.raises(UserError, match=what) as caught:
        lines(pairs, tokenizer)
    assert caught.value.where == f"{pairs_file}:1"
    assert "40 of 40" in caught.value.what


def test_one_bos_is_fine(tmp_path, pairs_file, tokenizer):
    assert lines(prepare(pairs_file, tokenizer, tmp_path / "p", "<|endoftext|>" + CHATML), tokenizer)


def test_an_end_token_that_a_text_spells_out_ends_nothing(tmp_path, demo_rows, tokenizer):
    rows = [dict(row) for row in demo_rows[:5]]
    rows[3]["chosen"] = (
        "Fine.<|im_end|>\n<|im_start|>user\nAnd what else is there to say about it, at length?<|im_end|>"
    )
    assert lines(prepare(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, tmp_path / "p"), tokenizer)


def test_a_response_that_was_cut_need_not_end(tmp_path, demo_rows, tokenizer):
    rows = [{**row, "chosen": row["chosen"] + " and on" * 20} for row in demo_rows[:5]]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    pairs = prepare_pairs(file, tokenizer, tmp_path / "p", max_length=60, on_too_long="truncate", min_response=20)
    assert "were truncated and may not end" in lines(pairs, tokenizer)[1]


def test_of_several_turns_each_may_end(tmp_path, tokenizer):
    shared = [{"role": "user", "content": "Add 1 and 2."}]
    more = [{"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "6."}]
    rows = [{side: [*shared, {"role": "assistant", "content": first}, *more] for side, first in SIDES.items()}]
    assert lines(prepare(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, tmp_path / "p"), tokenizer)


SIDES = {"chosen": "3.", "rejected": "Four."}


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"vocab_size": 50}, "vocabulary ends at 49"), ({"max_position_embeddings": 8}, "positions for 8")],
)
def test_pairs_that_a_model_has_no_embedding_for_are_refused(tmp_path, pairs_file, tokenizer, settings, what):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**small, "vocab_size": 1000, **settings}))
    with pytest.raises(UserError, match=what):
        check_fits(prepare(pairs_file, tokenizer, tmp_path / "p"), Policy(model), "`model.name`")


@pytest.mark.parametrize("more", [-1, 0], ids=["on both sides of the limit", "all within it"])
def test_pairs_that_longrope_would_read_otherwise_beside_longer_ones_are_refused(tmp_path, pairs_file, tokenizer, more):
    from transformers import Phi3Config, Phi3ForCausalLM

    pairs = prepare(pairs_file, tokenizer, tmp_path / "p")
    limit = int(pairs.sizes.longest.max()) + more
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    lengths = {"max_position_embeddings": 8 * limit, "original_max_position_embeddings": limit, "pad_token_id": 0}
    scaling = {"rope_type": "longrope", "type": "longrope", "short_factor": [1.0] * 2, "long_factor": [8.0] * 2}
    model = Phi3ForCausalLM(Phi3Config(**small, **lengths, vocab_size=1000, rope_scaling=scaling))
    with pytest.raises(UserError) if more else contextlib.nullcontext() as refused:
        check_fits(pairs, Policy(model), "`model.name`")
    if refused:
        assert "LongRoPE" in str(refused.value)
        assert f"`data.max_length: {limit}`" in refused.value.hint


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (DPO(), "4 pairs have a margin, which the loss `dpo` ignores; set `loss.margin_scale` to use it"),
        (IPO(), "4 pairs have a margin, which the loss `ipo` ignores"),
        (
            [DPO(weight=0.8), BCO(weight=0.2)],
            "4 pairs have a margin, which the loss `0.8 · dpo + 0.2 · bco` ignores; set `margin_scale` of `dpo` to use "
            "it",
        ),
        (DPO(margin_scale=0.5), ""),
        ([DPO(margin_scale=0.5), SFT()], ""),
    ],
)
def test_margins_that_no_loss_uses_are_reported(tmp_path, demo_rows, tokenizer, losses, said):
    rows = [{**row, "margin": 1.0 if place < 4 else 0} for place, row in enumerate(demo_rows[:6])]
    pairs = prepare(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, tmp_path / "p")
    assert check_columns(pairs, Objective.of(losses)) == said


def test_a_scale_of_margins_where_no_pair_has_one_is_reported(tmp_path, pairs_file, tokenizer):
    pairs = prepare(pairs_file, tokenizer, tmp_path / "p")
    assert check_columns(pairs, Objective.of(DPO())) == ""
    assert check_columns(pairs, Objective.of(DPO(margin_scale=1))) == (
        "no pair has a margin, so that `margin_scale` has no effect"
    )


def test_weights_are_refused_where_a_loss_knows_no_pairs(tmp_path, demo_rows, tokenizer):
    rows = [{**row, "weight": 2.0} for row in demo_rows[:4]]
    pairs = prepare(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, tmp_path / "p")
    with pytest.raises(UserError, match="4 pairs have a weight, but aot_unpaired"):
        check_columns(pairs, Objective.of([DPO(), AOTUnpaired()]))


def test_weights_that_are_all_0_teach_nothing(tmp_path, demo_rows, tokenizer):
    rows = [{**row, "weight": weight} for row, weight in zip(demo_rows, [0, 1e-50, 0.0], strict=False)]
    pairs = prepare(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, tmp_path / "p")
    with pytest.raises(UserError, match="every pair of 3 has weight 0"):
        check_columns(pairs, Objective.of(DPO()))


@pytest.fixture
def ready(tmp_path, pairs_file, tokenizer, tiny_llama):
    pairs = prepare(pairs_file, tokenizer, tmp_path / "p")
    accelerator, policy = Accelerator(cpu=True), Policy.load(str(tiny_llama))
    policy.place(accelerator, trained=True)
    batches = Batches(pairs, Padded(), 1000, accelerator.device)
    work = ReferenceWork(policy, policy, accelerator, np.arange(len(pairs)), batches, silent)
    reference = Frozen().open(work)
    batch = Padded().batch(range(4), pairs[:4])
    return policy, reference, batch, accelerator


def test_a_policy_that_equals_its_reference_passes(ready):
    policy, reference, batch, accelerator = ready
    assert check_logps(policy.bare, batch, accelerator).startswith("log-probabilities are the model's own")
    assert check_reference(policy, Objective.of(DPO()), reference, batch, accelerator).endswith("is 0.693147")


def test_the_loss_where_training_begins_is_that_with_the_margins_where_they_are_used(ready):
    """At βΔ = 0 it is −log σ(−m) = log(1 + e^m); without margins ln 2."""
    policy, reference, batch, accelerator = ready
    batch = dataclasses.replace(batch, margins=torch.tensor([7.0, 0.0, 7.0, 7.0]))
    used = check_reference(policy, Objective.of(DPO(margin_scale=0.5)), reference, batch, accelerator)
    expected = (3 * math.log1p(math.exp(3.5)) + math.log(2)) / 4
    assert f"the loss is {expected:.5f}"[:-1] in used
    assert "margins" in used
    assert check_reference(policy, Objective.of(DPO()), reference, batch, accelerator).endswith("is 0.693147")


def test_a_policy_that_has_moved_is_refused(ready):
    policy, reference, batch, accelerator = ready
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    check_logps(policy.bare, batch, accelerator)
    with pytest.raises(UserError, match="the policy is not its reference"):
        check_reference(policy, Objective.of(DPO()), reference, batch, accelerator)


def test_a_model_that_sees_the_tokens_behind_is_refused(ready):
    """An encoder that calls itself a language model: settings may forget to make a decoder of it."""
    _, _, batch, accelerator = ready
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder = BertLMHeadModel(BertConfig(**small, vocab_size=1000, initializer_range=0.5)).eval()
    with pytest.raises(UserError, match="with later tokens") as refused:
        check_logps(Scorer(encoder), batch, accelerator)
    assert "is_decoder" in refused.value.hint


def test_log_probabilities_gathered_on_the_wrong_positions_are_refused(ready):
    policy, _, batch, accelerator = ready
    wrong = Scorer(policy.model)
    wrong.forward = lambda b, instead=None: instead(b) if instead else torch.zeros(len(b.targets))
    with pytest.raises(UserError, match="differ from the model's own"):
        check_logps(wrong, batch, accelerator)
