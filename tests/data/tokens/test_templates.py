"""Under every template: the tokenizer's own tokens, the prompt that inference sends, and which turns are judged."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.tokenize import Tokenized
from tests.data.awkward_texts import NO_CHARACTERS, texts
from tests.data.chat_templates import CALL, TEMPLATES, TEXTS
from tests.data.tiny_tokenizers import (
    judged,
    marked,
    own_tokens,
    rendered,
    tokenized,
    tokenizer_of,
    tokenizing,
    tokens_of,
    tokens_within,
)

every_template = pytest.mark.parametrize("name", TEMPLATES)
few_examples = settings(max_examples=12, deadline=None)

ADD = {"type": "function", "function": {"name": "add", "description": "Add numbers.", "parameters": {}}}


def said(name: str) -> st.SearchStrategy[str]:
    """Draw texts that spell no control token."""
    return texts(without=TEMPLATES[name].tokens)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> Pair:
    """Draw a pair of conversations of one or more turns, beginning with a system message where there may be one."""
    template = TEMPLATES[name]

    def turns(first: str, second: str) -> tuple[Message, ...]:
        spoken = draw(st.lists(said(name), min_size=1, max_size=3))
        spoken = spoken if len(spoken) % 2 else spoken[:-1]
        roles = [first if place % 2 == 0 else second for place in range(len(spoken))]
        thoughts = [role == "assistant" and draw(st.booleans()) for role in roles]
        return tuple(
            Message(role, template.thought(text, "hm") if thinks else text)
            for role, text, thinks in zip(roles, spoken, thoughts, strict=True)
        )

    pair = Pair(turns("user", "assistant"), turns("assistant", "user"), turns("assistant", "user"), "f:1")
    may_open = template.system == "turn" or (template.system == "moves" and len(pair.chosen + pair.rejected) == 2)
    if may_open and draw(st.booleans()):
        return Pair((Message("system", draw(said(name))), *pair.prompt), pair.chosen, pair.rejected, "f:1")
    return pair


@every_template
@few_examples
@given(data=st.data())
def test_the_tokens_are_the_tokenizers_own_on_the_whole_conversation_and_on_the_prompt(name, data):
    """Where the tokenizer merges across the boundary, prompt and rest are each its own, and that is told."""
    opens = TEMPLATES[name].opens
    pair = data.draw(conversations(name))
    found = tokenized(name, pair)
    sent = rendered(name, pair.prompt, add_generation_prompt=True).removesuffix(opens)
    prompt, merges = tokens_of(name, sent), False
    assert found.pair.prompt.tolist() == prompt
    if not opens:
        assert prompt == own_tokens(name, pair.prompt, add_generation_prompt=True)
    for response, tokens in ((pair.chosen, found.pair.chosen), (pair.rejected, found.pair.rejected)):
        whole, text = own_tokens(name, pair.prompt + response), rendered(name, pair.prompt + response)
        if whole[: len(prompt)] == prompt:
            assert [*prompt, *tokens] == whole
        else:
            assert tokens.tolist() == tokens_within(name, text.removeprefix(sent))
            merges = True
    assert (found.joined, found.prompt_differs) == (merges, bool(opens))
    assert (found.literals, found.responses_cut, found.truncated) == (0, 0, False)


@pytest.mark.parametrize("name", ["ChatML", "Phi-3", "Zephyr"])
def test_where_the_tokenizer_merges_across_the_boundary_the_prompt_stays_what_inference_sends(name):
    """The header's newline and the response's would be one token; apart, no space comes between them either."""
    pair = Pair((Message("user", "Hi"),), (Message("assistant", "\nfour"),), (Message("assistant", "four"),), "f:1")
    found = tokenized(name, pair)
    whole = own_tokens(name, pair.prompt + pair.chosen)
    assert found.joined
    assert found.pair.prompt.tolist() == own_tokens(name, pair.prompt, add_generation_prompt=True)
    assert found.pair.prompt.tolist() != whole[: len(found.pair.prompt)]
    for response, tokens in ((pair.chosen, found.pair.chosen), (pair.rejected, found.pair.rejected)):
        shown = tokenizer_of(name).decode([*found.pair.prompt, *tokens])
        assert shown == tokenizer_of(name).decode(own_tokens(name, pair.prompt + response))


@pytest.mark.parametrize("name", ["ChatML", "Phi-3", "Zephyr"])
def test_turns_are_judged_alike_where_prompt_and_response_are_tokenized_apart(name):
    template = TEMPLATES[name]
    others = [*TEXTS[:4], "\nLet me see.", *TEXTS[5:]]
    found = tokenized(name, template.example(texts=others))
    assert found.joined
    shown = marked(name, found.pair.prompt, found.pair.chosen, found.pair.chosen_gaps)
    assert shown == template.written(others)


@pytest.mark.parametrize(
    ("name", "between"),
    [
        (name, between)
        for name in TEMPLATES
        for between in ("user", "tool")
        if between == "user" or TEMPLATES[name].with_tool
    ],
)
def test_what_is_judged_is_what_is_written_by_hand(name, between):
    template = TEMPLATES[name]
    found = tokenized(name, template.example(between)).pair
    expected = template.with_user if between == "user" else template.with_tool
    assert marked(name, found.prompt, found.chosen, found.chosen_gaps) == expected
    assert found.rejected_gaps is None


@every_template
@few_examples
@given(data=st.data())
def test_what_is_judged_does_not_depend_on_what_is_said(name, data):
    """Messages may be alike, hold one another or look like a header: each is where its turn is."""
    template = TEMPLATES[name]
    any_text = said(name).map(str.strip) | st.sampled_from(TEXTS)
    others = data.draw(st.lists(any_text, min_size=len(TEXTS), max_size=len(TEXTS)))
    found = tokenized(name, template.example(texts=others)).pair
    assert marked(name, found.prompt, found.chosen, found.chosen_gaps) == template.written(others)


@every_template
def test_of_several_turns_the_last_alone_is_judged_where_that_is_asked_for(name):
    template = TEMPLATES[name]
    every, last = (tokenized(name, template.example(), turns=turns).pair for turns in ("all", "last"))
    head, _, tail = template.with_user.rpartition("⟦")
    unmarked = head.replace("⟦", "").replace("⟧", "")
    assert marked(name, last.prompt, last.chosen, last.chosen_gaps) == f"{unmarked}⟦{tail}"
    for part in ("prompt", "chosen", "rejected"):
        assert getattr(last, part).tolist() == getattr(every, part).tolist()
    assert last.rejected_gaps is None


@every_template
def test_a_sequence_begins_once_and_every_judged_turn_ends_once(name):
    template = TEMPLATES[name]
    bos, *ends = (tokens_of(name, token)[0] for token in (template.bos or template.eos, *template.ends))
    found = tokenized(name, template.example()).pair
    if template.bos:
        expected = template.with_user.count(template.bos)
        assert [*found.prompt, *found.chosen].count(bos) == expected
        assert expected == 1 or name == "Llama 2"
        assert found.prompt[0] == bos
    for response, gaps, num_turns in ((found.chosen, found.chosen_gaps, 2), (found.rejected, found.rejected_gaps, 1)):
        assert sum(token in ends for token in judged(response.tolist(), gaps)) == num_turns


@every_template
def test_gaps_are_ascending_and_lie_within_the_response(name):
    pair = TEMPLATES[name].example()
    found = tokenized(name, Pair(pair.prompt, pair.chosen, pair.chosen[:2] + pair.chosen, "f:1")).pair
    for response, gaps, num_gaps in ((found.chosen, found.chosen_gaps, 1), (found.rejected, found.rejected_gaps, 2)):
        edges = [0, *gaps, len(response)]
        assert len(gaps) == 2 * num_gaps
        assert edges == sorted(set(edges))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("<table> yes", "<tr> no"),
        ("<thinking> yes", "<think> no"),
        ("<", "<t"),
        ("\nyes", "\nno"),
        ("<think>\nunfinished", "No."),
        ("Yes.", "<think>\nunfinished"),
    ],
)
def test_where_the_generation_prompt_opens_a_thought_the_boundary_is_the_last_token_in_common(chosen, rejected):
    """Not the last character: a response that begins with a piece of `<think>` is judged from its beginning."""
    pair = Pair((Message("user", "Hi"),), (Message("assistant", chosen),), (Message("assistant", rejected),), "f:1")
    found = tokenized("DeepSeek-R1", pair)
    prompt = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
    assert found.pair.prompt.tolist() == tokens_of("DeepSeek-R1", prompt)
    for response, tokens, gaps in (
        (pair.chosen, found.pair.chosen, found.pair.chosen_gaps),
        (pair.rejected, found.pair.rejected, found.pair.rejected_gaps),
    ):
        assert [*found.pair.prompt, *tokens] == own_tokens("DeepSeek-R1", pair.prompt + response)
        shown = f"{prompt}⟦{response[0].text}<｜end▁of▁sentence｜>⟧"
        assert marked("DeepSeek-R1", found.pair.prompt, tokens, gaps) == shown
    assert found.prompt_differs


@pytest.mark.parametrize("name", ["ChatML", "Phi-3"])
@pytest.mark.parametrize("mark", NO_CHARACTERS[:4])
def test_a_code_point_that_is_no_character_is_kept_or_refused_and_never_lost(name, mark):
    template = TEMPLATES[name]
    for place, text in itertools.product(range(len(TEXTS)), (mark, f"Is it {mark} so?")):
        others = [*TEXTS[:place], text, *TEXTS[place + 1 :]]
        (result,) = tokenizing(name)([template.example(texts=others)])
        if isinstance(result, Tokenized):
            found = result.pair
            assert marked(name, found.prompt, found.chosen, found.chosen_gaps) == template.written(others)
        else:
            assert result.reason == "undecodable text"


def test_a_template_that_rewrites_what_stands_before_the_generation_prompt_refuses_the_row():
    """The system message moves into a user's turn of the response: what inference sends is not where it was."""
    system, question = Message("system", "Be brief."), Message("user", "Add 2 and 2.")
    answers = (Message("assistant", "Let me see."), Message("user", "Go on."), Message("assistant", "It is four."))
    no = (Message("assistant", "No."),)
    pairs = [Pair((system, question), answers, no, "f:1"), Pair((system, question), answers[:1], no, "f:2")]
    refused, kept = tokenizing("Mistral")(pairs)
    assert isinstance(refused, BadRow)
    assert refused.reason == "template error"
    assert isinstance(kept, Tokenized)


