"""What a row says is in the tokens, or the check says that it is not."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.checkup.examine import examine
from dpo_cli.data.records import BadRow, Message, Pair
from tests.builders import prepare_pairs
from tests.conftest import write_rows
from tests.data.chat_templates import CALL, TEMPLATES
from tests.data.more_templates import LATE, TOOL_TEMPLATES, WANT_TEXT
from tests.data.tiny_tokenizers import marked, own_tokens, tokenized, tokenizer_of, tokenizing

every_template = pytest.mark.parametrize("name", TEMPLATES)

ALL = {**{name: (name, None) for name in TEMPLATES}, **{name: ("Qwen 3", t) for name, t in TOOL_TEMPLATES.items()}}
ALL |= {"late": ("Mistral", LATE), "plain": ("ChatML", "plain")}
"""The tokenizer and the text of every template of the tests."""

TOOL = {"type": "function", "function": {"name": "add", "description": "Add numbers.", "parameters": {}}}

ASKED = (Message("user", "Add 2 and 2."),)
NO = (Message("assistant", "I cannot."),)


def answered(*chosen: Message, prompt: tuple[Message, ...] = ASKED, **arguments: Any) -> Pair:
    return Pair(prompt, chosen, NO, "f:1", arguments=arguments)


def said(text: str, **extras: Any) -> Message:
    return Message("assistant", text, extras=extras)


FOUR = said("It is four.")

CASES = {
    "tool_calls_unwritten": (answered(said("Let me see.", tool_calls=[CALL])), {"ChatML", "Gemma", "Harmony"}),
    "tools_unwritten": (answered(FOUR, tools=[TOOL]), {"ChatML", "Llama 3", "DeepSeek-R1"}),
    "reasoning_unwritten": (answered(said("Four.", reasoning_content="Two twos.")), {"ChatML", "DeepSeek-R1"}),
    "names_unwritten": (answered(FOUR, prompt=(Message("user", "Hi", extras={"name": "Ann"}),)), {"ChatML", "Qwen 3"}),
    "function_call_unwritten": (answered(said("Four.", function_call=CALL["function"])), {"ChatML", "Qwen 3"}),
    "template_arguments_unwritten": (answered(FOUR, enable_thinking=False), {"ChatML", "Mistral"}),
    "turns_unwritten": (answered(said("Let me see.", tool_calls=[CALL])), {"Llama 3", "Mistral"}),
}
"""For each finding a pair, and templates that do not write that part of it."""

WRITTEN = {
    "tool_calls_unwritten": {"Llama 3", "Mistral", "Qwen 3", "DeepSeek-R1", "Command R"},
    "tools_unwritten": {"Mistral", "Qwen 3"},
    "reasoning_unwritten": {"Qwen 3"},
    "template_arguments_unwritten": {"Qwen 3"},
    "turns_unwritten": {"Qwen 3", "ChatML", "DeepSeek-R1", "Command R"},
}
"""Templates that do."""


@pytest.mark.parametrize(
    ("finding", "name", "missing"),
    [
        *((finding, name, True) for finding, (_, names) in CASES.items() for name in sorted(names)),
        *((finding, name, False) for finding, names in WRITTEN.items() for name in sorted(names)),
    ],
)
def test_what_a_template_leaves_out_is_found(finding, name, missing):
    found = tokenized(name, CASES[finding][0])
    assert (finding in found.unwritten) == missing


@every_template
def test_of_a_pair_of_plain_texts_nothing_is_missing(name):
    assert tokenized(name, TEMPLATES[name].example()).unwritten == frozenset()


@pytest.mark.parametrize("flag", [True, False])
def test_an_argument_with_the_value_that_the_template_assumes_is_not_missing(flag):
    assert tokenized("Qwen 3", answered(FOUR, enable_thinking=flag)).unwritten == frozenset()


def test_of_several_arguments_and_calls_each_is_looked_for():
    both = tokenized("Qwen 3", answered(FOUR, enable_thinking=False, reasoning_effort="high"))
    assert both.unwritten == {"template_arguments_unwritten"}
    one_call, two_calls = (answered(said("", tool_calls=[CALL] * number)) for number in (1, 2))
    assert tokenized("Llama 3", one_call).unwritten == frozenset()
    assert tokenized("Llama 3", two_calls).unwritten == {"tool_calls_unwritten"}


def test_thoughts_that_only_earlier_turns_lose_are_found():
    """Qwen 3 keeps those of the turns behind the user's last."""
    thought = said("Four.", reasoning_content="Two twos.")
    assert tokenized("Qwen 3", answered(thought)).unwritten == frozenset()
    earlier = (*ASKED, thought, Message("user", "Sure?"))
    assert tokenized("Qwen 3", answered(FOUR, prompt=earlier)).unwritten == {"reasoning_unwritten"}


