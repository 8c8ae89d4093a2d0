"""The layouts: how pairs are cut into micro-batches and where their tokens are; `LAYOUTS` at the end lists them.

A layout cuts a step's pairs into micro-batches under a token budget, and lays a micro-batch out as a `PairBatch`. All
name the same response tokens in the same order (every pair's chosen response, then every pair's rejected one), so that
nothing behind the batch knows which layout ran.

This file is read with the configuration, before NumPy and torch are needed: what computes with them is in modules of
its own, imported inside functions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from dpo_cli.modeling.attention.kernels import PIECES, Kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_cli.data.prepared.step_plan import PairSizes
    from dpo_cli.data.records import TokenizedPair
    from dpo_cli.modeling.batch import PairBatch


class Layout(Protocol):
    """What every layout says and does.

    Attributes:
        name: What `training.layout` calls it.
        needs_proof: Whether models may answer otherwise than under the padded layout, so that it is proved first.
    """

    name: ClassVar[str]
    needs_proof: ClassVar[bool]

    @property
    def described(self) -> str:
        """Its name, and what computes it where that is not what runs everywhere."""
        ...

    def with_kernels(self, kernels: Sequence[Kernel], windows: tuple[int | None, ...]) -> Sequence[Layout]:
        """Return the layout with each kernel of attention in turn; itself, where models use their own attention.

        Args:
            kernels: The kernels, in the order in which they are to be tried.
            windows: Those of the layers of the models that read it, None for one without.
        """
        ...

    def prepare(self, model: PreTrainedModel) -> None:
        """Make a model read batches of this layout.

        Raises:
            CannotPack: Its architecture cannot.
        """

    def cut(self, sizes: PairSizes, indices: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
        """Cut pairs into micro-batches, each pair in one of them; it decides speed and memory, never the result.

        Args:
            sizes: Those of all pairs.
            indices: Which pairs are cut.
            micro_batch_tokens: The most tokens of a forward pass; a pair that alone has more is one by itself.
        """
        ...

    def tokens(self, sizes: PairSizes, indices: Sequence[int]) -> int:
        """Return the tokens of a forward pass over some pairs, padding included, or a little more."""
        ...

    def batch(self, indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Lay out B pairs.

        Args:
            indices: The pairs' indices in the data.
            pairs: The pairs themselves.
        """
        ...


@dataclass(frozen=True)
class Padded:
    """Chosen and rejected sequences as `2B` rows, padded on the right, the prompt in each. Works with every model."""

    name: ClassVar[str] = "padded"
    needs_proof: ClassVar[bool] = False

    @property
    def described(self) -> str:
        """Its name."""
        return self.name

    def with_kernels(self, kernels: Sequence[Kernel], windows: tuple[int | None, ...]) -> Sequence[Layout]:
        """Return the layout alone."""
        return [self]

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave the model as it is."""

    def cut(self, sizes: PairSizes, indices: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
        """Cut pairs, the longest first, so that their padded size (two sequences a pair) stays in the budget."""
        lengths = sizes.longest
        cuts: list[list[int]] = []
        for index in sizes.longest_first(indices):
            if not cuts or 2 * lengths[cuts[-1][0]] * (len(cuts[-1]) + 1) > micro_batch_tokens:
                cuts.append([])
            cuts[-1].append(index)
        return cuts

    def tokens(self, sizes: PairSizes, indices: Sequence[int]) -> int:
        """Return the tokens of a forward pass, padding included."""
        return 2 * len(indices) * int(sizes.longest[list(indices)].max())

    def batch(self, indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Lay out B pairs, a row for each sequence."""
        from dpo_cli.modeling.batch import padded_batch

        return padded_batch(indices, pairs)


