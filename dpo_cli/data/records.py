"""The records that data becomes in turn: a row, a message, a pair of conversations, a pair of token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Tokens: TypeAlias = "NDArray[np.int32]"
"""Token ids of one text, `[T]`."""

Gaps: TypeAlias = "NDArray[np.int32]"
"""Which tokens of a response are not scored: start, stop, start, stop, …, ascending; empty where all are."""

Lengths = tuple[int, int, int]
"""The tokens of prompt, chosen and rejected."""

Role = Literal["system", "user", "assistant", "tool"]

BadRowRule = Literal["error", "drop"]
"""What becomes of rows with structural errors: they stop the reading, or are dropped."""

LengthRule = Literal["drop", "truncate", "error"]
"""What becomes of pairs that are too long."""

TurnRule = Literal["all", "last"]
"""Which turns of a response are scored."""

NUMBERS = ("weight", "margin")
"""Numbers that a row may give for its pair: the fields of that name, in a row and in a pair."""

LABELS = ("source", "category")
"""Labels that a row may give its pair: kept, so that an evaluation can be broken down by them."""


def total_tokens(lengths: Lengths) -> int:
    """Return the tokens of a pair's longer sequence, prompt included."""
    prompt, chosen, rejected = lengths
    return prompt + max(chosen, rejected)


class Cell(str):
    """A text of a file that has no lists and no objects, CSV or TSV: it may be the JSON of one."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its values, or the problem that kept it from being read.

    Attributes:
        origin: Where it was read: `pairs.jsonl:17`.
        values: Its columns, or None.
        problem: Why there are no values.
        reason: A few words by which such problems are counted.
        structural: Whether such a problem means that the data is broken.
        num_rows: The rows of the source that make it up.
        system: The system's turn of its conversations where they have none, or nothing.
        copy: Whether it repeats the row before it, by the weight of its source.
    """

    origin: str
    values: Mapping[str, object] | None
    problem: str = ""
    reason: str = "undecodable row"
    structural: bool = True
    num_rows: int = 1
    system: str = ""
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Whose turn it is.
        content: Its text.
        input: What an instruction works on, where the data keeps it apart.
        extras: What else a chat template may use of a message: `tool_calls`, `function_call`, `name`,
            `tool_call_id`, `reasoning_content`; plain JSON values.
        scored: Whether a turn of the assistant in a response is scored, if turns like it are.
    """

    role: Role
    content: str
    input: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)
    scored: bool = field(default=True, compare=False)

    @property
    def text(self) -> str:
        """The turn as a chat template gets it: the content and, after one newline, the input."""
        return f"{self.content}\n{self.input}" if self.input else self.content


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: in a conversation that goes `prompt`, `chosen` is a better way on and `rejected` a worse one.

    Attributes:
        prompt: The turns before the responses; at least one message, the last of them not the assistant's.
        chosen: The better answer. It begins and ends with a turn of the assistant; between them there may be
            others' turns and what tools returned, which are context and not scored.
        rejected: The worse answer, likewise.
        origin: Where it was read: `pairs.jsonl:17`.
        weight: What the pair's loss is multiplied by, ≥ 0; of 32 bits, as it is kept.
        margin: By how much the chosen answer is better: a target that a loss can use; of 32 bits.
        source: What the data calls the pair's source, or nothing.
        category: What the data calls its category, or nothing.
        arguments: What the chat template is given beside the messages: `tools`, `enable_thinking`, …
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: str
    weight: float = 1.0
    margin: float = 0.0
    source: str = ""
    category: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as token ids; `prompt + chosen` and `prompt + rejected` are what the model sees.

    Attributes:
        prompt: The tokens of the prompt.
        chosen: The tokens of the chosen response, those that are not scored included.
        rejected: The tokens of the rejected response.
        origin: Where the pair was read.
        weight: As in `Pair`.
        margin: As in `Pair`.
        source: As in `Pair`.
        category: As in `Pair`.
        chosen_gaps: Which tokens of the chosen response are not scored; None where all are.
        rejected_gaps: Which tokens of the rejected response are not scored.
    """

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    origin: str
    weight: float = 1.0
    margin: float = 0.0
    source: str = ""
    category: str = ""
    chosen_gaps: Gaps | None = None
    rejected_gaps: Gaps | None = None


class BadRow(Exception):
    """A row that cannot become a pair.

    Args:
        reason: A few words by which such rows are counted.
        detail: What is wrong with this one.
        structural: Whether the data is broken, so that the run stops, or the pair merely teaches nothing.
        lengths: Those of a pair that is too long, or was before it was cut.
    """

    def __init__(self, reason: str, detail: str, *, structural: bool = True, lengths: Lengths | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.structural, self.lengths = reason, detail, structural, lengths
