"""Damage of every kind, in a row of every shape, is found, named with file and line, and counted; nothing else is lost.

A damaged row stands in the middle of a file of good ones. What harms nothing leaves every token as it was.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import operator
import re
from dataclasses import dataclass
from typing import Any

import pytest
from write_shapes_page import REST

from dpo_cli.data.pairs.shapes import FORMATS
from tests.builders import prepare_pairs

QUESTIONS = ("Why is the sea salty?", 'Who said "know thyself"?', "¿Dónde nace el Tajo?", "Say: a, b;\tc.")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def good_rows(shape: str, question: str) -> list[dict[str, Any]]:
    """Write what makes one good pair; of unpaired answers that is two rows."""
    better, worse = f'Well put: "{question}"', "No idea,\nno interest."
    rows = {
        "instruction": {"instruction": question, "input": "", "chosen": better, "rejected": worse},
        "text": {"prompt": question, "chosen": better, "rejected": worse},
        "messages": {"prompt": [user(question)], "chosen": [assistant(better)], "rejected": [assistant(worse)]},
        "repeated": {
            "prompt": question,
            "chosen": [user(question), assistant(better)],
            "rejected": [user(question), assistant(worse)],
        },
        "conversations": {
            "chosen": [user(question), assistant(better)],
            "rejected": [user(question), assistant(worse)],
        },
        "hh": {
            "chosen": f"\n\nHuman: {question}\n\nAssistant: {better}",
            "rejected": f"\n\nHuman: {question}\n\nAssistant: {worse}",
        },
        "sharegpt": {
            "conversations": [{"from": "human", "value": question}],
            "chosen": {"from": "gpt", "value": better},
            "rejected": {"from": "gpt", "value": worse},
        },
        "ranked": {"prompt": question, "responses": [worse, better], "scores": [1, 2]},
        "unpaired": {"prompt": question, "completion": better, "label": True},
        "compared": {"prompt": question, "response_a": worse, "response_b": better, "winner": "b"},
    }
    row = rows[shape]
    return [row, row | {"completion": worse, "label": False}] if shape == "unpaired" else [row]


def as_line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


@dataclass(frozen=True)
class Damage:
    """What is put in the place of a good row, and what should be said of it."""

    about: str
    line: bytes
    reason: str
    detail: str


BROKEN = "undecodable row"


def broken_lines(row: dict[str, Any]) -> list[Damage]:
    """Damage a good row's line: what may happen to any file of lines."""
    line = as_line(row)
    return [
        Damage("a line cut off", line[: len(line) // 2] + b"\n", BROKEN, "the row is not valid JSON"),
        Damage("invalid UTF-8", line.replace(b":", b": \xff", 1), BROKEN, "the row is not UTF-8: byte 0xff"),
        Damage("a list in place of an object", as_line([row]), BROKEN, "the row is not a JSON object"),
        Damage("text in place of an object", as_line("row"), BROKEN, "the row is not a JSON object"),
        Damage("null in place of an object", b"null\n", BROKEN, "the row is not a JSON object"),
        Damage("two objects in a line", line.strip() + line, BROKEN, "the row is not valid JSON: Extra data"),
        Damage("single quotes", repr(row).encode() + b"\n", BROKEN, "the row is not valid JSON"),
        Damage("a raw control character", line.replace(b'"', b'"\x00', 1), BROKEN, "Invalid control character"),
        Damage("nested too deeply", b"[" * 100_000 + b"\n", BROKEN, "it is nested too deeply"),
        Damage("too many digits", line[:-2] + b', "n": ' + b"9" * 5000 + b"}\n", BROKEN, "Exceeds the limit"),
    ]


def with_columns(row: dict[str, Any]) -> list[Damage]:
    """Give a good row columns that every shape may have, with what they may not hold."""
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("a huge weight", {"weight": 1e39}, "number out of range", "`weight` is not finite"),
        ("a weight below 0", {"weight": -1}, "number out of range", "`weight` is negative"),
        ("true as a weight", {"weight": True}, "wrong type", "`weight` is true or false"),
        ("a margin that is no number", {"margin": float("nan")}, "number out of range", "`margin` is not finite"),
        ("tools that are no list", {"tools": "hammer"}, "wrong type", "`tools` is text"),
        ("half a surrogate pair in a label", {"source": "\ud83d"}, "undecodable text", "`source` has half"),
    ]
    return [Damage(about, as_line(row | change), reason, detail) for about, change, reason, detail in cases]


def in_text(place: str, *, empty: str) -> list[tuple[str, Any, str, str]]:
    """Say what may stand where text belongs, and what becomes of it."""
    return [
        ("null", None, "missing field", "null"),
        ("a number", 5, "wrong type", f"`{place}` is a number instead of text"),
        ("true", True, "wrong type", f"`{place}` is true or false instead of text"),
        ("an object", {"a": 1}, "wrong type", f"`{place}` is an object instead of text"),
        ("half a surrogate pair", "a \udc00", "undecodable text", f"`{place}` has half of a surrogate pair"),
        ("no text", "", empty, "empty"),
        ("white space", " \n\t", empty, "empty"),
    ]


def in_messages(place: str, name: str) -> list[tuple[str, Any, str, str]]:
    """Say what may stand where a list of messages belongs that ends with an answer."""
    before = [] if name == "messages" else [user(QUESTIONS[0])]
    last = f"{place}[{len(before)}]"
    lists_alone = [
        ("text", "Hello.", "wrong type", f"`{place}` is text instead of a list"),
        ("an object", {"a": 1}, "wrong type", f"`{place}` is an object instead of a list"),
        ("JSON as text", json.dumps([*before, assistant("a")]), "wrong type", f"`{place}` is JSON written as text"),
    ]
    return [
        ("null", None, "missing field", f"`{place}` is null"),
        ("a number", 5, "wrong type", f"`{place}` is a number instead of"),
        *([] if name == "messages" else lists_alone),
        ("a weight of a half", [*before, assistant("a") | {"weight": 0.5}], "wrong type", f"`{last}.weight` is `0.5`"),
        ("a word for scored", [*before, assistant("a") | {"train": "no"}], "wrong type", f"`{last}.train` is `no`"),
        ("nothing scored", [*before, assistant("a") | {"weight": 0}], "nothing scored", f"no turn of `{place}`"),
        ("an empty list", [], "empty field", f"`{place}` is an empty list"),
        ("a list of text", [*before, "Hello."], "wrong type", f"`{last}` is text instead of an object"),
        ("a list in the list", [*before, [assistant("a")]], "wrong type", f"`{last}` is a list instead of an object"),
        ("a wrong role", [*before, {"role": "robot", "content": "a"}], "wrong role", f"`{last}.role` is `robot`"),
        ("a number as role", [*before, {"role": 2, "content": "a"}], "wrong type", f"`{last}.role` is a number"),
        ("no role", [*before, {"content": "a"}], "missing field", f"`{last}` has no `role`"),
        ("no content", [*before, {"role": "assistant"}], "missing field", f"`{last}` has no `content`"),
        ("null as content", [*before, assistant(None)], "missing field", f"`{last}.content` is null"),
        ("a number as content", [*before, assistant(3.5)], "wrong type", f"`{last}.content` is a number"),
        ("half a surrogate pair", [*before, assistant("\ud800")], "undecodable text", f"`{last}.content` has half"),
        ("an image", [*before, assistant([{"type": "image"}])], "wrong type", f"`{last}.content[0]` is a part of type"),
        ("a user at the end", [*before, assistant("a"), user("b")], "no answer", f"`{place}` ends with"),
        ("an empty answer", [*before, assistant(" ")], "empty response", f"`{place}` is empty"),
    ]


Change = tuple[str, Any, str, str]
OF_SHAPE: dict[str, dict[tuple[str | int, ...], list[Change]]] = {
    "instruction": {
        ("instruction",): in_text("instruction", empty="empty field"),
        ("chosen",): in_text("chosen", empty="empty response"),
        ("input",): [("a list", ["a"], "wrong type", "`input` is a list")],
        ("history",): [
            ("a number", 3, "wrong type", "`history` is a number"),
            ("no lists", ["a", "b"], "wrong type", "`history[0]` is text instead of a list of two texts"),
            ("one text alone", [["a"]], "wrong length", "`history[0]` has 1 texts"),
        ],
        ("system",): [("an object", {}, "wrong type", "`system` is an object")],
    },
    "text": {
        ("prompt",): in_text("prompt", empty="empty field"),
        ("chosen",): in_text("chosen", empty="empty response"),
        ("rejected",): in_text("rejected", empty="empty response"),
    },
    "messages": {
        ("prompt",): [
            ("a number", 1, "wrong type", "`prompt` is a number instead of a list"),
            ("an answer at its end", [user("a"), assistant("b")], "prompt ends with an answer", "the assistant's"),
            ("nobody asks", [user(" ")], "empty field", "there is no turn of a user"),
        ],
        ("chosen",): in_messages("chosen", "messages"),
    },
    "repeated": {
        ("prompt",): [
            *in_text("prompt", empty="empty field"),
            ("another question", "What?", "prompt not repeated", "the user's first turn in `chosen`"),
        ],
        ("rejected",): in_messages("rejected", "repeated"),
    },
    "conversations": {
        ("chosen",): [
            *in_messages("chosen", "conversations"),
            ("another question", [user("What?"), assistant("a")], "different contexts", "diverge at turn 1"),
        ],
    },
    "hh": {
        ("chosen",): [
            *in_text("chosen", empty="no human turn")[:5],
            ("no text", "", "no human turn", "`chosen` does not begin with `Human:`"),
            ("no turns", "Hello.", "no human turn", "`chosen` does not begin with `Human:`"),
            ("the assistant first", "\n\nAssistant: a", "no human turn", "`chosen` does not begin with `Human:`"),
            ("no answer", "\n\nHuman: a", "no answer", "`chosen` ends with a turn of the user"),
            ("an empty answer", f"\n\nHuman: {QUESTIONS[0]}\n\nAssistant: ", "empty response", "`chosen` is empty"),
            ("another question", "\n\nHuman: a\n\nAssistant: b", "different contexts", "diverge at turn 1"),
        ],
    },
    "sharegpt": {
        ("conversations",): [
            ("null", None, "missing field", "`conversations` is null"),
            ("text", "a", "wrong type", "`conversations` is text instead of a list"),
            ("an empty list", [], "empty field", "`conversations` is an empty list"),
            ("an answer at its end", [{"from": "gpt", "value": "a"}], "prompt ends with an answer", "the assistant's"),
        ],
        ("conversations", 0, "from"): [
            ("nobody known", "narrator", "wrong role", "`conversations[0].from` is `narrator`"),
            ("a number", 1, "wrong type", "`conversations[0].from` is a number"),
            ("null", None, "missing field", "`conversations[0]` has no `role`"),
        ],
        ("conversations", 0, "value"): [("white space", " ", "empty field", "there is no turn of a user")],
        ("chosen", "value"): in_text("chosen.value", empty="empty response"),
        ("chosen", "from"): [("the human", "human", "prompt not repeated", "`chosen` begins with a turn of the user")],
        ("rejected",): [("a number", 1, "wrong type", "`rejected` is a number instead of an object")],
    },
    "ranked": {
        ("prompt",): in_text("prompt", empty="empty field")[4:],
        ("responses",): [
            ("null", None, "missing field", "`responses` is null"),
            ("text", "a", "wrong type", "`responses` is text instead of a list"),
            ("an empty list", [], "empty field", "`responses` is an empty list"),
        ],
        ("responses", 0): [
            ("null", None, "wrong type", "`responses[0]` is null"),
            ("a number", 7, "wrong type", "`responses[0]` is a number"),
            ("no text", "", "empty response", "`responses[0]` is empty"),
            ("an object without text", {"a": "b"}, "missing field", "`responses[0]` has no `text`"),
        ],
        ("scores",): [
            ("null", None, "missing field", "`scores` is null"),
            ("one too few", [1], "wrong length", "`scores` has 1 number for 2 responses"),
            ("one too many", [1, 2, 3], "wrong length", "`scores` has 3 numbers for 2 responses"),
            ("all the same", [1, 1], "no preference", "none of 2 responses is better"),
        ],
        ("scores", 1): [
            ("text", "high", "wrong type", "`scores[1]` is text instead of a number"),
            ("true", True, "wrong type", "`scores[1]` is true or false"),
            ("infinity", float("inf"), "number out of range", "`scores[1]` is not finite"),
        ],
    },
    "unpaired": {
        ("prompt",): in_text("prompt", empty="empty field")[4:],
        ("completion",): [
            *in_text("completion", empty="empty response")[4:],
            ("null", None, "missing field", "`completion` is null"),
            ("a number", 5, "wrong type", "`completion` is a number"),
            ("a user's turn", [user("a")], "prompt not repeated", "`completion` begins with a turn of the user"),
        ],
        ("label",): [
            ("null", None, "missing field", "`label` is null"),
            ("2", 2, "wrong label", "`label` is `2`"),
            ("text", "maybe", "wrong label", "`label` is `maybe`"),
            ("a list", [True], "wrong label", "`label` is a list"),
        ],
    },
    "compared": {
        ("prompt",): in_text("prompt", empty="empty field")[4:],
        ("response_a",): in_text("response_a", empty="empty response"),
        ("response_b",): in_text("response_b", empty="empty response"),
        ("winner",): [
            ("null", None, "missing field", "`winner` is null"),
            ("a tie", "tie (both bad)", "no preference", "`winner` is a tie"),
            ("null in words", "none", "wrong label", "`winner` is `none`, which names neither"),
            ("a third", "model_c", "wrong label", "`winner` is `model_c`, which names neither `response_a` nor"),
            ("a number", 1, "wrong label", "call them `response_0` and `response_1`, or `response_1` and `response_2`"),
            ("both names", "a or b", "wrong label", "names neither"),
            ("true", True, "wrong label", "`winner` is `True`, which names neither"),
            ("a list", ["a"], "wrong label", "`winner` is `a list`"),
        ],
    },
}
"""What may be wrong within a row of each shape: where, what stands there, and what should be said of it."""


def changed(row: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Return a copy of a row in which one value is another."""
    copy = json.loads(json.dumps(row))
    functools.reduce(operator.getitem, path[:-1], copy)[path[-1]] = value
    return copy


def without_a_column(shape: str, row: dict[str, Any]) -> list[Damage]:
    """Take away each column that a shape needs."""
    return [
        Damage(
            f"no {column}",
            as_line({name: value for name, value in row.items() if name != column}),
            "missing field",
            f"`{column}` is missing; the row has `",
        )
        for column in row
        if column != "input"
    ]


def damages_of(shape: str) -> list[Damage]:
    row = good_rows(shape, QUESTIONS[0])[0]
    return [
        *broken_lines(row),
        *with_columns(row),
        *without_a_column(shape, row),
        *(
            Damage(f"{about} in {'.'.join(map(str, path))}", as_line(changed(row, path, value)), reason, detail)
            for path, changes in OF_SHAPE[shape].items()
            for about, value, reason, detail in changes
        ),
    ]


ALL = [(shape, damage) for shape in FORMATS for damage in damages_of(shape)]


@pytest.mark.parametrize("shape", FORMATS)
def test_every_shape_is_damaged_in_at_least_twenty_ways(shape):
    assert len({damage.line for damage in damages_of(shape)}) >= 20


def test_every_reason_is_explained_on_the_page():
    assert {f"| `{damage.reason}` |" for _, damage in ALL} <= set(re.findall(r"^\| `[^`]+` \|", REST, re.MULTILINE))


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, tokenizer):
    """Return the tokens of a shape's good rows when no others are among them."""

    @functools.cache
    def tokens_of(shape):
        folder = tmp_path_factory.mktemp("good")
        return tokens(prepare(folder, ".jsonl", b"".join(good_lines(shape)), tokenizer))

    return tokens_of


def good_lines(shape: str) -> list[bytes]:
    return [as_line(row) for question in QUESTIONS[1:] for row in good_rows(shape, question)]


def prepare(folder, ending, content, tokenizer):
    source = folder / f"pairs{ending}"
    source.write_bytes(content)
    return prepare_pairs(source, tokenizer, folder / "prepared", on_bad_row="drop")


def tokens(pairs):
    return [(pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs]


@pytest.mark.parametrize(("shape", "damage"), ALL, ids=[f"{shape}-{damage.about}" for shape, damage in ALL])
def test_damage_is_found_named_and_counted_and_nothing_else_is_lost(tmp_path, tokenizer, unharmed, shape, damage):
    lines = good_lines(shape)
    half = len(lines) // 2
    pairs = prepare(tmp_path, ".jsonl", b"".join([*lines[:half], damage.line, *lines[half:]]), tokenizer)
    statistics = pairs.manifest["statistics"]
    assert statistics["dropped"] == {damage.reason: 1}
    (example,) = statistics["examples"][damage.reason]
    assert example.startswith(f"{tmp_path / 'pairs.jsonl'}:{half + 1}: ")
    assert damage.detail in example
    assert statistics["rows_read"] == len(lines) + 1
    assert tokens(pairs) == unharmed(shape)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    """Write rows as CSV; lists, objects and whatever is no text as their JSON."""
    cells = [{n: v if isinstance(v, str) else json.dumps(v) for n, v in row.items()} for row in rows]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return file.getvalue().encode()


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize(
    "harmless",
    [
        "byte-order mark",
        "CRLF",
        "blank lines",
        "no last line end",
        "CSV with nested quotes",
        "CSV with a byte-order mark",
    ],
)
def test_what_harms_nothing_loses_nothing(tmp_path, tokenizer, unharmed, shape, harmless):
    lines = good_lines(shape)
    cells = as_csv([row for question in QUESTIONS[1:] for row in good_rows(shape, question)])
    ending, content = {
        "byte-order mark": (".jsonl", BOM + b"".join(lines)),
        "CRLF": (".jsonl", b"".join(lines).replace(b"\n", b"\r\n")),
        "blank lines": (".jsonl", b"\n" + b"\n \n".join(lines)),
        "no last line end": (".jsonl", b"".join(lines).rstrip(b"\n")),
        "CSV with nested quotes": (".csv", cells),
        "CSV with a byte-order mark": (".csv", BOM + cells),
    }[harmless]
    pairs = prepare(tmp_path, ending, content, tokenizer)
    assert pairs.manifest["statistics"]["dropped"] == {}
    assert tokens(pairs) == unharmed(shape)


def test_answers_without_a_counterpart_are_counted_and_no_error(tmp_path, tokenizer, unharmed):
    lines = good_lines("unpaired")
    alone = as_line({"prompt": QUESTIONS[0], "completion": "Only good.", "label": True})
    source = tmp_path / "pairs.jsonl"
    source.write_bytes(b"".join([*lines[:2], alone, *lines[2:]]))
    pairs = prepare_pairs(source, tokenizer, tmp_path / "prepared")
    statistics = pairs.manifest["statistics"]
    assert statistics["dropped"] == {"no counterpart": 1}
    assert statistics["examples"]["no counterpart"][0].startswith(f"{source}:3: no bad answer")
    assert tokens(pairs) == unharmed("unpaired")
