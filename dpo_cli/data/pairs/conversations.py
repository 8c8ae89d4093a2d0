"""A prompt and its responses: what two whole conversations have in common, and where they part."""

from __future__ import annotations

import json

from dpo_cli.data.pairs.calls import CALLED
from dpo_cli.data.pairs.messages import Messages
from dpo_cli.data.records import BadRow, Message, Pair


def after(prompt: Messages, response: Messages, place: str) -> Messages:
    """Return a prompt and its response as one conversation; the response may begin by repeating the prompt.

    Raises:
        BadRow: The prompt ends with an answer, or the response begins with a turn that is neither the
            assistant's nor the prompt's first.
    """
    if prompt[-1].role == "assistant":
        raise BadRow("prompt ends with an answer", "the prompt's last turn is the assistant's")
    if response[0].role == "assistant":
        return prompt + response
    if len(response) < len(prompt) or not all(map(_same, prompt, response)):
        detail = f"`{place}` begins with a turn of the {response[0].role} and does not repeat the prompt"
        raise BadRow("prompt not repeated", detail)
    return response


def check_end(conversation: Messages, place: str) -> None:
    """Refuse a conversation that does not end with an answer."""
    if (last := conversation[-1].role) != "assistant":
        raise BadRow("no answer", f"`{place}` ends with a turn of the {last}, not with the assistant's")


def check_answers(conversation: Messages, start: int, place: str) -> None:
    """Refuse a conversation of which an answer, from a turn on, is empty, or that no text of a user precedes."""
    for number, message in enumerate(conversation[start:], start + 1):
        if not _has_content(message):
            which = f" in turn {number}" if len(conversation) > start + 1 else ""
            raise BadRow("empty response", f"`{place}` is empty{which}", structural=False)
    if not any(message.role == "user" and message.text.strip() for message in conversation[:start]):
        raise BadRow("empty field", f"there is no turn of a user before the answer of `{place}`")


def preference(
    chosen: Messages, rejected: Messages, origin: str, places: tuple[str, str] = ("chosen", "rejected")
) -> Pair:
    """Make a pair of two whole conversations: the prompt is what they share.

    The responses begin at the first turn of the assistant in which the two differ. Turns of the assistant that
    follow each other are one answer and stay together.

    Args:
        chosen: The better conversation, from its beginning.
        rejected: The worse one.
        origin: Where they were read.
        places: What the two are called where one of them is wrong.

    Raises:
        BadRow: As `check_end` and `check_answers` do; or the two are the same, or part at a turn that is not the
            assistant's.
    """
    check_end(chosen, places[0])
    check_end(rejected, places[1])
    if len(chosen) == len(rejected) and all(map(_same, chosen, rejected)):
        check_answers(chosen, len(chosen) - 1, places[0])
        raise BadRow("identical responses", "`{}` and `{}` are the same text".format(*places), structural=False)
    start = _parting(chosen, rejected, places)
    check_answers(chosen, start, places[0])
    check_answers(rejected, start, places[1])
    for conversation, place in zip((chosen, rejected), places, strict=True):
        if not any(message.scored for message in conversation[start:] if message.role == "assistant"):
            raise BadRow("nothing scored", f"no turn of `{place}` is scored, by its `weight` or `train`")
    return Pair(chosen[:start], chosen[start:], rejected[start:], origin)


def _parting(chosen: Messages, rejected: Messages, places: tuple[str, str]) -> int:
    """Return where the responses of two conversations begin."""
    both = enumerate(zip(chosen, rejected, strict=False))
    differing = next((place for place, (one, other) in both if not _same(one, other)), min(len(chosen), len(rejected)))
    start = differing
    while start and chosen[start - 1].role == "assistant":
        start -= 1
    answers = [_is_answer(chosen, differing), _is_answer(rejected, differing)]
    # Where the answers agree up to here, one of them has to go on for them to differ.
    if not (all(answers) or (start < differing and any(answers))):
        detail = "`{}` and `{}` diverge at turn {}, which is not the assistant's in both".format(*places, differing + 1)
        raise BadRow("different contexts", detail, structural=False)
    return start


def _same(one: Message, other: Message) -> bool:
    """Tell whether two messages are the same, the order of names and the spelling of numbers in a call included."""
    if one != other:
        return False
    return not one.extras or json.dumps(one.extras) == json.dumps(other.extras)


def _is_answer(conversation: Messages, place: int) -> bool:
    return place < len(conversation) and conversation[place].role == "assistant"


def _has_content(message: Message) -> bool:
    """Tell whether a turn may be scored: it is another's, or it has visible text or calls a tool."""
    if message.role != "assistant" or not message.scored:
        return True
    return bool(message.content.strip()) or not CALLED.isdisjoint(message.extras)
