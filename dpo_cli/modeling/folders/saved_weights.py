"""A model's weights under the names and in the shapes that its files have, one at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.folders.model_files import weights_files
from dpo_cli.modeling.folders.shard_files import gathered
from dpo_cli.modeling.folders.streams import in_order, save_tensors
from dpo_cli.modeling.split import state_of, whole_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dpo_cli.modeling.folders.weight_types import WeightTypes

_FILE, _INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
"""The names of the files, as transformers chooses them."""

LARGEST_BYTES = 5 * 10**9
"""The largest file of weights, unless it has a single one."""


def saved_state(model: PreTrainedModel, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what is saved of a model's weights, tied ones once.

    Args:
        model: The model.
        held: Its weights as `state_dict` names them; None: as they are now.
    """
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    return {
        name: tensor for name, tensor in (state_of(model) if held is None else held).items() if name not in left_out
    }


class SavedWeights:
    """What is saved of a model's weights, of which each is made when it is asked for.

    transformers makes all at once, which for experts that its files keep apart is a second copy of them.

    Args:
        model: The model.
        weights: Its weights as `state_dict` names them; None: as they are now.
        types: What they are rounded to; None: they are saved as they are held.
        largest_bytes: The most bytes of a file, unless it has a single weight; None: `LARGEST_BYTES`.

    Attributes:
        sketch: What is saved, by name, without content.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor] | None = None,
        types: WeightTypes | None = None,
        largest_bytes: int | None = None,
    ) -> None:
        self._model, self._held = model, saved_state(model, weights)
        self._largest_bytes = largest_bytes or LARGEST_BYTES
        sketch = {
            name: torch.empty(tensor.shape, dtype=whole_dtype(tensor), device="meta")
            for name, tensor in self._held.items()
        }
        made: dict[str, Tensor] = revert_weight_conversion(model, dict(sketch))
        self._sources = _sources(model, sketch, made)
        self.sketch = {
            name: tensor.to(types[name]) if types and tensor.is_floating_point() else tensor
            for name, tensor in made.items()
        }
        self._made: dict[str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the settings name: that of the first weight that is no whole number."""
        held = (
            whole_dtype(one) for one in (*self.sketch.values(), *self._model.parameters()) if one.is_floating_point()
        )
        return next(held, self._model.dtype)

    def types_held(self, types: WeightTypes) -> WeightTypes:
        """Return the types of the model's own weights, of which those are made that are saved in some types."""
        kinds: dict[str, set[torch.dtype]] = {}
        for name, sources in self._sources.items():
            for source in sources:
                kinds.setdefault(source, set()).add(types[name])
        return replace(types, named={name: kind.pop() for name, kind in kinds.items() if len(kind) == 1})

    def take(self, name: str) -> Tensor:
        """Return what is saved under a name, with its content, as it is held; each is to be taken once.

        Where weights are sharded over processes, all of them have to take the same ones in the same order.
        """
        if name not in self._made:
            sources = {source: gathered(self._held[source]) for source in self._sources[name]}
            self._made |= revert_weight_conversion(self._model, sources)
        return self._made.pop(name)

    def write(self, folder: Path) -> None:
        """Write all into a folder, as transformers does: into one file, or into several with an index."""
        if not self.sketch:
            return
        split = self._split()
        for file, names in split.filename_to_tensors.items():
            save_tensors({name: self.sketch[name] for name in names}, folder / file, self.take, {"format": "pt"})
        if split.is_sharded:
            about = {"total_parameters": self._model.num_parameters(), **split.metadata}
            index = {"metadata": about, "weight_map": split.tensor_to_filename}
            (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def attend(self) -> None:
        """Take part while another process writes all, or compares it with what is written."""
        for name in self._in_order():
            self.take(name)

    def check(self, folder: Path) -> None:
        """Compare what is in a folder, tensor by tensor, with what is in memory.

        Raises:
            UserError: The disk did not keep it.
        """
        with contextlib.ExitStack() as stack:
            # A mapped file would be in memory as a whole in the end.
            files = [
                stack.enter_context(safe_open(file, framework="pt", backend="pread")) for file in weights_files(folder)
            ]
            holding = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
            if differing := holding.keys() ^ self.sketch.keys():
                raise other_bytes(min(differing), folder)
            for name in self._in_order():
                held = self.take(name).to(self.sketch[name].dtype)
                if not torch.equal(holding[name].get_tensor(name), held.cpu()):
                    raise other_bytes(name, folder)

    def _split(self) -> StateDictSplit:
        """Part what is saved among files."""
        most = self._largest_bytes
        return split_torch_state_dict_into_shards(self.sketch, filename_pattern=_FILE, max_shard_size=most)

    def _in_order(self) -> Iterator[str]:
        """Yield the names in the order in which they are written."""
        for names in self._split().filename_to_tensors.values():
            yield from in_order({name: self.sketch[name] for name in names})


def round_as_saved(model: PreTrainedModel, types: WeightTypes) -> bool:
    """Round every weight of a model as it is if it is saved in its type, and keep it in the dtype that it has.

    Returns:
        Whether a weight is another then.
    """
    held, changed = SavedWeights(model).types_held(types), False
    for name, weights in numbers_of(model):
        rounded = weights.data.to(held[name]).to(weights.dtype)
        changed = changed or not torch.equal(rounded, weights.data)
        weights.data = rounded
    return changed


def numbers_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what of a model can be rounded, by its first name: parameters and buffers of floats, tied ones once."""
    seen: set[int] = set()
    for name, weights in model.state_dict(keep_vars=True).items():
        if weights.is_floating_point() and id(weights) not in seen:
            seen.add(id(weights))
            yield name, weights


def other_bytes(name: str, folder: Path) -> UserError:
    """Say that a weight in a folder is not the one in memory."""
    hint = "check the disk, then `--resume`: the last checkpoint is intact"
    return UserError(f"`{name}` was not saved as it is in memory", str(folder.parent), hint, status=FAILED)


def _sources(
    model: PreTrainedModel, sketch: Mapping[str, Tensor], made: Mapping[str, Tensor]
) -> dict[str, tuple[str, ...]]:
    """Return of what weights each that is saved is made: of one, or of all that are not saved by themselves."""
    if made.keys() == sketch.keys():
        return {name: (name,) for name in made}
    sources: dict[str, tuple[str, ...]] = {}
    for name, tensor in sketch.items():
        try:
            alone = revert_weight_conversion(model, {name: tensor})
        except Exception:
            # Whatever the operations raise for a part of what they put together.
            continue
        if all(other in made and made[other].shape == one.shape for other, one in alone.items()):
            sources |= dict.fromkeys(alone, (name,))
    apart = {name for (name,) in sources.values()}
    together = tuple(name for name in sketch if name not in apart)
    return {name: sources.get(name, together) for name in made}
