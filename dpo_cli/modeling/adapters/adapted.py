"""A model with an adapter: what is added trains, and the base stays as it is.

PEFT makes the layers inside the model, so that whatever calls the model calls them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from dpo_cli.modeling.adapters.fit import adapter_weights, check_head, check_layers, check_targets
from dpo_cli.modeling.adapters.settings import ALL_LINEAR, Adapter, Saved, layer_settings
from dpo_cli.modeling.adapters.targets import left_out
from dpo_cli.modeling.digests import tensors_digest, weights_digest
from dpo_cli.modeling.extras import import_bitsandbytes
from dpo_cli.modeling.folders.saved_weights import other_bytes
from dpo_cli.modeling.folders.saving import write_json, write_tokenizer
from dpo_cli.modeling.folders.shard_files import gathered
from dpo_cli.modeling.folders.streams import save_tensors
from dpo_cli.modeling.shards import is_placeholder
from dpo_cli.modeling.split import set_whole_value, whole_value
from dpo_cli.modeling.weights import START_ADAPTER, MovedWeights
from dpo_cli.system.text import several

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.modeling.folders.weight_types import WeightTypes


class AdapterWeights(MovedWeights):
    """The weights of an adapter, which train and are saved; the model that it is in has those of its base as well.

    Args:
        model: The model.
        chosen: What put the adapter there.
    """

    def __init__(self, model: PreTrainedModel, chosen: Adapted) -> None:
        super().__init__(model)
        self._adapter, self._base = chosen.adapter, chosen.base

    @property
    def described(self) -> str:
        """What trains, in a few words."""
        layers = list(adapter_layers(self.model))
        others = left_out(self.model, layers) if getattr(self._adapter, "targets", None) == ALL_LINEAR else []
        return f"{self._adapter.title} on {several(len(layers), 'layer')}" + (
            f", not on {', '.join(others)}" if others else ""
        )

    def moved(self) -> dict[str, Parameter]:
        """Return by name what training moves, whether it takes gradients now or not."""
        base_name = self.own_name()
        return {name: parameter for name, parameter in self.model.named_parameters() if base_name(name) is None}

    def digests(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        """Return a digest of each part of what answers now, as if the base was held in a dtype.

        A fresh adapter is no part.
        """
        base = {"model": weights_digest(self.model, self.own_name(), dtype)}
        if not self._adapter.start:
            return base
        return base | {START_ADAPTER: tensors_digest(layer_settings(self._adapter), self.state())}

    def own_name(self) -> Callable[[str], str | None]:
        """Return a function from the name of a weight to its name in the base, or to None: it is the adapter's."""
        layers = adapter_layers(self.model)

        def base_name(name: str) -> str | None:
            *path, last = name.split(".")
            for end in range(1, len(path) + 1):
                if ".".join(path[:end]) in layers:
                    inner = [*path[end:], last]
                    return ".".join([*path[:end], *inner[1:]]) if inner[0] == "base_layer" else None
            return name

        return base_name

    def settle(self) -> None:
        """Settle what follows from the base's weights, which came into the model after the adapter."""
        if not self._adapter.start:
            for layer in adapter_layers(self.model).values():
                self._adapter.settle(layer)

    def beginning_bytes(self) -> int:
        """Return what it takes to answer as before step 1: a second adapter where training goes on from one."""
        return sum(weights.nbytes for weights in self.moved().values()) if self._adapter.start else 0

    def keep_beginning(self) -> bool:
        """Keep what it takes to answer as now inside `at_beginning`; tell whether that is a copy of the whole model."""
        return bool(self._adapter.start)

    @contextlib.contextmanager
    def at_beginning(self) -> Iterator[None]:
        """Let a fresh adapter have no effect; of one that was gone on from, a copy answers."""
        layers = [] if self._adapter.start else list(adapter_layers(self.model).values())
        # PEFT's own switch would let the weights train no longer.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @contextlib.contextmanager
    def training_pass(self) -> Iterator[None]:
        """Switch dropout on for a pass with gradient, and off again."""
        # Some ask the layer itself whether it trains. What is in the base layer has no dropout.
        modules = [
            module
            for layer in adapter_layers(self.model).values()
            for name, module in layer.named_modules()
            if name.partition(".")[0] != "base_layer"
        ]
        for module in modules:
            module.training = True
        try:
            yield
        finally:
            for module in modules:
                module.training = False

    def state(self) -> dict[str, Tensor]:
        """Return the adapter's weights under the names that PEFT saves them by.

        They are few: those that are sharded over processes are gathered, and each has to ask at the same time.
        """
        return {name: gathered(weights) for name, weights in self._saved().items()}

    def sharded_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what each process saves its rows of: nothing, and what is gathered: `state`."""
        return {}, self.state()

    def write(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        state: Mapping[str, Tensor] | None = None,
        types: WeightTypes | None = None,
        largest_bytes: int | None = None,
    ) -> None:
        """Write the adapter, in float32 and one file, as a folder that PEFT reads, with the tokenizer beside it.

        Args:
            folder: A folder that exists.
            tokenizer: Written beside the weights.
            state: What `state` returned, where the weights may have changed since.
            types: Of whole models alone.
            largest_bytes: Of whole models alone.
        """
        state = self.state() if state is None else state
        save_tensors(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        said = self.model.peft_config["default"].to_dict()
        said |= {"base_model_name_or_path": _named(self._base or self.model.name_or_path), "inference_mode": True}
        # PEFT keeps names in sets, whose order is another in every process.
        said = {name: sorted(value) if isinstance(value, set) else value for name, value in said.items()}
        write_json(folder / ADAPTER_CONFIG, said)
        write_tokenizer(folder, self.model, tokenizer)

    def attend_writing(self, state: Mapping[str, Tensor], types: WeightTypes | None = None) -> None:
        """Take part while the main process writes what `state` has gathered: nothing is left to do."""

    def check_written(
        self, folder: Path, state: Mapping[str, Tensor] | None = None, types: WeightTypes | None = None
    ) -> None:
        """Compare the weights in a folder, tensor by tensor, with those that `write` was given.

        Raises:
            UserError: The disk did not keep them.
        """
        written = load_file(folder / ADAPTER_WEIGHTS)
        for name, weights in (self.state() if state is None else state).items():
            if not torch.equal(written[name], weights.cpu()):
                raise other_bytes(name, folder)

    def restore(self, folder: Path) -> None:
        """Replace the adapter's weights by those that `write` wrote into a folder.

        Raises:
            UserError: They are another adapter's.
        """
        self.take_over(load_file(folder / ADAPTER_WEIGHTS), folder)

    @torch.no_grad()
    def take_over(self, theirs: dict[str, Tensor], folder: Path) -> None:
        """Replace the adapter's weights by those that were read from a folder.

        Raises:
            UserError: They are another adapter's.
        """
        ours = self._saved()
        differing = sorted(theirs.keys() ^ ours.keys()) or [n for n in ours if theirs[n].shape != ours[n].shape]
        if differing:
            what = f"the adapter does not fit: `{differing[0]}` is not in both, or has another shape"
            raise UserError(what, str(folder), "choose an adapter of the same base with the same settings")
        for name, weights in ours.items():
            set_whole_value(weights, theirs[name])

    def prove_saving(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Prove, before hours go into it, that the adapter can be saved and read again; return a line that says so.

        Raises:
            UserError: Something fails.
        """
        # One process proves it, without the others: of weights that are sharded it takes those that it has.
        state = {name: whole_value(weights) for name, weights in self._saved().items()}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            try:
                self.write(folder, tokenizer, state)
                type(tokenizer).from_pretrained(folder)
            except OSError as error:
                raise from_os_error(error, "trying to save the adapter", scratch) from error
            self.check_written(folder, state)
        return "the adapter can be saved and read again"

    def _saved(self) -> dict[str, Tensor]:
        """Return the adapter's weights under the names that PEFT saves them by, as they are held."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {f"{PREFIX}{name}": weights.detach() for name, weights in sorted(found.items())}


@dataclass(frozen=True)
class Adapted:
    """Train an adapter; the model's own weights stay as they are.

    Attributes:
        adapter: Its settings.
        seed: What its first weights are drawn with.
        base: How the model is named, which is written with the adapter; empty: as it names itself.
    """

    adapter: Adapter | Saved
    seed: int = 0
    base: str = ""

    def choose(self, model: PreTrainedModel) -> AdapterWeights:
        """Put the adapter into the model; of one to go on from, with the weights that it has.

        Raises:
            UserError: The model has no layers for it; or the one to go on from does not fit.
        """
        import_bitsandbytes()
        from peft import inject_adapter_in_model

        first, start = next(model.parameters()), self.adapter.started_from()
        on_paper = first.device.type == "meta"
        open_yet = on_paper or is_placeholder(first)
        if start:
            check_layers(model, start)
            check_head(model, start)
        layers = self.adapter.layers(model)
        if start:
            check_targets(start, layers.target_modules)
        # PEFT draws on the CPU, wherever the model is.
        with torch.random.fork_rng(devices=[]), self.adapter.on_paper() if open_yet else contextlib.nullcontext():
            torch.default_generator.manual_seed(self.seed)
            model.requires_grad_(False)
            inject_adapter_in_model(layers, model, low_cpu_mem_usage=on_paper)
        chosen = AdapterWeights(model, self)
        for weights in chosen.moved().values():
            # PEFT gives them the dtype of the base, in which small steps are lost.
            weights.data = weights.data.float()
        for layer in adapter_layers(model).values():
            self.adapter.refine(layer)
        model.eval()
        if start and not on_paper:
            chosen.take_over(adapter_weights(start), start.path)
        return chosen

    def fresh(self) -> Adapted:
        """Return the same where no weights are to go on from."""
        return replace(self, adapter=self.adapter.model_copy(update={"start": None}))


def adapter_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Return the layers that PEFT made, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def above_full_rank(model: PreTrainedModel) -> dict[str, int]:
    """Return the last parts of the names of layers whose matrix has fewer rows or columns than an adapter's rank.

    Each with that number, the smallest of all layers of its name.
    """
    found: dict[str, int] = {}
    for name, layer in adapter_layers(model).items():
        side = min(layer.in_features, layer.out_features)
        if any(rank > side for rank in layer.r.values()):
            last = name.rpartition(".")[2]
            found[last] = min(side, found.get(last, side))
    return found


@torch.no_grad()
def merge_layers(model: PreTrainedModel) -> None:
    """Add what an adapter does to the weights beside it, in the dtype that they have, and take the adapter out."""
    for name, layer in adapter_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _named(name: str) -> str:
    """Return how a model is named from anywhere: a folder by its whole path."""
    return str(Path(name).absolute()) if Path(name).exists() else name
