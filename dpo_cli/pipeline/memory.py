"""Whether a run fits into memory at all, known from its model's settings before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator
from transformers import PreTrainedModel

from dpo_cli.config import Config
from dpo_cli.errors import UserError
from dpo_cli.modeling.memory import MemoryEstimate, free_bytes
from dpo_cli.preference.reference import Cached
from dpo_cli.reporting.console import gib
from dpo_cli.training.optimizer import Adafactor


def without_passes(
    config: Config, model: PreTrainedModel, accelerator: Accelerator, program_bytes: int
) -> MemoryEstimate:
    """Estimate what a run takes whatever its pairs are: without activations and logits."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    on_cpu = accelerator.device.type == "cpu"
    state = config.training.optimizer.state_bytes(model)
    saved = weights + state + (weights if config.reference.type == "synced" else 0)
    return MemoryEstimate(
        program=program_bytes if on_cpu else 0,
        weights=weights,
        reference=weights if config.reference.holds_model else 0,
        optimizer=state,
        gradients=sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        activations=0,
        counted=False,
        logits=0,
        copy=saved if on_cpu and config.checkpoints.background else 0,
        several=False,
    )


def check_memory(config: Config, model: PreTrainedModel, accelerator: Accelerator, program_bytes: int) -> None:
    """Refuse a run that cannot fit into memory, whatever its pairs are, before anything is loaded.

    Args:
        config: Says what is held beside the weights.
        model: The policy; its weights may be missing.
        accelerator: Knows the device, and how many ranks share it.
        program_bytes: What the process holds already.

    Raises:
        UserError: It does not fit; it names the parts, and what would fit.
    """

    def needed(config: Config) -> tuple[int, dict[str, int]]:
        memory = without_passes(config, model, accelerator, program_bytes)
        return memory.peak - memory.program, {name: size for name, size in memory.parts().items() if size}

    free = free_bytes(accelerator.device)
    if accelerator.device.type == "cpu":
        free //= accelerator.num_processes
    least, parts = needed(config)
    if least <= free:
        return
    where = f"`model.name: {config.model.name}`"
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if name != "program and libraries")
    what = f"training takes at least {gib(least)} of memory, and {gib(free)} are free ({shown})"
    settings, smaller = [], config
    for setting, smaller in _smaller(config):
        settings.append(f"`{setting}`")
        if needed(smaller)[0] <= free:
            raise UserError(what, where, f"set {' and '.join(settings)}")
    most = model.num_parameters() * free / needed(smaller)[0] / 1e9
    under = f" (under {' and '.join(settings)})" if settings else ""
    hint = f"choose a model of at most {most:.2g} billion parameters{under}, or a machine with more memory"
    raise UserError(what, where, hint)


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield settings that take less memory, each with the configuration that has it and all before."""
    if config.checkpoints.background:
        config = config.model_copy(update={"checkpoints": config.checkpoints.model_copy(update={"background": False})})
        yield "checkpoints.background: false", config
    if config.reference.holds_model:
        config = config.model_copy(update={"reference": Cached(model=config.reference.model)})
        yield "reference.type: cached", config
    if config.training.optimizer.type != "adafactor":
        training = config.training.model_copy(update={"optimizer": Adafactor()})
        yield "training.optimizer: adafactor", config.model_copy(update={"training": training})
