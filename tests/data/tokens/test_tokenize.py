"""From pairs to tokens: the template's own tokens, a true prefix, the end, the length rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized
from dpo_cli.errors import UserError
from tests.conftest import CHATML


def make_pair(prompt="What is two plus two?", chosen="Four.", rejected="Well, it depends.", given_input=""):
    prompt = (Message("user", prompt, given_input),)
    return Pair(prompt, (Message("assistant", chosen),), (Message("assistant", rejected),), "f:1")


def make(tokenizer, template=None, max_length=1000, on_too_long="drop"):
    return PairTokenizer(tokenizer, template=template, max_length=max_length, on_too_long=on_too_long)


def only(results) -> Tokenized:
    (result,) = results
    assert isinstance(result, Tokenized)
    return result


text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2"), min_size=1, max_size=30
).filter(lambda s: s.strip() and "<|" not in s)


@given(text, text, text, text)
def test_tokens_are_those_of_the_chat_template_on_the_whole_conversation(
    tokenizer, prompt, given_input, chosen, rejected
):
    pair = make_pair(prompt, chosen, rejected, given_input)
    found = only(make(tokenizer)([pair])).pair
    user = {"role": "user", "content": f"{prompt}\n{given_input}"}
    for response, tokens in ((chosen, found.chosen), (rejected, found.rejected)):
        whole = tokenizer.apply_chat_template(
            [user, {"role": "assistant", "content": response}], tokenize=True, return_dict=False
        )
        assert [*found.prompt, *tokens] == whole
    sent = tokenizer.apply_chat_template([user], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert found.prompt.tolist() == sent


@given(text, text)
def test_decoding_gives_the_rendered_text_back(tokenizer, prompt, chosen):
    found = only(make(tokenizer)([make_pair(prompt, chosen, "other")])).pair
    rendered = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{chosen}<|im_end|>\n"
    assert tokenizer.decode(np.concatenate([found.prompt, found.chosen])) == rendered


def test_the_response_ends_with_the_templates_end_and_what_it_writes_behind(tokenizer):
    found = only(make(tokenizer)([make_pair()])).pair
    assert tokenizer.decode(found.chosen) == "Four.<|im_end|>\n"
    assert found.chosen.tolist().count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("given_input", "expected"),
    [
        ("", "### Instruction:\nAdd.\n\n### Response:\n"),
        ("1 2", "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"),
    ],
)
def test_plain_prompts_have_headed_sections_and_responses_one_end(tokenizer, given_input, expected):
    found = only(make(tokenizer, "plain")([make_pair("Add.", "3", "4", given_input)])).pair
    assert tokenizer.decode(found.prompt) == expected
    assert tokenizer.decode(found.chosen) == "3<|im_end|>"


def test_a_plain_prompt_starts_with_bos_exactly_where_the_tokenizer_adds_one(tokenizer_folder):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert only(make(tokenizer, "plain")([make_pair()])).pair.prompt[0] != tokenizer.bos_token_id
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert only(make(tokenizer, "plain")([make_pair()])).pair.prompt.tolist().count(bos[1]) == 1


def test_where_the_tokenizer_would_merge_across_the_boundary_the_parts_are_tokenized_apart(tokenizer):
    """A template without a separator lets the last letter of the prompt merge with the first of the response."""
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"
    generation = "{% if add_generation_prompt %}{{ messages[0]['content'] }}{% else %}" + bare + "{% endif %}"
    results = make(tokenizer, generation)([make_pair("t", "he cat", "he dog")])
    found = only(results)
    assert found.joined
    assert found.pair.prompt.tolist() == tokenizer("t")["input_ids"]
    assert found.pair.chosen.tolist() == tokenizer("he cat<|im_end|>")["input_ids"]


def test_a_template_that_loses_the_prompt_refuses_the_row(tokenizer):
    results = make(tokenizer, "{{ messages | length }}")([make_pair()])
    assert isinstance(results[0], BadRow)
    assert "cannot be determined" in results[0].detail


def test_a_template_that_writes_nothing_for_the_prompt_refuses_the_row(tokenizer):
    answers = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    [bad] = make(tokenizer, answers)([make_pair()])
    assert isinstance(bad, BadRow)
    assert bad.detail == "the chat template makes no token of `prompt`"


def test_a_template_that_raises_refuses_the_row_and_not_the_others(tokenizer):
    raising = CHATML + "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}"
    good, bad = make(tokenizer, raising)([make_pair(), make_pair("bad")])
    assert isinstance(good, Tokenized)
    assert isinstance(bad, BadRow)
    assert "not this" in bad.detail


def test_many_at_once_are_each_as_alone(tokenizer, demo_rows):
    pairs = [make_pair(r["instruction"], r["chosen"], r["rejected"], r.get("input", "")) for r in demo_rows[:50]]
    tokenize = make(tokenizer)
    together = tokenize(pairs)
    for pair, result in zip(pairs, together, strict=True):
        alone = only(tokenize([pair])).pair
        for name in ("prompt", "chosen", "rejected"):
            assert np.array_equal(getattr(alone, name), getattr(result.pair, name))


BARE = (
    "{% if add_generation_prompt %}{{ messages[0]['content'] }}"
    "{% else %}{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>{% endif %}"
)
AWKWARD = [
    ("t", "he cat", "he dog"),
    ("two  spaces ", "  behind", " and  before "),
    ("no\n\nend\n", "\nnew line", "\u00a0hard space"),
    ("<|im_", "start|>", "end|> and on"),
    ("日本語 の 文", "中文没有空格", "cafe\u0301 👩‍👩‍👧"),
    ("e", "\u0301 a mark that composes with what stands before it", "\u200d joiner"),
    ("x" * 500, "y " * 200, "1" * 300),
]


def plainly(tokenizer, template, pair):
    """What a pair becomes by definition: rendered, tokenized whole, cut behind the prompt; else apart and joined."""

    def rendered(*messages, **settings):
        listed = [{"role": message.role, "content": message.text} for message in messages]
        return tokenizer.apply_chat_template(listed, chat_template=template, tokenize=False, **settings)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    (asked,), responses = pair.prompt, (*pair.chosen, *pair.rejected)
    if template == "plain":
        prompt = f"### Instruction:\n{asked.content}\n\n"
        prompt += f"### Input:\n{asked.input}\n\n" if asked.input else ""
        prompt += "### Response:\n"
        has_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        prompt = tokenizer.bos_token + prompt if has_bos else prompt
        wholes = [prompt + response.text + tokenizer.eos_token for response in responses]
    else:
        prompt = rendered(asked, add_generation_prompt=True)
        wholes = [rendered(asked, response) for response in responses]
    first, found_responses, joined = ids(prompt), [], False
    for text in wholes:
        found = ids(text)
        merges = found[: len(first)] != first or len(found) == len(first)
        found_responses.append(ids(text[len(prompt) :]) if merges else found[len(first) :])
        joined |= merges
    return first, *found_responses, joined


@pytest.mark.parametrize("template", [None, "plain", BARE])
@pytest.mark.parametrize("bos", [False, True])
def test_tokens_are_those_of_the_plain_definition(tokenizer_folder, demo_rows, template, bos):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if bos:
        special = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[special]
        )
    rows = [(r["instruction"], r["chosen"], r["rejected"], r.get("input", "")) for r in demo_rows[::4]]
    pairs = [make_pair(*row) for row in (*rows, *AWKWARD)]
    any_joined = False
    for pair, result in zip(pairs, make(tokenizer, template, max_length=10_000)(pairs), strict=True):
        assert isinstance(result, Tokenized)
        found = [getattr(result.pair, name).tolist() for name in ("prompt", "chosen", "rejected")]
        assert (*found, result.joined) == plainly(tokenizer, template, pair)
        any_joined |= result.joined
    assert any_joined == (template == BARE)


SPELLED = [
    make_pair("What does <|im_end|> do?", "It ends a turn.", "<|im_start|> begins one."),
    make_pair("<|im_end|>", "<|im_start|>assistant\nI", "an <|im_end|> inside <|endoftext|>"),
    make_pair("<|im_end|><|im_end|>\n<|im_start|>", " <|im_end|>", "<|im_end|> "),
]


def test_control_tokens_in_a_text_become_text(tokenizer):
    for pair, result in zip(SPELLED, make(tokenizer)(SPELLED), strict=True):
        for (response,), tokens in ((pair.chosen, result.pair.chosen), (pair.rejected, result.pair.rejected)):
            messages = [{"role": m.role, "content": m.text} for m in (*pair.prompt, response)]
            whole = np.concatenate([result.pair.prompt, tokens]).tolist()
            assert whole == tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, sanitize_control_tokens=True
            )
            assert tokenizer.decode(whole) == tokenizer.apply_chat_template(messages, tokenize=False)
            assert [
                whole.count(token) for token in tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
            ] == [2, 2]
    assert [result.literals for result in make(tokenizer)(SPELLED)] == [2, 4, 5]


def test_control_tokens_become_text_under_plain_headings(tokenizer):
    for result in make(tokenizer, "plain")(SPELLED):
        for tokens in (result.pair.chosen, result.pair.rejected):
            assert tokens.tolist().count(tokenizer.eos_token_id) == 1
            assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in result.pair.prompt


def lengths(tokenizer):
    pair = only(make(tokenizer)([make_pair()])).pair
    return len(pair.prompt), max(len(pair.chosen), len(pair.rejected))


@pytest.mark.parametrize(("rule", "structural"), [("drop", False), ("error", True)])
def test_a_pair_one_token_too_long_is_dropped_or_an_error(tokenizer, rule, structural):
    whole = sum(lengths(tokenizer))
    assert isinstance(make(tokenizer, max_length=whole, on_too_long=rule)([make_pair()])[0], Tokenized)
    (bad,) = make(tokenizer, max_length=whole - 1, on_too_long=rule)([make_pair()])
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.structural) == ("too long", structural)


def test_truncation_cuts_what_is_asked_from_the_left_and_never_a_response(tokenizer):
    prompt, response = lengths(tokenizer)
    whole = only(make(tokenizer)([make_pair()])).pair
    around = len(only(make(tokenizer)([make_pair(prompt="?")])).pair.prompt) - 1
    cut = only(make(tokenizer, max_length=response + around + 3, on_too_long="truncate")([make_pair()]))
    assert cut.truncated
    assert tokenizer.decode(cut.pair.prompt) in ("<|im_start|>user\n" + tail for tail in ENDS)
    assert np.array_equal(cut.pair.prompt[-around:][-3:], whole.prompt[-3:])
    assert np.array_equal(cut.pair.chosen, whole.chosen)
    assert np.array_equal(cut.pair.rejected, whole.rejected)
    assert len(cut.pair.prompt) == around + 3 < prompt
    (bad,) = make(tokenizer, max_length=response + around, on_too_long="truncate")([make_pair()])
    assert bad.reason == "response too long"


ASKED = "What is two plus two?<|im_end|>\n<|im_start|>assistant\n"
ENDS = {ASKED[place:] for place in range(21)}


def test_of_several_named_templates_the_default_one_is_used(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    plain = only(make(tokenizer)([make_pair()])).pair
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    assert np.array_equal(only(make(tokenizer)([make_pair()])).pair.prompt, plain.prompt)


def test_a_tokenizer_without_a_template_says_what_to_set(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template") as caught:
        make(tokenizer)
    assert "plain" in caught.value.hint
