"""Arguments of tool calls: text and object become the same tokens, those of what the template writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import BadRow, Message, Pair, Row
from dpo_cli.data.tokens.tokenize import Tokenized
from tests.data.awkward_texts import NO_CHARACTERS
from tests.data.chat_templates import TEMPLATES
from tests.data.more_templates import TOOL_TEMPLATES, WANT_TEXT
from tests.data.tiny_tokenizers import as_dicts, tokenized, tokenizer_of, tokenizing

every_kind = pytest.mark.parametrize("kind", TOOL_TEMPLATES)

TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": {}}}
CITY = {"city": "Bonn", "days": [1, 2.5, None, True], "how": {"units": "°C"}}

characters = st.characters(exclude_categories=["Cs"], exclude_characters=NO_CHARACTERS + "<")
arguments = st.dictionaries(
    st.text(characters, max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(characters, max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(characters, max_size=4), inner, max_size=3),
        max_leaves=5,
    ),
    min_size=1,
    max_size=3,
)


def calling(given: Any, content: str = "", tools: tuple[Any, ...] = (TOOL,)) -> Pair:
    """Return a pair whose better answer calls a tool, is told what came of it, and answers."""
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": given}}
    chosen = (
        Message("assistant", content, extras={"tool_calls": [call]}),
        Message("tool", "Rain.", extras={"tool_call_id": "call00001"}),
        Message("assistant", "It rains."),
    )
    beside = {"tools": list(tools)} if tools else {}
    return Pair((Message("user", "Weather?"),), chosen, (Message("assistant", "No."),), "f:1", arguments=beside)


def tokens(pair: Pair, template: str) -> list[int]:
    found = tokenized("Qwen 3", pair, template=template).pair
    return [*found.prompt.tolist(), *found.chosen.tolist()]


def own(pair: Pair, template: str) -> str:
    """Return what the tokenizer itself writes of the pair as it is."""
    messages = as_dicts(pair.prompt + pair.chosen)
    written = tokenizer_of("Qwen 3").apply_chat_template(
        messages, chat_template=template, tokenize=False, **pair.arguments
    )
    return str(written)


def written(pair: Pair, template: str) -> str:
    """Return what the program's tokens spell."""
    return str(tokenizer_of("Qwen 3").decode(tokens(pair, template)))


@every_kind
@settings(max_examples=15, deadline=None)
@given(value=arguments)
def test_text_and_object_are_the_tokens_of_what_the_template_writes(kind, value):
    template = TOOL_TEMPLATES[kind]
    text = json.dumps(value, ensure_ascii=False)
    as_object, as_text = calling(value), calling(text)
    expected = own(as_text if kind in WANT_TEXT else as_object, template)
    assert tokens(as_object, template) == tokens(as_text, template)
    assert written(as_object, template) == expected


@every_kind
@pytest.mark.parametrize("spacing", [(",", ":"), (" , ", "\n: ")])
def test_the_spacing_of_json_text_is_kept_where_the_template_wants_text_alone(kind, spacing):
    template, text = TOOL_TEMPLATES[kind], json.dumps(CITY, separators=spacing, ensure_ascii=False)
    expected = own(calling(text if kind in WANT_TEXT else CITY), template)
    assert written(calling(text), template) == expected


@every_kind
@pytest.mark.parametrize("nothing", ["", " ", None, {}, "{}"])
def test_a_call_without_arguments_is_written_with_none(kind, nothing):
    template = TOOL_TEMPLATES[kind]
    assert written(calling(nothing), template) == own(calling("{}" if kind in WANT_TEXT else {}), template)


@pytest.mark.parametrize("kind", [kind for kind in TOOL_TEMPLATES if kind != "GLM 4.5"])
@pytest.mark.parametrize("text", ["Bonn", '{"city": "Bonn"', "{'city': 'Bonn'}", '{"a": 1, "a": 2}', '["Bonn"]', "5"])
def test_what_is_no_json_object_stays_text_and_is_found(kind, text):
    template = TOOL_TEMPLATES[kind]
    pair = calling(text)
    assert written(pair, template) == own(pair, template)
    assert "tool_arguments_not_json" in tokenized("Qwen 3", pair, template=template).unwritten
    for fine in (calling(CITY), calling(json.dumps(CITY)), calling("")):
        assert tokenized("Qwen 3", fine, template=template).unwritten == frozenset()


