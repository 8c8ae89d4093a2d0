"""A model's weights under the names and in the shapes that its files have, one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.folders.model_files import weights_files
from dpo_cli.modeling.folders.streams import save_tensors
from dpo_cli.modeling.split import state_of, whole_dtype, whole_value

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dpo_cli.modeling.folders.weight_types import WeightTypes

_FILE, _INDEX, _LARGEST = "model{suffix}.safetensors", "model.safetensors.index.json", "50GB"
"""The names and the size of the files, as transformers chooses them."""


class SavedWeights:
    """What is saved of a model's weights, of which each is made when it is asked for.

    transformers makes all at once, which for experts that its files keep apart is a second copy of them.

    Args:
        model: The model.
        weights: Its weights as `state_dict` names them; None: as they are now.
        types: What they are rounded to; None: they are saved as they are held.

    Attributes:
        sketch: What is saved, by name, without content.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor] | None = None,
        types: WeightTypes | None = None,
    ) -> None:
        left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        held = state_of(model) if weights is None else weights
        self._model = model
        self._held = {name: tensor for name, tensor in held.items() if name not in left_out}
        sketch = {
            name: torch.empty_like(tensor, dtype=whole_dtype(tensor), device="meta")
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
        return next((one.dtype for one in self.sketch.values() if one.is_floating_point()), self._model.dtype)

    def take(self, name: str) -> Tensor:
        """Return what is saved under a name, with its content, as it is held; each is to be taken once."""
        if name not in self._made:
            sources = {source: whole_value(self._held[source]) for source in self._sources[name]}
            self._made |= revert_weight_conversion(self._model, sources)
        return self._made.pop(name)

    def write(self, folder: Path) -> None:
        """Write all into a folder, as transformers does: into one file, or into several with an index."""
        split = split_torch_state_dict_into_shards(self.sketch, filename_pattern=_FILE, max_shard_size=_LARGEST)
        for file, names in split.filename_to_tensors.items():
            save_tensors({name: self.sketch[name] for name in names}, folder / file, self.take, {"format": "pt"})
        if split.is_sharded:
            about = {"total_parameters": self._model.num_parameters(), **split.metadata}
            index = {"metadata": about, "weight_map": split.tensor_to_filename}
            (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Compare what is in a folder, tensor by tensor, with what is in memory.

        Raises:
            UserError: The disk did not keep it.
        """
        left = set(self.sketch)
        for file in weights_files(folder):
            # A mapped file would be in memory as a whole in the end.
            with safe_open(file, framework="pt", backend="pread") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                    left.remove(name)
                    held = self.take(name).to(self.sketch[name].dtype)
                    if not torch.equal(opened.get_tensor(name), held.cpu()):
                        raise other_bytes(name, folder)
        if left:
            raise other_bytes(min(left), folder)


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
