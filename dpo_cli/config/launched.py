"""What launchers and the configuration both say of a run: one is taken over by the other, or they contradict."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

from packaging.version import Version

from dpo_cli.config.schema import Config
from dpo_cli.errors import UserError
from dpo_cli.system.fsdp_configuration import FsdpConfiguration, fsdp_configuration
from dpo_cli.system.launchers import num_ranks

_SHARDS_BITS = Version("2.12")
"""The first torch that shards parameters of whole numbers, in which quantized weights are held."""


def taken_over(config: Config) -> tuple[Config, list[str]]:
    """Return a configuration with what `accelerate launch` is configured for and it leaves open; say so in lines."""
    lines: list[str] = []
    if (fsdp := fsdp_configuration()) is not None:
        asked = _asked(fsdp)
        groups = {"training": config.training, "model": config.model}
        for name, value in asked.items():
            group, field = name.split(".")
            if field not in groups[group].model_fields_set or getattr(groups[group], field) == "auto":
                groups[group] = groups[group].model_copy(update={field: value})
        config = config.model_copy(update=groups)
        shown = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in asked.items())
        lines.append(f"taken over from Accelerate's FSDP configuration: {shown}")
        if fsdp.without_effect:
            lines.append(f"without effect in Accelerate's FSDP configuration: {', '.join(fsdp.without_effect)}")
    if config.training.sharding != "none" and num_ranks() == 1:
        lines.append(f"`training.sharding: {config.training.sharding}` has no effect: this is one process")
    return config, lines


def launch_errors(config: Config) -> Iterator[UserError]:
    """Yield where the configuration contradicts Accelerate's, or asks for shards that these processes cannot have."""
    if (fsdp := fsdp_configuration()) is not None:
        for name, value in _asked(fsdp).items():
            group, field = name.split(".")
            if (ours := getattr(getattr(config, group), field)) != value:
                asks, has = f"{name}: {str(value).lower()}", f"{name}: {str(ours).lower()}"
                what = f"Accelerate's FSDP configuration asks for `{asks}`, and the configuration says `{has}`"
                yield UserError(
                    what, config.where(name), f"leave `{name}` out, or change the one of `accelerate launch`"
                )
    here = os.environ.get("LOCAL_WORLD_SIZE")
    yield from sharding_errors(config, num_ranks(), None if here is None else int(here))


def sharding_errors(config: Config, size: int, here: int | None) -> Iterator[UserError]:
    """Yield why a number of processes cannot have the shards that the configuration asks for.

    Args:
        config: What to do.
        size: How many processes there are.
        here: How many of them each machine has; None: that is not known.
    """
    if config.training.sharding == "none" or size == 1:
        return
    if config.training.sharding == "hybrid":
        yield from _hybrid_errors(config.where("training.sharding"), size, here)
    optimizer = config.training.optimizer.type
    if not config.training.optimizer.on_shards:
        what = f"`training.optimizer: {optimizer}` cannot step on shards of a weight"
        where = config.where("training.optimizer.type", "training.optimizer", "training.sharding")
        yield UserError(what, where, "choose another, such as adamw; or set `training.sharding: none`")
    if config.model.quantize and Version(torch := importlib.metadata.version("torch")) < _SHARDS_BITS:
        what = f"torch {torch} cannot shard quantized weights; {_SHARDS_BITS} or newer can"
        where = config.where("model.quantize", "training.sharding")
        yield UserError(what, where, "update torch, or set `training.sharding: none`")


def _asked(fsdp: FsdpConfiguration) -> dict[str, Any]:
    """Return the settings that Accelerate's FSDP configuration decides, by dotted name."""
    asked: dict[str, Any] = {"training.sharding": fsdp.sharding}
    if fsdp.recomputes:
        asked["training.gradient_checkpointing"] = True
    if fsdp.dtype:
        asked["model.dtype"] = fsdp.dtype
    return asked


def _hybrid_errors(where: str, size: int, here: int | None) -> Iterator[UserError]:
    """Yield why weights cannot be sharded within machines and replicated between them."""
    if here is None:
        hint = "set it in every process: torchrun does; for srun, `export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE`"
        yield UserError("LOCAL_WORLD_SIZE, the number of processes of this machine, is not set", where, hint)
    elif here == size:
        what = f"all {size} processes are on one machine: there are no others between which weights are replicated"
        yield UserError(what, where, "set `training.sharding: full`")
    elif here == 1:
        what = "there is one process per machine: within a machine there is nothing to shard between"
        yield UserError(what, where, "set `training.sharding: full`, or start a process per GPU")
    elif size % here:
        what = f"{size} processes do not divide into machines of {here}"
        yield UserError(what, where, "start the same number of processes on every machine")