@every_kind
def test_a_control_token_in_json_text_stays_text(kind):
    """Also where an escape of JSON hides it."""
    template = TOOL_TEMPLATES[kind]
    end = tokenizer_of("Qwen 3").convert_tokens_to_ids("<|im_end|>")
    count = tokens(calling(CITY), template).count(end)
    for text in ('{"city": "<|im_end|>"}', '{"city": "\\u003c|im_end|>"}'):
        assert tokens(calling(text), template).count(end) == count


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.with_tool])
def test_every_template_with_tools_writes_the_text_of_arguments_as_the_object(name):
    both = [calling(form, "Let me see.", ()) for form in (CITY, json.dumps(CITY))]
    as_object, as_text = (tokenized(name, pair).pair for pair in both)
    for part in ("prompt", "chosen", "rejected"):
        assert getattr(as_object, part).tolist() == getattr(as_text, part).tolist()


def test_arguments_of_a_whole_row_are_text_or_object_alike():
    """In OpenAI's and in ShareGPT's spelling, in the prompt and in the answers."""

    def row(form: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": form}}
        said = json.dumps({"name": "weather", "arguments": form})
        return {
            "prompt": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [call, call]},
                {"role": "tool", "content": "Rain."},
            ],
            "chosen": [{"from": "function_call", "value": said}, {"role": "tool", "content": "Sun."}, ANSWER],
            "rejected": [ANSWER],
        }

    pairs = [
        pair
        for form in (CITY, json.dumps(CITY))
        for pair in read_pairs(FORMATS["messages"], Row("f:1", row(form)))
    ]  # fmt: skip
    one, other = tokenizing("Qwen 3")(pairs)
    assert isinstance(one, Tokenized)
    assert isinstance(other, Tokenized)
    assert [*one.pair.prompt, *one.pair.chosen] == [*other.pair.prompt, *other.pair.chosen]


ANSWER = {"role": "assistant", "content": "It rains."}


SPELLINGS = {
    "OpenAI's": lambda given: {
        "id": "call00001",
        "type": "function",
        "function": {"name": "weather", "arguments": given},
    },
    "OpenAI's without a type": lambda given: {"function": {"name": "weather", "arguments": given}},
    "flat": lambda given: {"name": "weather", "arguments": given},
    "flat with an id": lambda given: {"id": "call00001", "type": "tool_call", "name": "weather", "args": given},
    "parameters": lambda given: {"name": "weather", "parameters": given},
    "parameters within": lambda given: {"type": "function", "function": {"name": "weather", "parameters": given}},
    "input": lambda given: {"type": "tool_use", "id": "call00001", "name": "weather", "input": given},
    "a function by its name": lambda given: {"function": "weather", "arguments": given},
    "nulls beside": lambda given: {"name": "weather", "arguments": None, "parameters": given, "function": None},
}
"""The same call as data has it, by who writes it so."""


def of_row(call: Any) -> Pair:
    asked = [{"role": "user", "content": "Weather?"}]
    chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "Rain."}, ANSWER]
    row = {"prompt": asked, "chosen": chosen, "rejected": [ANSWER], "tools": [TOOL]}
    (pair,) = read_pairs(FORMATS["messages"], Row("f:1", row))
    return pair


FLAT_ALONE = TOOL_TEMPLATES["gpt-oss"].replace("call.function.", "call.")


