"""What walks the road: a message, a pair of messages, a pair of token sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Tokens: TypeAlias = "NDArray[np.int32]"
"""Token ids of one text, `[T]`."""

NUMBERS = ("weight", "margin")
"""What a row may say of its pair beside the texts: the fields of that name, in a row and in a pair."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `input` is what an instruction works on, where the data keeps it apart."""

    role: Literal["user", "assistant"]
    content: str
    input: str = ""

    @property
    def text(self) -> str:
        """The turn as a chat template gets it: the content and, after one newline, the input."""
        return f"{self.content}\n{self.input}" if self.input else self.content


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: to `prompt`, `chosen` is the better answer and `rejected` the worse."""

    prompt: Message
    chosen: Message
    rejected: Message
    origin: str
    """Where it was read: `pairs.jsonl:17`."""
    weight: float = 1.0
    """What the pair's loss is multiplied by, ≥ 0; of 32 bits, as it is kept."""
    margin: float = 0.0
    """By how much the chosen answer is better: a target that a loss may use; of 32 bits."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as token ids; `prompt + chosen` and `prompt + rejected` are what the model sees."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    origin: str
    weight: float = 1.0
    margin: float = 0.0


class BadRow(Exception):
    """A row that cannot become a pair.

    Args:
        reason: A few words by which such rows are counted.
        detail: What is wrong with this one.
        structural: Whether the data is broken, so that the run stops, or the pair merely teaches nothing.
    """

    def __init__(self, reason: str, detail: str, *, structural: bool = True) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.structural = reason, detail, structural
