"""Whether a row looks like a shape, by its columns and the form of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dpo_cli.data.pairs.messages import is_hh, is_message, is_messages, read_messages
from dpo_cli.data.pairs.ranking import RANKINGS
from dpo_cli.data.pairs.verdicts import VERDICTS, as_chosen, two_answers
from dpo_cli.data.records import BadRow, Cell

_BOTH = ("chosen", "rejected")
SHAREGPT_TURNS = ("conversations", "conversation")
"""The names that ShareGPT's column of turns has."""


def like_instruction(row: Mapping[str, object]) -> bool:
    """Tell whether there are an instruction and two answers to it."""
    return (
        _are(_is_text, row, "instruction") and _are(is_answer, row, *_BOTH) and not _are(begins_otherwise, row, *_BOTH)
    )


def like_text(row: Mapping[str, object]) -> bool:
    """Tell whether prompt and answers are text."""
    return _are(_is_text, row, "prompt", *_BOTH)


def like_messages(row: Mapping[str, object]) -> bool:
    """Tell whether the prompt is a list of messages."""
    return _are(is_turns, row, "prompt") and _are(is_answer, row, *_BOTH)


def like_repeated(row: Mapping[str, object]) -> bool:
    """Tell whether the prompt is text, and an answer a message or a list of them."""
    return _are(_is_text, row, "prompt") and _are(is_answer, row, *_BOTH) and not _are(_is_text, row, *_BOTH)


def like_conversations(row: Mapping[str, object]) -> bool:
    """Tell whether there are two lists of messages and no prompt."""
    asked = has_any(row, "prompt", *SHAREGPT_TURNS) or _asks(row) or like_instruction(row)
    return _are(is_messages, row, *_BOTH) and not asked


def like_hh(row: Mapping[str, object]) -> bool:
    """Tell whether there are two texts of `Human:` and `Assistant:` and no prompt."""
    return _are(is_hh, row, *_BOTH) and not has_any(row, "prompt", "instruction")


def like_sharegpt(row: Mapping[str, object]) -> bool:
    """Tell whether there are a list of messages under another name than `prompt`, and two answers."""
    turns = any(is_messages(row.get(name)) for name in SHAREGPT_TURNS)
    return (turns or _asks(row)) and _are(is_answer, row, *_BOTH) and not has_any(row, "prompt")


def like_ranked(row: Mapping[str, object]) -> bool:
    """Tell whether there are several answers and how good they are."""
    return (
        _are(_is_prompt, row, "prompt")
        and _are(is_list, row, "responses")
        and any(is_list(row.get(name)) for name in RANKINGS)
    )


def like_unpaired(row: Mapping[str, object]) -> bool:
    """Tell whether there are one answer and a label."""
    return _are(_is_prompt, row, "prompt") and _are(is_answer, row, "completion") and has_any(row, "label")


def like_compared(row: Mapping[str, object]) -> bool:
    """Tell whether there are two answers and a verdict."""
    values = as_chosen(row, *two_answers(row))
    return has_any(row, *VERDICTS) and any(fits(values) for fits in _LIKE_TWO_ANSWERS)


def _asks(row: Mapping[str, object]) -> bool:
    """Tell whether `messages` is a prompt: beside two answers it is often a copy of the chosen one."""
    turns = row.get("messages")
    return is_messages(turns) and not _is_answered(turns) and not _are(begins_otherwise, row, *_BOTH)


def _is_answered(turns: object) -> bool:
    """Tell whether a list of messages ends with the assistant's."""
    return _roles(turns)[-1:] == ["assistant"]


def begins_otherwise(turns: object) -> bool:
    """Tell whether a value is a list of messages that does not begin with the assistant: a whole conversation."""
    return is_messages(turns) and _roles(turns)[:1] != ["assistant"]


def _roles(turns: object) -> list[str]:
    """Return the roles in a list of messages; nothing where it cannot be read."""
    try:
        return [message.role for message in read_messages(turns, "")]
    except BadRow:
        return []


def _are(looks: Callable[[object], bool], row: Mapping[str, object], *names: str) -> bool:
    """Tell whether all of some columns look like something."""
    return all(looks(row.get(name)) for name in names)


def has_any(row: Mapping[str, object], *names: str) -> bool:
    """Tell whether there is anything in one of some columns."""
    return any(row.get(name) not in (None, "") for name in names)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not is_turns(value)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or is_messages(value)


def is_answer(value: object) -> bool:
    """Tell whether a value may be an answer: a text, a message or a list of messages."""
    return isinstance(value, str) or is_message(value) or is_messages(value)


def is_turns(value: object) -> bool:
    """Tell whether a value is a message or a list of messages."""
    return is_message(value) or is_messages(value)


def is_list(value: object) -> bool:
    """Tell whether a value is a list, or a cell with the JSON of one."""
    return isinstance(value, list) or (isinstance(value, Cell) and value.lstrip().startswith("["))


_LIKE_TWO_ANSWERS = (
    like_instruction, like_text, like_messages, like_repeated, like_conversations, like_hh, like_sharegpt,
)  # fmt: skip