@pytest.mark.parametrize(
    ("left_out", "finding"),
    [("system", "system_unwritten"), ("tool", "tool_results_unwritten"), ("user", "turns_unwritten")],
)
def test_a_turn_that_is_left_out_is_found(left_out, finding):
    text = TEMPLATES["ChatML"].text.replace(
        "for message in messages", f"for message in messages if message.role != '{left_out}'"
    )
    turns = Message("tool", "4", extras={"tool_call_id": "c1"}), FOUR
    prompt = (Message("system", "Be brief."), *ASKED)
    pair = answered(said("Let me see."), *turns, prompt=prompt)
    assert tokenized("ChatML", pair, template=text).unwritten == {finding}


CALLING = said("", tool_calls=[CALL])
RESULT = Message("tool", "4")


@pytest.mark.parametrize("name", ["ChatML", "Phi-3", "Zephyr", "Harmony", "no generation prompt"])
@pytest.mark.parametrize(
    "chosen",
    [
        (CALLING, RESULT, FOUR),
        (CALLING,),
        (FOUR, RESULT, CALLING),
        (said("", function_call=CALL["function"]), RESULT, FOUR),
    ],
)
def test_a_judged_turn_that_becomes_empty_is_refused(name, chosen):
    (found,) = tokenizing(name)([answered(*chosen)])
    assert isinstance(found, BadRow)
    assert (found.reason, found.structural) == ("empty turn", True)
    assert "`chosen`" in found.detail
    assert "what it calls" in found.detail


def test_a_turn_whose_text_the_template_strikes_out_becomes_empty_too():
    (found,) = tokenizing("DeepSeek-R1")([answered(said("<think>\nTwo twos.\n</think>\n\n"))])
    assert isinstance(found, BadRow)
    assert found.reason == "empty turn"


def test_an_empty_turn_that_is_not_judged_is_no_error():
    pair = answered(CALLING, RESULT, FOUR)
    found = tokenized("ChatML", pair, turns="last")
    assert found.unwritten == {"tool_calls_unwritten"}
    in_prompt = answered(FOUR, prompt=(*ASKED, CALLING, RESULT))
    assert tokenized("ChatML", in_prompt).unwritten == {"tool_calls_unwritten"}


@pytest.mark.parametrize("name", ["Llama 3", "Mistral", "Qwen 3", "DeepSeek-R1", "Command R"])
def test_a_turn_of_nothing_but_a_call_is_kept_where_the_call_is_written(name):
    assert tokenized(name, answered(CALLING, RESULT, FOUR)).unwritten == frozenset()


@pytest.mark.parametrize("turns", [1, 2])
def test_a_system_that_speaks_only_before_an_answer_is_missing_and_the_answer_keeps_its_space(turns):
    """Without the system's turn the boundary is where inference puts it; with it, at the same place."""
    earlier = (*ASKED, FOUR, Message("user", "Sure?"))[2 * (2 - turns) :] if turns == 1 else (*ASKED, FOUR, *ASKED)
    system = Message("system", "Be brief.")
    without, late = (
        tokenized("Mistral", answered(FOUR, prompt=prompt), template=LATE) for prompt in (earlier, (system, *earlier))
    )
    assert without.unwritten == frozenset()
    assert late.unwritten == {"system_unwritten"}
    assert late.prompt_differs
    for part in ("prompt", "chosen", "rejected"):
        assert getattr(late.pair, part).tolist() == getattr(without.pair, part).tolist()
    shown = marked("Mistral", late.pair.prompt, late.pair.chosen, late.pair.chosen_gaps)
    assert shown.endswith("[/INST]⟦ It is four.</s>⟧")


