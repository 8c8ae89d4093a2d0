"""What a run that does not fit into memory is refused with: its parts, and the settings under which it would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_cli.config import Config
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.memory import MemoryEstimate
from dpo_cli.preference.reference import Cached
from dpo_cli.reporting.console import gib
from dpo_cli.system.assumed_devices import AssumedDevices
from dpo_cli.system.text import several
from dpo_cli.training.optimizer import Adafactor, AdamW8bit

if TYPE_CHECKING:
    from dpo_cli.pipeline.session import Session

Needed = Callable[["Session"], MemoryEstimate]
"""Estimates what a process takes at least in another session; raises a `UserError` where its model cannot have that."""

_Settings = Sequence[str]

_MANY_MACHINES = 64
"""The most machines that are thought of."""

_PER_MACHINE = 8
"""How many GPUs a machine is thought to have."""


def refusal(session: Session, needed: Needed, free: int, numbers: int, further: Sequence[str] = ()) -> UserError:
    """Return the error of a run that cannot fit, with the settings that would fit.

    Args:
        session: What was asked for.
        needed: Estimates what it takes.
        free: The memory that is free for each process, in bytes.
        numbers: How many weights the model has.
        further: What else takes less memory, in words.
    """
    config, least = session.config, needed(session)
    each = " on each GPU" if session.shards and _on_gpu(session) else " in each process" if session.shards else ""
    where, what = f"`model.name: {config.model.name}`", f"training needs at least {gib(least.peak)} of memory{each}"
    what = "\n".join([f"{what}, but {gib(free)} are free:", *table(least)])
    smallest = {config.adapter is None: ("", least.peak)}
    fitting = list(_in_shards(session, needed, free))
    enough = bool(fitting)
    for settings, smaller in _smaller(config, on_gpu=_on_gpu(session)):
        for named, tried in _with_recomputation(settings, smaller):
            if session.shards and not _can_be_sharded(tried):
                break
            try:
                peak = needed(session.under(tried)).peak
            except UserError:
                # It has no layers that an adapter or few bits could be put to.
                break
            if peak < smallest.get(tried.adapter is None, ("", peak + 1))[1]:
                smallest[tried.adapter is None] = (_listed(named), peak)
            if peak <= free:
                # Settings that add nothing to others are not named: of a GPU's weights, `split` is what `auto` is.
                if not any(set(few) <= set(named) and peak >= enough_with for few, enough_with in fitting):
                    fitting.append((named, peak))
                break
    shown = ["set " * (at == 0) + _with_peak(_listed(named), peak) for at, (named, peak) in enumerate(fitting)]
    if not enough:
        shown += _on_more_gpus(session, needed, free, [settings for settings, _ in fitting])
    if shown:
        return UserError(what, where, ", or ".join([*shown, *further]))
    sizes = [
        f"{numbers * free / peak / 1e9:.2g} billion parameters" + f" (under {settings})" * bool(settings)
        for settings, peak in smallest.values()
    ]
    others = ", or ".join([*further, "a machine with more memory"])
    return UserError(what, where, f"choose a model of at most {', or '.join(sizes)}, or {others}")


def _on_gpu(session: Session) -> bool:
    return str(session.accelerator.device.type) != "cpu"


def _with_peak(settings: str, peak: int) -> str:
    return f"{settings} ({gib(peak)})"


def _in_shards(session: Session, needed: Needed, free: int) -> Iterator[tuple[_Settings, int]]:
    """Yield the least changes with which a run of several processes, each with all weights, would fit in shards."""
    if session.config.training.sharding != "none" or session.accelerator.num_processes == 1:
        return
    enough: list[_Settings] = []
    for settings, sharded in _sharded(session.config, on_gpu=_on_gpu(session)):
        if not _among(settings, enough):
            peak = _peak(needed, session.under(sharded))
            if peak is not None and peak <= free:
                enough.append(settings)
                yield settings, peak


def _among(settings: _Settings, enough: Sequence[_Settings]) -> bool:
    """Tell whether some of the settings are enough already."""
    return any(set(few) <= set(settings) for few in enough)


def _on_more_gpus(session: Session, needed: Needed, free: int, enough: Sequence[_Settings]) -> Iterator[str]:
    """Yield in which ways a run would fit on more GPUs than it has, in shards; each on fewer than the one before.

    Args:
        session: What was asked for.
        needed: Estimates what it takes.
        free: The memory of a GPU.
        enough: Settings with which it would fit on those that there are.
    """
    if not _on_gpu(session):
        return
    counts = _counts(session.accelerator.num_processes)
    for settings, sharded in _sharded(session.config, on_gpu=True):
        if _among(settings, enough):
            continue
        peaks = ((count, _peak(needed, _on(session.under(sharded), count, free))) for count in counts)
        count, peak = next(((count, peak) for count, peak in peaks if peak is not None and peak <= free), (0, 0))
        if count:
            counts = counts[: counts.index(count)]
            what = f"set {_listed(settings)} on" if settings else "start"
            yield f"{what} {several(count, 'GPU')} ({gib(peak)} on each)"


def _counts(present: int) -> list[int]:
    """Return the numbers of processes that are thought of: powers of two, and from there on whole machines."""
    counts = [2, 4, *(8 * 2**doubled for doubled in range(_MANY_MACHINES.bit_length()))]
    return [count for count in counts if count > present]


def _on(session: Session, count: int, free: int) -> Session:
    """Return a session on so many GPUs like those that there are."""
    per_machine = min(count, _PER_MACHINE)
    return session.on(AssumedDevices(count // per_machine, per_machine, free))


def _peak(needed: Needed, session: Session) -> int | None:
    """Return what a process takes at the peak; None: the model has no layers for the settings."""
    try:
        return needed(session).peak
    except UserError:
        return None


def _can_be_sharded(config: Config) -> bool:
    return config.training.optimizer.on_shards


def _sharded(config: Config, *, on_gpu: bool) -> Iterator[tuple[_Settings, Config]]:
    """Yield ways to shard weights, from the least change to the one that takes the least memory."""
    named = [] if config.training.sharding != "none" else ["`training.sharding: full`"]
    sharding = config.training.sharding if not named else "full"
    for settings, smaller in [([], config), *_smaller(config, on_gpu=on_gpu)]:
        for others, tried in _with_recomputation(settings, smaller, plain=True):
            if _can_be_sharded(tried):
                yield [*named, *others], _with_training(tried, sharding=sharding)


def table(memory: MemoryEstimate) -> list[str]:
    """Return the parts of an estimate as aligned lines, with the peak at the end."""
    parts = {name: gib(size) for name, size in memory.parts().items() if size}
    rows = {**parts, "at the peak": gib(memory.peak)}
    width, digits = max(map(len, rows)), max(map(len, rows.values()))
    return [f"  {name:<{width}}  {size:>{digits}}" for name, size in rows.items()]


def _with_recomputation(
    settings: Sequence[str], config: Config, *, plain: bool = False
) -> Iterator[tuple[Sequence[str], Config]]:
    """Yield settings as they are, which none are only if `plain`, and with activations computed again."""
    if settings or plain:
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
