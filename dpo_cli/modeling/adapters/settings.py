"""The adapters, of which `Adapter` lists all: a few weights beside a model's own, which stay as they are.

This file is read with the configuration, before torch is needed: import torch and PEFT inside functions.
"""

from __future__ import annotations

import contextlib
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import AdapterFolder, read_adapter, read_start
from dpo_cli.settings import PathText, Settings, contradiction

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""Stands for every linear layer of the model but its vocabulary projection."""


class AdapterSettings(Settings):
    """What all adapters have in common."""

    start: PathText | None = None
    """An adapter to go on from, a folder of PEFT or a Hub id; the reference is the base with it; null: a fresh one."""

    @property
    def title(self) -> str:
        """What people call it, with what decides its size."""
        raise NotImplementedError

    @property
    def drops_out(self) -> bool:
        """Whether a training pass leaves something out by chance: the setting `dropout`, where an adapter has it."""
        return False

    def started_from(self) -> AdapterFolder | None:
        """Return what is known of the adapter that training goes on from.

        Raises:
            UserError: It cannot be used, or rank or alpha differ among its layers.
        """
        return read_start(self.start, "`adapter.start`") if self.start else None

    def layers(self, model: PreTrainedModel) -> PeftConfig:
        """Return how PEFT makes the layers of a model.

        Raises:
            UserError: The model has no layers that could have them.
        """
        raise NotImplementedError

    def on_paper(self) -> AbstractContextManager[None]:
        """Return the context in which PEFT makes the layers of a model without weights."""
        return contextlib.nullcontext()

    def refine(self, layer: BaseTunerLayer) -> None:
        """Change what is not exact of a layer that PEFT made, whose weights may be missing; by default nothing."""

    def settle(self, layer: BaseTunerLayer) -> None:
        """Settle what of a layer follows from the base's weights, if they came later; by default nothing does."""


class LoraLayers(AdapterSettings):
    """The layers of LoRA, whoever decides what they are like: of one adapter they compute the same to the bit."""

    def on_paper(self) -> AbstractContextManager[None]:
        """Return the context in which PEFT measures no norms."""
        from dpo_cli.modeling.adapters.lora_layers import norms_unmeasured

        return norms_unmeasured()

    def refine(self, layer: BaseTunerLayer) -> None:
        """Let DoRA begin as the base, and LoRA write less."""
        from dpo_cli.modeling.adapters.lora_layers import refine

        refine(layer)

    def settle(self, layer: BaseTunerLayer) -> None:
        """Let DoRA begin as the base, whose weights may be sharded over processes: all of them ask together."""
        from dpo_cli.modeling.adapters.lora_layers import settle_norms

        settle_norms(layer)


class Lora(LoraLayers):
    """Low-rank adaptation: beside a matrix W, scale · B A with the rank r of A and B; B is 0 before step 1.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    type: Literal["lora"] = "lora"
    """Which adapter."""
    rank: int = Field(16, ge=1)
    """r: the number of rows of A and of columns of B."""
    alpha: float = Field(32, gt=0)
    """The scale is alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The share of A's inputs that are left out in a training pass."""
    targets: str | list[str] = Field(ALL_LINEAR, min_length=1)
    """The layers: all-linear, which leaves the vocabulary projection out; a list of their names; or a regular
    expression that matches their whole names."""
    dora: bool = False
    """DoRA: the norm of each row of W + scale · B A trains apart from its direction. Source: Liu et al. 2024, arXiv
    2402.09353."""
    rslora: bool = False
    """rsLoRA: the scale is alpha / √r. Source: Kalajdzievski 2023, arXiv 2312.03732."""

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: str | list[str]) -> str | list[str]:
        if isinstance(targets, list) and not all(targets):
            raise contradiction("`adapter.targets` has an empty name", "remove it")
        if isinstance(targets, str) and targets != ALL_LINEAR:
            try:
                re.compile(targets)
            except re.error as error:
                what = f"`adapter.targets` is no regular expression: {error}"
                hint = f"set {ALL_LINEAR}, a list of names, or a pattern such as `.*_proj`"
                raise contradiction(what, hint) from None
        return targets

    @property
    def title(self) -> str:
        """What people call it: LoRA, rsLoRA or DoRA, and its rank."""
        kind = " with ".join(["DoRA"] * self.dora + ["rsLoRA"] * self.rslora) or "LoRA"
        return f"{kind} rank {self.rank}"

    @property
    def drops_out(self) -> bool:
        """Whether there is dropout."""
        return self.dropout > 0

    def layers(self, model: PreTrainedModel) -> PeftConfig:
        """Return PEFT's settings of LoRA for the targets that the model has."""
        from peft import LoraConfig

        from dpo_cli.modeling.adapters.fit import check_rank
        from dpo_cli.modeling.adapters.targets import stores_transposed, target_names

        if self.dora and _rounds_norms(model):
            what = "over a quantized base, PEFT takes DoRA's norms in a lower precision than it measures them in"
            hint = "set `model.dtype: float32`, or leave `adapter.dora` or `model.quantize` out"
            raise UserError(what, "`adapter.dora`", hint)
        names = target_names(model, self.targets)
        if self.start is None:
            check_rank(model, names, self.rank)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            use_dora=self.dora,
            use_rslora=self.rslora,
            fan_in_fan_out=stores_transposed(model, names),
        )


class Saved(LoraLayers):
    """An adapter as the folder says that it was saved in, whatever its rank and its layers: it is scored."""

    type: Literal["saved"] = "saved"
    """Which adapter."""

    def started_from(self) -> AdapterFolder:
        """Return what is known of it."""
        assert self.start is not None, "it is in a folder"
        return read_adapter(Path(self.start))

    def layers(self, model: PreTrainedModel) -> PeftConfig:
        """Return what PEFT saved of its settings, for the layers that the weights in the folder are of."""
        from peft import LoraConfig

        found = self.started_from()
        config = LoraConfig.from_pretrained(found.path)
        config.target_modules = set(found.layers)
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        config.init_lora_weights, config.inference_mode = True, False
        return config


Adapter = Lora
"""The closed union of all adapters, told apart by `type`."""


def is_named(layer: str, asked: str, *, pattern: bool) -> bool:
    """Tell whether a target is a layer's: a regular expression of its whole name, or the last parts of it."""
    return bool(re.fullmatch(asked, layer)) if pattern else f".{layer}".endswith(f".{asked}")


def _rounds_norms(model: PreTrainedModel) -> bool:
    """Tell whether a fresh DoRA would not answer as its base: one of few bits that is computed with in 16."""
    few = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    return few and model.dtype.itemsize < 4


def layer_settings(adapter: AdapterSettings) -> dict[str, Any]:
    """Return what decides the layers of an adapter and what they compute, where it came from and dropout aside."""
    return adapter.model_dump(mode="json", exclude={"start", "dropout"})
