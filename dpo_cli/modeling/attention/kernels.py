"""The kernels that compute attention over a prefix tree; `KERNELS` at the end lists them.

A kernel computes its own indices of a tree where a batch is laid out, on the CPU, and makes the mask that models hand
to their layers. All compute the same.

This file is read with the configuration, before NumPy and torch are needed: what computes with them is in modules of
its own, imported inside functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from dpo_cli.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from dpo_cli.modeling.attention.trees import Mask
    from dpo_cli.modeling.tree import PrefixTree, Stretch

BLOCK_TOKENS = 128
"""Queries and keys of a block of FlexAttention, its own number."""


class Kernel(Protocol):
    """What every kernel says and does.

    Attributes:
        name: What `training.attention` calls it.
        needs_cuda: Whether it runs on CUDA alone.
    """

    name: ClassVar[str]
    needs_cuda: ClassVar[bool]

    def row_tokens(self, num_tokens: int) -> int:
        """Return the tokens of a row with some tokens, its padding included."""
        ...

    def indices(self, tree: PrefixTree, stretches: Sequence[Stretch], window: int | None) -> list[NDArray[np.int32]]:
        """Return what the mask of a window needs on the device, computed on the CPU.

        Args:
            tree: The tree, its padding included.
            stretches: Its pieces without branches.
            window: The most tokens that a token sees, itself included, or None.
        """
        ...

    def mask(self, stretches: Sequence[Stretch], window: int | None, indices: Sequence[Tensor]) -> Mask:
        """Return the mask of the layers with a window.

        Args:
            stretches: The pieces of the tree without branches.
            window: As above.
            indices: What `indices` returned, on the device.
        """
        ...


@dataclass(frozen=True)
class Pieces:
    """Scaled-dot-product attention, piece by piece between the branches of the tree. Runs everywhere."""

    name: ClassVar[str] = "pieces"
    needs_cuda: ClassVar[bool] = False

    def row_tokens(self, num_tokens: int) -> int:
        """Return the tokens as they are: nothing is padded."""
        return num_tokens

    def indices(self, tree: PrefixTree, stretches: Sequence[Stretch], window: int | None) -> list[NDArray[np.int32]]:
        """Return nothing: what a piece sees is a slice."""
        return []

    def mask(self, stretches: Sequence[Stretch], window: int | None, indices: Sequence[Tensor]) -> Mask:
        """Return the mask of the pieces."""
        from dpo_cli.modeling.attention.pieces import PieceMask

        return PieceMask(tuple(stretches), window)


@dataclass(frozen=True)
class Flex:
    """FlexAttention: one compiled kernel, which skips the blocks of a row in which nothing is seen."""

    name: ClassVar[str] = "flex"
    needs_cuda: ClassVar[bool] = True

    def row_tokens(self, num_tokens: int) -> int:
        """Return the tokens of whole blocks; of two at least, since one would be compiled for itself."""
        return BLOCK_TOKENS * max(2, math.ceil(num_tokens / BLOCK_TOKENS))

    def indices(self, tree: PrefixTree, stretches: Sequence[Stretch], window: int | None) -> list[NDArray[np.int32]]:
        """Return the blocks in which anything is seen, and the numbers that the rule asks."""
        from dpo_cli.modeling.attention.blocks import block_indices, rule_numbers

        return [*block_indices(tree, window), *rule_numbers(tree, window)]

    def mask(self, stretches: Sequence[Stretch], window: int | None, indices: Sequence[Tensor]) -> Mask:
        """Return a block mask."""
        from dpo_cli.modeling.attention.flex import flex_mask

        return flex_mask(indices)


@dataclass(frozen=True)
class Varlen:
    """FlashAttention over sequences of different lengths, one for each piece, with the keys that it sees gathered."""

    name: ClassVar[str] = "varlen"
    needs_cuda: ClassVar[bool] = True

    def row_tokens(self, num_tokens: int) -> int:
        """Return the tokens as they are: nothing is padded."""
        return num_tokens

    def indices(self, tree: PrefixTree, stretches: Sequence[Stretch], window: int | None) -> list[NDArray[np.int32]]:
        """Return the places of all keys, and where those of each piece begin, as its queries do."""
        from dpo_cli.modeling.attention.gathering import gathered_keys

        return list(gathered_keys(stretches, window))

    def mask(self, stretches: Sequence[Stretch], window: int | None, indices: Sequence[Tensor]) -> Mask:
        """Return what one call of the kernel takes."""
        from dpo_cli.modeling.attention.varlen import varlen_mask

        return varlen_mask(stretches, window, indices)


PIECES = Pieces()
"""What runs everywhere."""

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Flex(), Varlen(), PIECES)}
"""The closed union of all kernels by name, in the order in which `auto` tries those of a GPU."""


def kernels_for(asked: str, device_type: str, where: str = "`training.attention`") -> list[Kernel]:
    """Return the kernels that a run tries, the first that is exact being used.

    Args:
        asked: What `training.attention` says.
        device_type: What torch calls the device.
        where: Where it says so.

    Raises:
        UserError: The kernel that was asked for does not run there.
    """
    on_cuda = device_type == "cuda"
    if asked == "auto":
        return [kernel for kernel in KERNELS.values() if kernel.needs_cuda] if on_cuda else [PIECES]
    kernel = KERNELS[asked]
    if kernel.needs_cuda and not on_cuda:
        what = f"`training.attention: {asked}` needs an NVIDIA or AMD GPU; this run computes on `{device_type}`"
        raise UserError(what, where, f"set `training.attention: auto` or `{PIECES.name}`")
    return [kernel]