@dataclass(frozen=True)
class Packed:
    """All sequences as one row without padding, in which what they begin with in common is written once.

    Attributes:
        kernel: What computes attention; one that works by blocks has the row padded to whole ones.
        windows: Those of the model's layers, None for one without; others are computed when they are asked for.
    """

    name: ClassVar[str] = "packed"
    needs_proof: ClassVar[bool] = True
    kernel: Kernel = PIECES
    windows: tuple[int | None, ...] = (None,)

    @property
    def described(self) -> str:
        """Its name, and the kernel where it is not that of CPUs."""
        return self.name if self.kernel == PIECES else f"{self.name} ({self.kernel.name} attention)"

    def with_kernels(self, kernels: Sequence[Kernel], windows: tuple[int | None, ...]) -> Sequence[Layout]:
        """Return the layout with each kernel."""
        return [Packed(kernel, windows) for kernel in kernels]

    def prepare(self, model: PreTrainedModel) -> None:
        """Give the model attention over prefix trees.

        Raises:
            CannotPack: Its architecture takes none.
        """
        from dpo_cli.modeling.attention.trees import attend_to_trees

        attend_to_trees(model)

    def cut(self, sizes: PairSizes, indices: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
        """Cut pairs so that their tokens stay in the budget, pairs of one prompt side by side, cuts of about one size.

        Counted are the tokens that are certain to be shared once: prompts, and how all prompts begin.
        """
        by_prompt: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            by_prompt.setdefault((int(sizes.prompt_ids[index]), int(sizes.prompts[index])), []).append(index)
        ordered = list(itertools.chain.from_iterable(by_prompt.values()))
        fits = functools.partial(self._fits, micro_batch_tokens)
        full = _filled(sizes, ordered, fits, micro_batch_tokens)
        # Even cuts run faster than full ones and a remainder; where pairs are too uneven for that, full ones do.
        even = _filled(sizes, ordered, fits, _unpadded(sizes, ordered) / max(1, len(full)))
        return even if len(even) <= len(full) else full

    def _fits(self, micro_batch_tokens: int, num_tokens: int) -> bool:
        return self.kernel.row_tokens(num_tokens) <= micro_batch_tokens

    def tokens(self, sizes: PairSizes, indices: Sequence[int]) -> int:
        """Return the tokens of a forward pass, those of one prompt side by side, padding included, or a little more."""
        return self.kernel.row_tokens(_unpadded(sizes, indices))

    def batch(self, indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Lay out B pairs as one row."""
        from dpo_cli.modeling.batch import packed_batch

        return packed_batch(indices, pairs, self.kernel, self.windows)


def _filled(sizes: PairSizes, ordered: Sequence[int], fits: Callable[[int], bool], wanted: float) -> list[list[int]]:
    """Fill cuts in order up to about the wanted number of tokens, and never with more than fit."""
    cuts: list[list[int]] = []
    size = 0
    for index in ordered:
        more = _added(sizes, index, cuts[-1][-1] if cuts else None)
        if not cuts or not fits(size + more) or size + more / 2 > wanted:
            cuts.append([])
            size, more = 0, _added(sizes, index, None)
        cuts[-1].append(index)
        size += more
    return cuts


def _unpadded(sizes: PairSizes, indices: Sequence[int]) -> int:
    """Return the tokens of pairs in one row, those of one prompt side by side, or a little more."""
    return sum(_added(sizes, index, before) for before, index in zip([None, *indices], indices, strict=False))


def _added(sizes: PairSizes, index: int, before: int | None) -> int:
    """Return the tokens that a pair adds to a micro-batch behind another pair, or as its first."""
    prompt = sizes.prompts[index]
    if before is not None:
        # Of one prompt that had to be cut, pairs with longer responses keep less, and share it with none.
        same = sizes.prompt_ids[before] == sizes.prompt_ids[index] and sizes.prompts[before] == prompt
        prompt = 0 if same else prompt - sizes.opening
    return int(prompt + sizes.chosen[index] + sizes.rejected[index])


PADDED, PACKED = Padded(), Packed()
"""What others are compared with, and what `auto` tries first."""

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PADDED, PACKED)}
"""The closed union of all layouts, by name."""
