"""The state of a run whose weights are sharded over processes: what each process writes of it.

What an optimizer keeps of a weight has the weight's name, and is sharded as that is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.tensor import DTensor, Shard

from dpo_cli.modeling.eight_bits import SCALE, num_blocks
from dpo_cli.modeling.folders.model_files import WEIGHTS
from dpo_cli.modeling.folders.shard_files import Part, Piece, write_list, write_part
from dpo_cli.modeling.folders.streams import save_tensors
from dpo_cli.training.resharding import KEPT, MOVING, OPTIMIZER, REFERENCE, is_by_rows, trained_in_order
from dpo_cli.training.state import RANDOM, RunNotes, TrainingState, record_of, write_record

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedTokenizerBase

    from dpo_cli.modeling.policy import Policy
    from dpo_cli.training.learner import Learner


@dataclass(frozen=True)
class ShardedSnapshot:
    """What a process has of all that a checkpoint holds.

    Attributes:
        policy: The policy, whose weights go on changing.
        tokenizer: Saved beside it.
        pieces: By kind and name: weights, the optimizer's state, and the reference's weights, if it moves.
        gathered: Weights that are so few that the main process writes all of them.
        random: The random states of all processes.
        record: All else.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    pieces: dict[str, dict[str, Piece]]
    gathered: dict[str, Tensor]
    random: dict[str, Tensor]
    record: TrainingState

    @classmethod
    def of(
        cls,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        random_states: Sequence[Mapping[str, Tensor]],
        notes: RunNotes,
    ) -> ShardedSnapshot:
        """Look at the state as it is now; of what is sharded nothing is copied. Every process has to call it."""
        is_main, state = learner.accelerator.is_main_process, learner.state()
        sharded, gathered = learner.policy.weights.sharded_state()
        pieces = {WEIGHTS: {name: Piece.of(tensor, is_main=is_main) for name, tensor in sharded.items()}}
        pieces[KEPT] = _optimizer_pieces(learner, state.tensors[OPTIMIZER], is_main=is_main)
        reference = state.tensors.get(REFERENCE, {})
        pieces[MOVING] = {name: Piece.of(tensor, is_main=is_main) for name, tensor in reference.items()}
        random = {name: one for states in random_states for name, one in states.items()}
        return cls(learner.policy, tokenizer, pieces, gathered, random, record_of(learner, state, notes))

    def copied(self) -> ShardedSnapshot:
        """Return the same in memory of its own, which no step changes."""
        pieces = {
            kind: {name: one.copied() for name, one in named.items() if one.written_here}
            for kind, named in self.pieces.items()
        }
        gathered = {name: tensor.to("cpu", copy=True) for name, tensor in self.gathered.items()}
        return dataclasses.replace(self, pieces=pieces, gathered=gathered, record=self.record.model_copy(deep=True))

    def write_own(self, folder: Path, rank: int, num_ranks: int) -> list[Part]:
        """Write what this process has to a folder that exists; return what was written."""
        parts = (write_part(folder, kind, pieces, rank, num_ranks) for kind, pieces in self.pieces.items())
        return [part for part in parts if part]

    def write_rest(self, folder: Path, parts: Sequence[Part], num_ranks: int) -> None:
        """Write, in the main process, all that is not sharded."""
        self.policy.weights.write(folder, self.tokenizer, self.gathered)
        write_list(folder, parts, num_ranks)
        save_tensors(self.random, folder / RANDOM, unlike_pickle=True)
        write_record(folder, self.record)


def _optimizer_pieces(learner: Learner, kept: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Piece]:
    """Return what this process has of an optimizer's state, by the names of the weights."""
    named, pieces = trained_in_order(learner), {}
    for key, tensor in kept.items():
        index, _, kind = key.partition(".")
        name, weights = named[int(index)]
        pieces[f"{name}.{kind}"] = _piece_of_kept(weights, kind, tensor, is_main=is_main)
    return pieces


def _piece_of_kept(weights: Parameter, kind: str, kept: Tensor, *, is_main: bool) -> Piece:
    """Return what this process has of something that an optimizer keeps of a weight.

    An optimizer that steps on what is here of a weight knows nothing of the whole, and keeps a plain tensor of it.
    """
    if isinstance(kept, DTensor) or not isinstance(weights, DTensor):
        return Piece.of(kept, is_main=is_main)
    here = Piece.of(weights, is_main=is_main)
    if kind.endswith(SCALE):
        first, whole = (_blocks_before(weights, row) for row in (here.first, here.shape[0]))
        return Piece(kept, first, (whole,), tuple(kept.shape), here.written_here)
    if not is_by_rows(kind, kept.shape, here.rows):
        return Piece.of(kept, is_main=is_main)
    return Piece(kept, here.first, (here.shape[0], *kept.shape[1:]), tuple(kept.shape), here.written_here)


def _blocks_before(weights: DTensor, row: int) -> int:
    """Return how many blocks of moments there are before a row: those of every process begin anew."""
    ranks = math.prod(
        size for size, how in zip(weights.device_mesh.shape, weights.placements, strict=True) if isinstance(how, Shard)
    )
    each, of_row = -(-weights.shape[0] // ranks), math.prod(weights.shape[1:])
    return row // each * num_blocks(each * of_row) + num_blocks(row % each * of_row)
