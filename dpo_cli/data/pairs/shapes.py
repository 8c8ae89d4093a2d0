"""One function per dataset shape: a row becomes pairs, or a `BadRow` that says why not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_cli.data.pairs import shape_matching
from dpo_cli.data.pairs.conversations import after, preference
from dpo_cli.data.pairs.extra_columns import read_columns
from dpo_cli.data.pairs.messages import (
    Messages,
    is_message,
    read_hh,
    read_message,
    read_messages,
    read_prompt,
    read_question,
    read_system,
    read_turns,
    read_user,
)
from dpo_cli.data.pairs.pairing import gather, paired_answers
from dpo_cli.data.pairs.ranking import ranked_pairs, read_response, read_scores
from dpo_cli.data.pairs.shape_matching import SHAREGPT_TURNS, begins_otherwise, has_any, is_answer, is_list, is_turns
from dpo_cli.data.pairs.verdicts import as_chosen, better_and_worse
from dpo_cli.data.records import BadRow, Message, Pair, Row
from dpo_cli.data.rows import fields
from dpo_cli.system.text import several

RankedRule = Literal["extremes", "all"]
"""Which pairs a ranked list makes: the best against the worst, or every two whose scores differ."""

_BOTH = ("chosen", "rejected")
_TURNS = (*SHAREGPT_TURNS, "messages")


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A shape that rows may have.

    Attributes:
        read: Makes pairs of a row's columns, its origin and the rule for ranked lists.
        fits: Tells whether one row looks like the shape, by its columns and the kinds of their values.
        looks_at: What `fits` checks, as a sentence.
        example: A row.
        gather: Where it takes several rows to make a pair: makes rows that `read` makes whole pairs of, from all
            rows of a source; it is given an empty folder to work in.
    """

    read: Callable[[Mapping[str, object], str, RankedRule], Sequence[Pair]]
    fits: Callable[[Mapping[str, object]], bool]
    looks_at: str
    example: Mapping[str, object]
    gather: Callable[[Iterator[Row], Path], Iterator[Row]] | None = None


def read_pairs(shape: Shape, row: Row, ranked: RankedRule = "extremes") -> Sequence[Pair]:
    """Read a row of a shape, and the columns that a row of any shape may have beside the texts.

    Raises:
        BadRow: The row could not be read; or as the shape does, or `read_columns`.
    """
    if row.values is None:
        raise BadRow(row.reason, row.problem, structural=row.structural)
    pairs = shape.read(row.values, row.origin, ranked)
    if shape.gather:
        return pairs
    columns = read_columns(row.values)
    return [_with_columns(pair, row, columns) for pair in pairs]


def instruction(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"instruction", "chosen", "rejected"}`, all of them text.

    An answer may also be a message, or a list of messages that begins with the assistant's. Optional are `input`, text
    that the instruction works on, and `history`, the turns before it.
    """
    asked = read_question(row, "instruction")
    if any(is_turns(row.get(name)) for name in _BOTH):
        return [_of_turns(asked, row, origin)]
    return [_of_texts(asked, row, origin)]


def text(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"prompt", "chosen", "rejected"}`, all of them text.

    The prompt is a user's turn. Optional are `input` and `history`. An answer that happens to be JSON stays text.
    """
    return [_of_texts(read_question(row, "prompt"), row, origin)]


def messages(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"prompt", "chosen", "rejected"}`: a message list, and two answers to it.

    The prompt ends with a turn that is not the assistant's. An answer is a text, a message or a message list, which
    begins with the assistant's turn or repeats the prompt as a whole. The prompt may be an object that holds the list
    in `messages` and, optionally, `tools`, as in OpenAI's format.
    """
    prompt = fields.field(row, "prompt")
    asked = (read_message(prompt, "prompt"),) if is_message(prompt) else read_messages(prompt, "prompt")
    return [_of_turns(asked, row, origin)]