@pytest.mark.parametrize(("name", "says"), [("Gemma", "have no place here"), ("OpenChat", "takes no system message")])
def test_a_template_that_raises_refuses_that_row_with_its_message_and_no_other(name, says):
    pair = TEMPLATES[name].example()
    system = Message("system", "Be brief.")
    first, refused, last = tokenizing(name)([pair, Pair((system, *pair.prompt), *pair_of(pair), "f:2"), pair])
    assert isinstance(refused, BadRow)
    assert refused.reason == "template error"
    assert says in refused.detail
    assert isinstance(first, Tokenized)
    assert isinstance(last, Tokenized)


def pair_of(pair: Pair) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    return pair.chosen, pair.rejected


@pytest.mark.parametrize(
    "reach",
    ["''.__class__.__mro__[1].__subclasses__()", "messages.append(messages[0])", "raise_exception.__globals__['os']"],
)
def test_a_template_that_reaches_out_of_its_sandbox_refuses_the_row(reach):
    text = TEMPLATES["ChatML"].text + "{% set reached = " + reach + " %}{{ reached }}"
    (refused,) = tokenizing("ChatML", template=text)([TEMPLATES["ChatML"].example()])
    assert isinstance(refused, BadRow)
    assert refused.reason == "template error"


@pytest.mark.parametrize("name", ["ChatML", "Zephyr", "Command R"])
def test_a_template_that_opens_another_answer_behind_each_is_refused(name):
    """Under it every answer would end with the beginning of the next."""
    text = TEMPLATES[name].text.replace("if add_generation_prompt", "if true")
    for found in tokenizing(name, template=text)([simple(), simple()]):
        assert isinstance(found, BadRow)
        assert "behind an answered conversation too" in found.detail


