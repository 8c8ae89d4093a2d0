"""What a policy's weights come to, in numbers and in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gathered:
    """What a process holds for a time of weights that are sharded, in bytes.

    Attributes:
        root: Embeddings, head and all else outside decoder layers: from the forward pass to the end of the backward
            pass.
        layers: Two layers, the gradients of one that are not sharded yet, those that are being exchanged, and the
            head's: at most, while a layer is computed.
        ending: The gradients of what is outside decoder layers while they are exchanged, after all layers.
    """

    root: int = 0
    layers: int = 0
    ending: int = 0


NOTHING_GATHERED = Gathered()
"""What weights take that are not sharded."""


@dataclass(frozen=True)
class Sizes:
    """What a policy's weights come to; where they are sharded, for one process.

    Attributes:
        numbers: How many numbers they are, those of all processes together.
        held: Their bytes in memory.
        present: How many of these are in memory already: none of a policy whose weights were left out.
        num_trained: How many of them train, those of all processes together.
        trained: The bytes of the gradients of those that train.
        saved: The bytes of those that a checkpoint holds: of an adapter, not its base.
        gathered: What a pass holds for a time beside them.
        beginning: The bytes that it takes to answer as before step 1 while training goes on.
    """

    numbers: int
    held: int
    present: int
    num_trained: int
    trained: int
    saved: int
    gathered: Gathered
    beginning: int