def repeated(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"prompt", "chosen", "rejected"}`, a text and two message lists that repeat it.

    The user's first turn in both must be the text of `prompt`, but for white space around it. The lists say
    everything; UltraFeedback's binarized pairs are of this shape. Where no user says anything in either list, and both
    begin with the assistant, they are answers to `prompt`. An answer may be a message, and one of the two a text.
    """
    prompt = read_user(row, "prompt").content
    values = [fields.field(row, name) for name in _BOTH]
    # Beside a conversation that repeats the prompt, a text is none.
    are_answers = not any(map(begins_otherwise, values)) and any(map(is_turns, values))
    chosen, rejected = (
        read_turns(value, name)
        if is_message(value) or (are_answers and is_answer(value))
        else read_messages(value, name)
        for name, value in zip(_BOTH, values, strict=True)
    )
    if chosen[0].role == rejected[0].role == "assistant" and not any(m.role == "user" for m in chosen + rejected):
        asked = read_question(row, "prompt")
        return [preference(asked + chosen, asked + rejected, origin)]
    for name, conversation in zip(_BOTH, (chosen, rejected), strict=True):
        said = next((message.content for message in conversation if message.role == "user"), "")
        if said.strip() != prompt.strip():
            raise BadRow("prompt not repeated", f"the user's first turn in `{name}` is not the text of `prompt`")
    return [preference(chosen, rejected, origin)]


def conversations(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"chosen", "rejected"}`, two message lists with a shared beginning: the prompt.

    There may be any number of turns before the two part and after.
    """
    chosen, rejected = (_messages(row, name) for name in _BOTH)
    return [preference(chosen, rejected, origin)]


def hh(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    r"""Read `{"chosen", "rejected"}`, two texts whose turns begin with `\n\nHuman:` and `\n\nAssistant:`.

    The first turn is the human's. White space around a turn belongs to the format and not to the messages. Where two
    texts part earlier than at the last answer, everything from there on is the response.
    """
    chosen, rejected = (read_hh(fields.field(row, name), name) for name in _BOTH)
    return [preference(chosen, rejected, origin)]


def sharegpt(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"conversations", "chosen", "rejected"}`: a list of `{"from", "value"}`, and two such messages.

    The list may be called `conversation`, or `messages` where it ends with a turn that is not the assistant's; an
    answer may be a text or a list of messages.
    """
    name = next((name for name in _TURNS if row.get(name) is not None), SHAREGPT_TURNS[0])
    return [_of_turns(_messages(row, name), row, origin)]