@pytest.mark.parametrize("name", ["ChatML", "Zephyr", "Command R"])
@pytest.mark.parametrize("asks", ["false", "messages[-1].role != 'assistant'"])
def test_a_template_that_does_not_heed_when_to_ask_for_an_answer_is_taken_as_it_is(name, asks):
    text = TEMPLATES[name].text.replace("if add_generation_prompt", f"if {asks}")
    pair = simple()
    found = tokenized(name, pair, template=text).pair
    assert [*found.prompt, *found.chosen] == own_tokens(name, pair.prompt + pair.chosen, chat_template=text)


@pytest.mark.parametrize("name", ["add_generation_prompt", "chat_template", "tokenize", "messages"])
def test_a_row_cannot_set_what_decides_how_it_is_written(name):
    refused, kept = tokenizing("ChatML")([simple({name: True}), simple()])
    assert isinstance(refused, BadRow)
    assert refused.reason == "template error"
    assert isinstance(kept, Tokenized)


def simple(arguments=None, **message) -> Pair:
    """Return a question with two short answers."""
    yes, no = Message("assistant", "Yes.", **message), Message("assistant", "No.")
    return Pair((Message("user", "Is it?"),), (yes,), (no,), "f:1", arguments=arguments or {})


def test_a_rows_own_arguments_reach_the_template_and_no_other_row():
    """Beside one another in a call: thoughts left open, closed beforehand, and tools."""
    asked = [{}, {"enable_thinking": False}, {"tools": [ADD]}, {"enable_thinking": True}, {}]
    pairs = [simple(arguments) for arguments in asked]
    turn, closed, end = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n", "<|im_end|>\n"
    for pair, arguments, result in zip(pairs, asked, tokenizing("Qwen 3")(pairs), strict=True):
        assert isinstance(result, Tokenized)
        shown = marked("Qwen 3", result.pair.prompt, result.pair.chosen, result.pair.chosen_gaps)
        thinks = arguments.get("enable_thinking", True)
        assert shown.endswith(f"{turn}⟦{closed}Yes.{end}⟧" if thinks else f"{turn}{closed}⟦Yes.{end}⟧")
        assert ('"description": "Add numbers."' in shown) == ("tools" in arguments)
        assert [*result.pair.prompt, *result.pair.chosen] == own_tokens(
            "Qwen 3", pair.prompt + pair.chosen, **arguments
        )
        assert result.pair.prompt.tolist() == own_tokens("Qwen 3", pair.prompt, add_generation_prompt=True, **arguments)
        assert not result.context_differs