@pytest.mark.parametrize("template", [*TOOL_TEMPLATES.values(), FLAT_ALONE])
@pytest.mark.parametrize("form", [CITY, json.dumps(CITY)])
def test_a_call_becomes_the_same_tokens_however_it_is_spelled(template, form):
    first, *others = (tokens(of_row(spell(form)), template) for spell in SPELLINGS.values())
    assert all(other == first for other in others)
    assert "Bonn" in tokenizer_of("Qwen 3").decode(first)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"type": "function", "function": {"arguments": CITY}}, "by `name`"),
        ({"name": " ", "arguments": CITY}, "by `name`"),
        ({"tool": "weather", "arguments": CITY}, "by `name`"),
        ({"name": "weather", "arguments": CITY, "parameters": {}}, "`arguments` and as `parameters`"),
    ],
)
def test_a_call_that_names_nothing_or_gives_its_arguments_twice_is_refused(call, said):
    with pytest.raises(BadRow, match=said) as found:
        of_row(call)
    assert "`chosen[0].tool_calls[0]`" in found.value.detail


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1}, {"a": 1.0}), ({"a": 1}, {"a": True}), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"a": 0}, {"a": False})],
)
def test_calls_that_are_written_otherwise_are_no_identical_answers_nor_shared_turns(one, other):
    def answers(given: Any) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "weather", "arguments": given}}
        return [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "Rain."},
            ANSWER,
        ]

    asked = [{"role": "user", "content": "Weather?"}]
    row = {"prompt": asked, "chosen": answers(one), "rejected": answers(other)}
    (pair,) = read_pairs(FORMATS["messages"], Row("f:1", row))
    assert len(pair.prompt) == 1
    (found,) = tokenizing("Qwen 3")([pair])
    assert isinstance(found, Tokenized)
    assert found.pair.chosen.tolist() != found.pair.rejected.tolist()
    assert json.dumps(other) in tokenizer_of("Qwen 3").decode(found.pair.rejected)
    last = {"role": "assistant", "content": "It snows."}
    row = {"prompt": asked, "chosen": answers(one), "rejected": [*answers(other)[:2], last]}
    (pair,) = read_pairs(FORMATS["messages"], Row("f:1", row))
    assert len(pair.prompt) == 1


@pytest.mark.parametrize("value", [[1, 2], 5, '{"a": 1e400}', '{"a": NaN}', '{"a": -Infinity}'])
def test_arguments_that_are_no_json_object_are_found_whatever_they_are(value):
    assert "tool_arguments_not_json" in tokenized("Qwen 3", calling(value)).unwritten
    written = tokenizer_of("Qwen 3").decode(tokens(calling(value), TOOL_TEMPLATES["Qwen 2.5"]))
    assert f'"arguments": {json.dumps(value)}' in written


def test_a_turn_that_calls_in_two_places_is_refused():
    call = {"name": "weather", "arguments": CITY}
    turn = {"from": "function_call", "value": json.dumps(call), "tool_calls": [call]}
    row = {"prompt": [{"role": "user", "content": "Weather?"}], "chosen": [turn], "rejected": [ANSWER]}
    with pytest.raises(BadRow, match=r"`chosen\[0\]` calls tools twice"):
        read_pairs(FORMATS["messages"], Row("f:1", row))


@pytest.mark.parametrize("tools", ['[{"name": "weather"}]', [{"name": "weather"}]])
def test_tools_in_a_message_reach_the_template_or_are_found_missing(tools):
    """Some templates look for them in the system's message: Phi-4-mini's kind."""
    system = {"role": "system", "content": "Be brief.", "tools": tools}
    asked = [system, {"role": "user", "content": "Weather?"}]
    row = {"prompt": asked, "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "No."}]}
    (pair,) = read_pairs(FORMATS["messages"], Row("f:1", row))
    assert tokenized("ChatML", pair).unwritten == {"tools_unwritten"}
    within = "message.content + ('<|tool|>' ~ message.tools ~ '<|/tool|>' if message.tools else '')"
    found = tokenized("ChatML", pair, template=TEMPLATES["ChatML"].text.replace("message.content", within))
    assert found.unwritten == frozenset()
    assert f"Be brief.<|tool|>{tools}<|/tool|>" in tokenizer_of("ChatML").decode(found.pair.prompt)
