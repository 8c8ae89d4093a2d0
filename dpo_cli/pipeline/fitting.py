"""What a run that does not fit into memory is refused with: its parts, and the settings under which it would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dpo_cli.config import Config
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.memory import MemoryEstimate
from dpo_cli.preference.reference import Cached
from dpo_cli.reporting.console import gib
from dpo_cli.training.optimizer import Adafactor, AdamW8bit

Needed = Callable[[Config], MemoryEstimate]
"""Estimates what a run takes at least under other settings; raises a `UserError` where its model cannot have them."""


def refusal(
    config: Config, needed: Needed, free: int, numbers: int, further: Sequence[str] = (), *, on_gpu: bool = False
) -> UserError:
    """Return the error of a run that cannot fit, with the settings that would fit.

    Args:
        config: What was asked for.
        needed: Estimates what it takes.
        free: The memory that is free, in bytes.
        numbers: How many weights the model has.
        further: What else takes less memory, in words.
        on_gpu: Whether it is a GPU's memory, beside which there is the host's.
    """
    least = needed(config)
    where, what = f"`model.name: {config.model.name}`", f"training needs at least {gib(least.peak)} of memory"
    what = "\n".join([f"{what}, but {gib(free)} are free:", *table(least)])
    fitting, smallest = [], {config.adapter is None: ("", least.peak)}
    for settings, smaller in _smaller(config, on_gpu=on_gpu):
        for named, tried in _with_recomputation(settings, smaller):
            try:
                peak = needed(tried).peak
            except UserError:
                # It has no layers that an adapter or few bits could be put to.
                break
            if peak < smallest.get(tried.adapter is None, ("", peak + 1))[1]:
                smallest[tried.adapter is None] = (_listed(named), peak)
            if peak <= free:
                fitting.append(f"{_listed(named)} ({gib(peak)})")
                break
    if fitting:
        return UserError(what, where, ", or ".join([f"set {fitting[0]}", *fitting[1:], *further]))
    sizes = [
        f"{numbers * free / peak / 1e9:.2g} billion parameters" + f" (under {settings})" * bool(settings)
        for settings, peak in smallest.values()
    ]
    others = ", or ".join([*further, "a machine with more memory"])
    return UserError(what, where, f"choose a model of at most {', or '.join(sizes)}, or {others}")


def table(memory: MemoryEstimate) -> list[str]:
    """Return the parts of an estimate as aligned lines, with the peak at the end."""
    parts = {name: gib(size) for name, size in memory.parts().items() if size}
    rows = {**parts, "at the peak": gib(memory.peak)}
    width, digits = max(map(len, rows)), max(map(len, rows.values()))
    return [f"  {name:<{width}}  {size:>{digits}}" for name, size in rows.items()]


def _with_recomputation(settings: Sequence[str], config: Config) -> Iterator[tuple[Sequence[str], Config]]:
    """Yield settings as they are, and with activations computed again."""
    if settings:
        yield settings, config
    if not config.training.gradient_checkpointing:
        recomputed = _with_training(config, gradient_checkpointing=True)
        yield [*settings, "`training.gradient_checkpointing: true`"], recomputed


def _smaller(config: Config, *, on_gpu: bool) -> Iterator[tuple[Sequence[str], Config]]:
    """Yield settings that take less memory, in the order of what they cost, with the configuration that has them."""
    settings: list[str] = []
    lighter = config
    yield settings, lighter
    if config.checkpoints.background:
        saving = config.checkpoints.model_copy(update={"background": False})
        settings, lighter = ["`checkpoints.background: false`"], config.model_copy(update={"checkpoints": saving})
        yield settings, lighter
    if config.reference.holds_model:
        lighter = lighter.model_copy(update={"reference": Cached(model=config.reference.model)})
        settings = [*settings, "`reference.type: cached`"]
        yield settings, lighter
    if config.adapter is None:
        yield from ((settings + changed, smaller) for changed, smaller in _lighter_optimizers(lighter, on_gpu=on_gpu))
        if missing_package("peft", "adapters", ""):
            return
        # Of an adapter, neither a reference nor a copy of its state takes much.
        settings, lighter = ["`adapter: lora`"], config.model_copy(update={"adapter": Lora()})
        if config.model.weights == "split":
            settings, lighter = [*settings, "`model.weights: auto`"], _with_model(lighter, weights="auto")
        yield settings, lighter
    few = lighter.model.quantize is None and lighter.model.weights == "auto"
    if few and not missing_package("bitsandbytes", "quantize", ""):
        yield [*settings, "`model.quantize: nf4`"], _with_model(lighter, quantize="nf4")


def _lighter_optimizers(config: Config, *, on_gpu: bool) -> Iterator[tuple[list[str], Config]]:
    """Yield ways to keep less of each weight on the device where all weights train, or other optimizers."""
    if not on_gpu or config.training.offload is not None:
        yield from _other_optimizers(config)
        return
    on_host, settings = _with_training(config, offload="optimizer"), ["`training.offload: optimizer`"]
    yield settings, on_host
    yield from _other_optimizers(config)
    yield from ((settings + others, smaller) for others, smaller in _other_optimizers(on_host))


def _other_optimizers(config: Config) -> Iterator[tuple[list[str], Config]]:
    """Yield optimizers that keep less of each weight, all of which train."""
    kind = config.training.optimizer.type
    if kind != "adafactor":
        yield ["`training.optimizer: adafactor`"], _with_training(config, optimizer=Adafactor())
    if kind == "adamw_8bit" or missing_package("bitsandbytes", "quantize", ""):
        return
    smaller, settings = _with_training(config, optimizer=AdamW8bit()), ["`training.optimizer: adamw_8bit`"]
    yield settings, smaller
    if config.model.weights != "split" and config.model.dtype in ("auto", "bfloat16"):
        yield ["`model.weights: split`", *settings], _with_model(smaller, weights="split")


def _with_training(config: Config, **settings: object) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=settings)})


def _with_model(config: Config, **settings: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})


def _listed(settings: Sequence[str]) -> str:
    return " and ".join(settings)