@pytest.mark.parametrize("name", ["Qwen 3", "Mistral"])
def test_tools_reach_the_template_in_conversations_that_use_them(name):
    pair = TEMPLATES[name].example("tool")
    pair = Pair(pair.prompt, *pair_of(pair), "f:1", arguments={"tools": [ADD]})
    found = tokenized(name, pair).pair
    shown = marked(name, found.prompt, found.chosen, found.chosen_gaps)
    assert '"description": "Add numbers."' in shown.partition("⟦")[0]
    assert shown.partition("⟦")[2] == TEMPLATES[name].with_tool.partition("⟦")[2]
    assert [*found.prompt, *found.chosen] == own_tokens(name, pair.prompt + pair.chosen, tools=[ADD])


def test_thoughts_closed_beforehand_are_not_where_the_template_strikes_them_out():
    """Asked not to think, inference sends an empty thought; an earlier turn of the whole conversation has none."""
    pair = TEMPLATES["Qwen 3"].example()
    found = tokenized(
        "Qwen 3", Pair(pair.prompt, pair.chosen, pair.chosen, "f:1", arguments={"enable_thinking": False})
    )
    assert found.context_differs
    shown = marked("Qwen 3", found.pair.prompt, found.pair.chosen, found.pair.chosen_gaps)
    assert "<|im_start|>assistant\n⟦Let me see.<|im_end|>\n⟧" in shown


def test_a_context_that_differs_at_a_later_turn_alone_is_told():
    """Behind a tool's result no thought is opened; behind what the user says then, one is."""
    asked = (Message("user", "Add 2 and 2."), Message("assistant", "", extras={"tool_calls": [CALL]}))
    once, no = (Message("assistant", "It is four."),), (Message("assistant", "No."),)
    twice = (*once, Message("user", "Sure?"), Message("assistant", "Yes."))
    same, other = tokenizing("DeepSeek-R1")(
        [Pair((*asked, Message("tool", "4")), chosen, no, "f:1") for chosen in (once, twice)]
    )
    assert isinstance(same, Tokenized)
    assert isinstance(other, Tokenized)
    assert (same.context_differs, other.context_differs) == (False, True)
    shown = marked("DeepSeek-R1", other.pair.prompt, other.pair.chosen, other.pair.chosen_gaps)
    assert shown.endswith(
        "<｜tool▁output▁end｜>⟦It is four.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Sure?<｜Assistant｜>⟦Yes.<｜end▁of▁sentence｜>⟧"
    )


def test_thoughts_and_calls_kept_apart_from_the_text_reach_the_template():
    both = {"reasoning_content": "Sure.", "tool_calls": [CALL, CALL]}
    found = tokenized("Qwen 3", simple(extras=both)).pair
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
    assert marked("Qwen 3", found.prompt, found.chosen, found.chosen_gaps) == (
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
        f"⟦<think>\nSure.\n</think>\n\nYes.\n{call}\n{call}<|im_end|>\n⟧"
    )


def test_several_tool_results_are_one_gap():
    question, call = Message("user", "Add 2 and 2."), Message("assistant", "", extras={"tool_calls": [CALL, CALL]})
    results = tuple(Message("tool", text) for text in ("4", "four"))
    pair = Pair((question,), (call, *results, Message("assistant", "It is four.")), (Message("assistant", "No."),), "f")
    found = tokenized("Qwen 3", pair).pair
    shown = marked("Qwen 3", found.prompt, found.chosen, found.chosen_gaps)
    assert shown.endswith(
        "</tool_call><|im_end|>\n⟧<|im_start|>user\n<tool_response>\n4\n</tool_response>\n"
        "<tool_response>\nfour\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nIt is four.<|im_end|>\n⟧"
    )


@every_template
def test_many_at_once_are_each_as_alone(name):
    template = TEMPLATES[name]
    others = tuple(reversed(TEXTS))
    pairs = [template.example(), template.example(texts=others), *[template.example("tool")] * bool(template.with_tool)]
    for pair, together in zip(pairs, tokenizing(name)(pairs), strict=True):
        alone = tokenized(name, pair)
        assert isinstance(together, Tokenized)
        for part in ("prompt", "chosen", "rejected", "chosen_gaps"):
            assert getattr(together.pair, part).tolist() == getattr(alone.pair, part).tolist()