@pytest.mark.parametrize("space", ["\n", " ", "\n\n", "\t", "  "])
@pytest.mark.parametrize("opens", ["<think>\n", "\n<think>\n", " <think>", "\n\n<think>"])
def test_an_answer_that_begins_like_the_end_of_the_generation_prompt_keeps_its_beginning(space, opens):
    text = TEMPLATES["DeepSeek-R1"].text.replace("<think>\\n", opens.replace("\n", "\\n"))
    pair = answered(said(f"{space}Four."))
    found = tokenized("DeepSeek-R1", pair, template=text).pair
    shown = marked("DeepSeek-R1", found.prompt, found.chosen, found.chosen_gaps)
    assert shown.endswith(f"<｜Assistant｜>⟦{space}Four.<｜end▁of▁sentence｜>⟧")
    assert [*found.prompt, *found.chosen] == own_tokens("DeepSeek-R1", pair.prompt + pair.chosen, chat_template=text)


NAMES_ALONE = TOOL_TEMPLATES["Qwen 2.5"].replace("call.arguments | tojson", "''")
DESCRIBED = {**TOOL["function"], "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
SWITCHED = TEMPLATES["ChatML"].text + "{%- if mode == 'on' or level == 2 -%}{{- 'on' -}}{%- endif -%}"


def found_in_turn(pairs: list[Pair], name: str, template: str) -> list[frozenset[str]]:
    """Return what is found missing in each of several pairs that go through one preparation."""
    found = tokenizing(name, template=template)(pairs)
    return [frozenset({one.reason}) if isinstance(one, BadRow) else one.unwritten for one in found]


def test_a_row_with_less_to_write_does_not_speak_for_those_like_it():
    """A call without arguments for calls with some, one value of an argument for others."""
    without = {**CALL, "function": {"name": "add", "arguments": {}}}
    calls = [answered(said("See.", tool_calls=[call])) for call in (without, CALL)]
    assert found_in_turn(calls, "Qwen 3", NAMES_ALONE) == [frozenset(), {"tool_calls_unwritten"}]
    for arguments in ({"mode": "on"}, {"level": 2}):
        (name,) = arguments
        both = [answered(FOUR, **arguments), answered(FOUR, **{name: "off"})]
        wanted = [frozenset(), frozenset({"template_arguments_unwritten"})]
        assert found_in_turn(both, "ChatML", SWITCHED) == wanted
        assert found_in_turn(both[::-1], "ChatML", SWITCHED) == wanted[::-1]


@pytest.mark.parametrize("written", ["name", "description", "parameters", None])
@pytest.mark.parametrize("nested", [True, False])
def test_of_a_tool_each_part_is_looked_for(written, nested):
    tool = {"type": "function", "function": DESCRIBED} if nested else DESCRIBED
    shown = ("tool.function" if nested else "tool") + (f".{written}" if written else "")
    text = f"{{%- for tool in tools -%}}{{{{- {shown} | tojson -}}}}{{%- endfor -%}}" + TEMPLATES["ChatML"].text
    found = tokenized("ChatML", answered(FOUR, tools=[tool]), template=text)
    assert found.unwritten == (frozenset({"tools_unwritten"}) if written else frozenset())


def test_the_turn_that_is_judged_must_not_become_empty_though_a_later_one_is_not_scored():
    last = Message("assistant", "It is four.", scored=False)
    (found,) = tokenizing("ChatML", turns="last")([answered(CALLING, RESULT, last)])
    assert isinstance(found, BadRow)
    assert found.reason == "empty turn"


PART = {
    "content": {"system": "system_unwritten", "tool": "tool_results_unwritten"},
    "reasoning_content": "reasoning_unwritten",
    "name": "names_unwritten",
    "tool_calls": "tool_calls_unwritten",
    "function_call": "function_call_unwritten",
}
"""The finding for each part of a message; of other turns' texts it is `turns_unwritten`."""


@st.composite
def rows(draw: st.DrawFn, as_text: bool) -> tuple[Pair, dict[str, str]]:
    """Draw a pair with any of the optional parts; return it, and what each word that it says is a part of.

    Args:
        draw: Draws.
        as_text: Whether the arguments of calls are text.
    """
    words: dict[str, str] = {}
    numbers = itertools.count(10)

    def word(finding: str) -> str:
        words[found := f"w{next(numbers)}w"] = finding
        return found

    def call(finding: str) -> dict[str, Any]:
        given = {word(finding): word(finding)}
        return {"name": word(finding), "arguments": json.dumps(given) if as_text else given}

    def turn(role: Any) -> Message:
        extras: dict[str, Any] = {}
        if role != "system" and draw(st.booleans()):
            extras["name"] = word("names_unwritten")
        text = word(PART["content"].get(role, "turns_unwritten"))  # type: ignore[attr-defined]
        if role == "assistant":
            if draw(st.booleans()):
                extras["reasoning_content"] = word("reasoning_unwritten")
            if calls := draw(st.integers(0, 2)):
                extras["tool_calls"] = [
                    {"id": "call00001", "type": "function", "function": call("tool_calls_unwritten")}
                    for _ in range(calls)
                ]
                text = draw(st.sampled_from([text, ""]))
            elif draw(st.integers(0, 4)) == 0:
                extras["function_call"] = call("function_call_unwritten")
        return Message(role, text, extras=extras)

    opening = draw(
        st.sampled_from(((), ("system",), ("user", "assistant"), ("system", "user", "assistant", "tool", "assistant")))
    )
    others = st.sampled_from(((), ("assistant", "user"), ("assistant", "tool"), ("assistant", "tool", "tool")))
    prompt, chosen, rejected = (
        tuple(map(turn, roles))
        for roles in ((*opening, "user"), (*draw(others), "assistant"), (*draw(others), "assistant"))
    )
    beside: dict[str, Any] = {}
    if draw(st.booleans()):
        described = {"name": word("tools_unwritten"), "description": "Adds.", "parameters": {}}
        beside["tools"] = [{"type": "function", "function": described}]
    if draw(st.booleans()):
        beside["enable_thinking"] = draw(st.booleans())
    return Pair(prompt, chosen, rejected, "f:1", arguments=beside), words


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_each_part_of_a_row_is_in_its_tokens_or_found_missing(kind, data):
    """And the tokens are the tokenizer's own of the whole, or a finding says why not."""
    name, template = ALL[kind]
    pair, words = data.draw(rows(as_text=kind in WANT_TEXT))
    if kind == "plain":
        pair = Pair(pair.prompt, pair.chosen, pair.rejected, "f:1")
    (found,) = tokenizing(name, template=template)([pair])
    if isinstance(found, BadRow):
        assert found.reason in ("template error", "empty turn")
        return
    for response, tokens in ((pair.chosen, found.pair.chosen), (pair.rejected, found.pair.rejected)):
        whole = [*found.pair.prompt.tolist(), *tokens.tolist()]
        text, data_said = tokenizer_of(name).decode(whole), repr([pair.prompt, response, pair.arguments.get("tools")])
        for word, finding in words.items():
            assert word not in data_said or word in text or finding in found.unwritten, word
        if kind != "plain" and not found.joined:
            beside = {"chat_template": template} if template else {}
            assert whole == own_tokens(name, pair.prompt + response, **beside, **pair.arguments)


def test_what_is_missing_is_counted_and_shown_and_what_becomes_empty_or_alike_is_dropped_with_its_reason(
    tmp_path, tokenizer
):
    """From rows to the report of the check."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}

    def row(question: str, answer: str, **beside: Any) -> dict[str, Any]:
        turns = {
            "prompt": [{"role": "user", "content": question}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        return {**turns, "chosen": [{"role": "assistant", "content": answer, **beside}]}

    rows = [
        row("One?", "Yes, one."),
        row("Two?", "Let me see.", tool_calls=[call]),
        row("Three?", "Three.", reasoning="It comes behind two.", tool_calls=[call]),
        row("Four?", "", tool_calls=[call]),
        row("Five?", "No.", tool_calls=[call]),
    ]
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    pairs = prepare_pairs(source, tokenizer, tmp_path / "prepared", on_bad_row="drop")
    statistics = pairs.manifest["statistics"]
    assert statistics["dropped"] == {"empty turn": 1, "identical responses": 1}
    assert statistics["examples"]["empty turn"] == [
        f"{source}:4: `chosen` becomes empty: the chat template does not write what it calls"
    ]
    assert statistics["examples"]["identical responses"] == [
        f"{source}:5: both responses become the same tokens: the template does not write tool calls"
    ]
    report = examine(pairs, np.arange(3), np.empty(0, np.int64), max_length=1000, tokenizer=tokenizer)
    found = {finding.name: finding for finding in report.findings}
    for name, lines in (("tool_calls_unwritten", [2, 3]), ("reasoning_unwritten", [3])):
        assert (found[name].severity, found[name].count) == ("warning", len(lines))
        assert [example.origin for example in found[name].examples] == [f"{source}:{line}" for line in lines]
        assert statistics[name] == len(lines)
    assert "system_unwritten" in report.not_found
    with pytest.raises(ExceptionGroup) as stopped:
        prepare_pairs(source, tokenizer, tmp_path / "stopped")
    assert "becomes empty" in str(stopped.value.exceptions[0])
