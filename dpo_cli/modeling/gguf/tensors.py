"""The tensors of a GGUF file that a model becomes: their names, shapes and types, and their content one at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.pytorch_utils import Conv1D

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.folders.saved_weights import numbers_of, saved_state
from dpo_cli.modeling.folders.shard_files import gathered
from dpo_cli.modeling.gguf.architecture import Architecture
from dpo_cli.modeling.gguf.architectures import ARCHITECTURES
from dpo_cli.modeling.gguf.package import gguf_package
from dpo_cli.modeling.gguf.positions import written_positions
from dpo_cli.modeling.gguf.types import GgufType, check_range, check_rounding, chunks, rounded, type_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

_SUFFIXES = (".weight", ".bias")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Written:
    """A tensor of a file.

    Attributes:
        name: What the file calls it.
        shape: As the file holds it, rows last.
        kind: Its type.
        take: Returns its content, of which it keeps nothing.
    """

    name: str
    shape: tuple[int, ...]
    kind: GgufType
    take: Callable[[], Tensor]


class FileTensors:
    """What a GGUF file holds of a model.

    Args:
        model: The model.
        kind: The type of the file.

    Raises:
        UserError: A weight of the model has no place in the file.
    """

    def __init__(self, model: PreTrainedModel, kind: GgufType) -> None:
        self._model, self._kind = model, kind
        # As the model has them: experts that its own files keep apart are together in a GGUF file.
        self._weights = saved_state(model)
        self._names = _Names(model.config)
        self.architecture = architecture_of(model)
        self.tensors = list(self._planned())
        self._check()

    def _planned(self) -> Iterator[Written]:
        """Yield the tensors in the order of the file."""
        for name, weight in self._weights.items():
            sketch = torch.empty(weight.shape, device="meta")
            for file_name in self._names.of(name):
                change = self._change(file_name)
                shape = tuple(change(sketch).shape)
                yield Written(file_name, shape, type_of(file_name, shape, self._kind), self._taker(name, change))
        for name, table in written_positions(self._model.config)[1].items():
            yield Written(name, tuple(table.shape), "f32", lambda table=table: table)  # type: ignore[misc]

    def _change(self, file_name: str) -> Callable[[Tensor], Tensor]:
        """Return what is done to a weight for the file."""
        config = self._model.config
        for end, change in self.architecture.transforms.items():
            if file_name.endswith(end):
                return lambda weight: change(weight, config)
        return lambda weight: weight

    def _taker(self, name: str, change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: change(gathered(self._weights[name]).detach().cpu())

    def _check(self) -> None:
        """Check that each weight of the model is in the file, once."""
        counts = Counter(tensor.name for tensor in self.tensors)
        if twice := [name for name, count in counts.items() if count > 1]:
            what = f"two weights of the model are `{min(twice)}` in the file"
            raise UserError(what, self._model.name_or_path, "export the model without `--gguf`, and report this")


class _Names:
    """What a file calls the weights of a model."""

    def __init__(self, config: PretrainedConfig) -> None:
        gguf = gguf_package("writing", config.name_or_path)
        self._architecture, self._where = ARCHITECTURES[config.model_type], config.name_or_path
        known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(known[self._architecture.name], config.num_hidden_layers)

    def of(self, name: str) -> tuple[str, ...]:
        """Return the names in the file of what a weight becomes.

        Raises:
            UserError: The file has no place for it.
        """
        found = self.known(name)
        if not found:
            hint = "write a model folder instead: leave out `--gguf`"
            what = f"a GGUF file of the architecture `{self._architecture.name}` has no place for `{name}`"
            raise UserError(what, self._where, hint, status=FAILED)
        return found

    def known(self, name: str) -> tuple[str, ...]:
        """Return the names in the file, if there are any; some models' are known without their first part."""
        for end, called in self._architecture.names.items():
            if name.endswith(end) and (layer := _LAYER.search(name)):
                return tuple(f"blk.{layer[1]}.{one}" for one in called)
        found = (self._map.get_name(one, try_suffixes=_SUFFIXES) for one in (name, name.partition(".")[2]))
        return tuple(one for one in found if one)[:1]


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return how a file holds a model, which `gguf_problem` finds nothing wrong with."""
    return ARCHITECTURES[model.config.model_type]


@torch.no_grad()
def round_as_in_file(model: PreTrainedModel, kind: GgufType) -> bool:
    """Round every weight as a file of a type does, along the rows that it has there, and keep it in its dtype.

    Returns:
        Whether a weight is another then.

    Raises:
        UserError: The type cannot hold them, or they are others than rounding explains.
    """
    names, turned, changed = _Names(model.config), _turned(model), False
    for name, weight in numbers_of(model):
        # Rows of others would be copies.
        weight.data = weight.data.contiguous()
        rows = weight.data.T if name in turned else weight.data
        kept = type_of(next(iter(names.known(name)), name), rows.shape, kind)
        check_range(rows, kept, name)
        # In place, and little at a time: beside large weights there is no room for them once more.
        for piece in chunks(rows):
            read = rounded(piece, kept)
            check_rounding(piece, read, kept, name)
            changed = changed or not torch.equal(piece, read)
            piece.copy_(read)
    return changed


def _turned(model: nn.Module) -> set[str]:
    """Return the names of weights that the model keeps with a column for each output."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