def ranked(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"prompt", "responses", "scores"}`: answers, and a number for each, the best answer's being the highest.

    In the place of `scores` there may be `ranks`, of which the lowest is the best. The prompt is text or a message
    list. An answer is a text, an object with the text in `text`, `content` or `response`, a message or a message list.

    `data.ranked: extremes` makes one pair of the best and the worst, `all` one of every two whose scores differ.
    A pair's margin is the difference of its scores or ranks, unless a column `margin` says otherwise; a loss uses it
    where `loss.margin_scale` is set. A pair of which an answer is empty, or both are the same, is left out, which is
    not counted; a row that is left without pairs is dropped and counted.
    """
    prompt = read_prompt(row)
    listed = fields.items(fields.field(row, "responses"), "responses", "answers")
    if not listed:
        raise BadRow("empty field", "`responses` is an empty list")
    answers = [read_response(value, prompt, f"responses[{number}]") for number, value in enumerate(listed)]
    scores = read_scores(row, len(listed))
    best_first = sorted(range(len(scores)), key=lambda number: -scores[number])
    if scores[best_first[0]] == scores[best_first[-1]]:
        raise BadRow(
            "no preference", f"none of {several(len(scores), 'response')} is better than another", structural=False
        )
    if rule == "extremes":
        best_first = [best_first[0], best_first[-1]]
    return ranked_pairs(answers, scores, best_first, origin)


def unpaired(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"prompt", "completion", "label"}`, one answer and whether it is good; two rows, paired, become a pair.

    Of one prompt, the k-th good answer is paired with the k-th bad one, wherever in the source they are; what is
    left over is dropped and counted. Prompts are the same if the model is given the same: the system's turn, tools and
    other arguments of the template included. The label is true or false, 1 or 0. The prompt is text or a message list;
    the answer a text, a message or a message list.

    A pair is named after both rows, the good one first (`pairs.jsonl:3+pairs.jsonl:9`). Its weight is the mean of
    theirs; `margin`, `source` and `category` are those of the good one.
    """
    return [paired_answers(row, origin)]


def compared(row: Mapping[str, object], origin: str, rule: RankedRule = "extremes") -> Sequence[Pair]:
    """Read `{"prompt", "response_a", "response_b", "winner"}`: two answers, and which of them is better.

    The answers may also be `response_1` and `response_2`, or `response_0` and `response_1`. `winner` names one of them
    by its letter or number (`a`, `model_b`, `Response 1`, 2), or by the name that is in `model_a` or `model_b`. In its
    place may be a `label`: of a and b, true or 1 says that the first is better, false or 0 the second; of answers with
    numbers a number is that of the better one. A tie (`tie`, `both`, `neither`, …) is dropped and counted. Numbers in
    `score_a` and `score_b` (or with the answers' numbers) must not say the opposite.

    Prompt and answers are as in any other shape of two answers: texts, messages, or whole conversations without a
    prompt.
    """
    better, worse = better_and_worse(row)
    names = {"chosen": better, "rejected": worse}
    values = as_chosen(row, better, worse)
    shape = next((shape for shape in map(FORMATS.__getitem__, _OF_TWO) if shape.fits(values)), None)
    try:
        return (shape.read if shape else _nearest_of_two(values))(values, origin, rule)
    except BadRow as bad:
        detail = re.sub(r"(?<=`)(chosen|rejected)\b", lambda name: names[name[0]], bad.detail)
        raise BadRow(bad.reason, detail, structural=bad.structural) from None


def _nearest_of_two(row: Mapping[str, object]) -> Callable[[Mapping[str, object], str, RankedRule], Sequence[Pair]]:
    """Return what reads a row of two answers that fits no shape, to say what is wrong with it."""
    if has_any(row, "prompt"):
        return text if isinstance(row["prompt"], str) else messages
    if has_any(row, *_TURNS):
        return sharegpt
    return conversations if any(is_list(row[name]) for name in _BOTH) else text


def _of_texts(prompt: Messages, row: Mapping[str, object], origin: str) -> Pair:
    """Make a pair of a prompt and two answers that must be text."""
    texts = [fields.text(fields.field(row, name), name) for name in _BOTH]
    chosen, rejected = ((*prompt, Message("assistant", said)) for said in texts)
    return preference(chosen, rejected, origin)


def _of_turns(prompt: Messages, row: Mapping[str, object], origin: str) -> Pair:
    """Make a pair of a prompt and two answers: each a text, a message or a list of messages."""
    chosen, rejected = (after(prompt, read_turns(fields.field(row, name), name), name) for name in _BOTH)
    return preference(chosen, rejected, origin)


def _with_columns(pair: Pair, row: Row, columns: Mapping[str, Any]) -> Pair:
    """Return a pair with the other columns of its row, and the system's turn, if there is one apart."""
    assert row.values is not None
    system = read_system(row.values, pair.prompt + pair.chosen + pair.rejected, row.system)
    return dataclasses.replace(pair, prompt=system + pair.prompt, **columns) if system or columns else pair


def _messages(row: Mapping[str, object], name: str) -> Messages:
    return read_messages(fields.field(row, name), name)


_ASKED = "Name three primes above 20."
_TURN = {"role": "user", "content": _ASKED}
_GOOD = {"role": "assistant", "content": "23, 29 and 31."}
_BAD = {"role": "assistant", "content": "21, 23 and 25."}

FORMATS: dict[str, Shape] = {
    "instruction": Shape(
        instruction,
        shape_matching.like_instruction,
        "`instruction` is text, `chosen` and `rejected` are text, or turns that begin with the assistant's.",
        {"instruction": "Sort these numbers.", "input": "3, 1, 2", "chosen": "1, 2, 3", "rejected": "3, 2, 1"},
    ),
    "text": Shape(
        text,
        shape_matching.like_text,
        "`prompt`, `chosen` and `rejected` are text.",
        {"prompt": _ASKED, "chosen": _GOOD["content"], "rejected": _BAD["content"]},
    ),
    "messages": Shape(
        messages,
        shape_matching.like_messages,
        "`prompt` is a list of messages, `chosen` and `rejected` are text, messages or lists of messages.",
        {"prompt": [_TURN], "chosen": [_GOOD], "rejected": [_BAD]},
    ),
    "repeated": Shape(
        repeated,
        shape_matching.like_repeated,
        "`prompt` is text, `chosen` and `rejected` are messages or lists of messages, at least one of them.",
        {"prompt": _ASKED, "chosen": [_TURN, _GOOD], "rejected": [_TURN, _BAD]},
    ),
    "conversations": Shape(
        conversations,
        shape_matching.like_conversations,
        "`chosen` and `rejected` are lists of messages, and there is no `prompt`.",
        {"chosen": [_TURN, _GOOD], "rejected": [_TURN, _BAD]},
    ),
    "hh": Shape(
        hh,
        shape_matching.like_hh,
        "`chosen` and `rejected` are texts that begin with `Human:`, and there is no `prompt` or `instruction`.",
        {
            "chosen": "\n\nHuman: Name three primes above 20.\n\nAssistant: 23, 29 and 31.",
            "rejected": "\n\nHuman: Name three primes above 20.\n\nAssistant: 21, 23 and 25.",
        },
    ),
    "sharegpt": Shape(
        sharegpt,
        shape_matching.like_sharegpt,
        "`conversations` is a list of messages, `chosen` and `rejected` are messages or text; there is no `prompt`.",
        {
            "conversations": [{"from": "human", "value": _ASKED}],
            "chosen": {"from": "gpt", "value": _GOOD["content"]},
            "rejected": {"from": "gpt", "value": _BAD["content"]},
        },
    ),
    "ranked": Shape(
        ranked,
        shape_matching.like_ranked,
        "`prompt` is text or a list of messages, `responses` is a list, and so is `scores` or `ranks`.",
        {
            "prompt": _ASKED,
            "responses": ["21, 23 and 25.", "23, 29 and 31.", "23 and 29."],
            "scores": [1.0, 9.5, 6.0],
        },
    ),
    "unpaired": Shape(
        unpaired,
        shape_matching.like_unpaired,
        "`prompt` and `completion` are text or lists of messages, and there is a `label`.",
        {"prompt": _ASKED, "completion": _GOOD["content"], "label": True},
        gather,
    ),
    "compared": Shape(
        compared,
        shape_matching.like_compared,
        "`response_a` and `response_b` (or 1 and 2, or 0 and 1) are answers as in any shape of two above, "
        "and there is a `winner` or a `label`.",
        {"prompt": _ASKED, "response_a": _BAD["content"], "response_b": _GOOD["content"], "winner": "b"},
    ),
}

_OF_TWO = ("instruction", "text", "messages", "repeated", "conversations", "hh", "sharegpt")
"""The shapes that have a chosen and a rejected answer."""
