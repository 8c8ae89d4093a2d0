"""What a policy's weights come to, in numbers and in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What a policy's weights come to.

    Attributes:
        numbers: How many numbers they are.
        held: Their bytes in memory.
        present: How many of these are in memory already: none of a policy whose weights were left out.
        num_trained: How many of them train.
        trained: The bytes of the gradients of those that train.
        saved: The bytes of those that a checkpoint holds: of an adapter, not its base.
        gathered: The bytes that a forward pass holds for a time of weights that other processes have.
        beginning: The bytes that it takes to answer as before step 1 while training goes on.
    """

    numbers: int
    held: int
    present: int
    num_trained: int
    trained: int
    saved: int
    gathered: int
    beginning: int
