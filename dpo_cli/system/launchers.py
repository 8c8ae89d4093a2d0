"""What launchers leave in the environment: how many processes a run has, which one speaks, what Accelerate has to do.

torchrun, Slurm and `accelerate launch` talk to a program through variables, which shells, notebooks and batch jobs hand
on to programs that were started alone. All of it is settled here, before anything slow is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from dpo_cli.errors import UserError
from dpo_cli.system.fsdp_configuration import fsdp_configuration, is_on, uses_fsdp

_MOST_NAMED = 5
"""Processes that an error names, of those that it is about."""
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_LOCAL_SIZE, _PORT = "LOCAL_WORLD_SIZE", "MASTER_PORT"
_PRECISION, _COMPILER, _ACCUMULATION = (
    f"ACCELERATE_{name}" for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "GRADIENT_ACCUMULATION_STEPS")
)

_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "other kinds of parallelism",
}
_WHERE = "the environment"
_LAUNCHER = "the configuration of `accelerate launch`"

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""What torch reads, when CUDA starts, of how it takes memory: today's name, and older ones."""


def is_main_process() -> bool:
    """Tell, before Accelerate is imported, whether this process is the one that speaks."""
    rank = os.environ.get("RANK", "0")
    # A value that is not a number is reported by all processes.
    return not rank.isdecimal() or int(rank) == 0


def num_ranks() -> int:
    """Return how many processes the run has, before Accelerate is imported."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def named_ranks(ranks: Sequence[int], hosts: Sequence[str] | Mapping[int, str]) -> str:
    """Name processes and their machines: `ranks 1, 2 (on node7)`.

    Args:
        ranks: Which of them.
        hosts: The machine of each process of the run, by rank.
    """
    machines = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    numbers = ", ".join(map(str, ranks[:_MOST_NAMED])) + (" and others" if len(ranks) > _MOST_NAMED else "")
    return f"rank{'s' * (len(ranks) > 1)} {numbers} (on {machines})"


def settle_environment() -> list[str]:
    """Remove from the environment what was left there for others; return a line for each thing that is ignored.

    How torch takes a GPU's memory is set there, unless somebody set it.
    A single process without an address to meet others at is not a rank of a run, whatever it is called.
    """
    lines = []
    named = [name for name in _RANK if name in os.environ]
    numbered = all(os.environ[name].isdecimal() for name in named)
    alone = "WORLD_SIZE" not in os.environ or (os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ)
    if named and numbered and alone:
        values = ", ".join(f"{name}={os.environ.pop(name)}" for name in named)
        lines.append(f"ignoring {values} in the environment: no launcher of several processes set it")
    precision = os.environ.get(_PRECISION, "no")
    if precision.lower() not in ("", "no", "fp8") and not uses_fsdp():
        del os.environ[_PRECISION]
        lines.append(f"ignoring {_PRECISION}={precision} in the environment: `model.dtype` decides the precision")
    if sys.platform == "linux" and not any(name in os.environ for name in _ALLOCATOR):
        # Passes have a size of their own each; else what one leaves free is often too short for the next.
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    return lines


def environment_errors() -> list[UserError]:
    """Return what is wrong with what a launcher says, after `settle_environment`."""
    return [*numbering_errors(), *_engine_errors()]


def numbering_errors() -> Iterator[UserError]:
    """Yield what is wrong with how the processes are numbered, and how they are to meet.

    Of processes that are wrongly numbered, none may be the main one: each has to say it.
    """
    hint = "unset it, or let the launcher set it (torchrun, srun)"
    broken = [name for name in (*_RANK, _LOCAL_SIZE) if not os.environ.get(name, "0").isdecimal()]
    for name in broken:
        what = f"the environment variable {name} is not a whole number: `{os.environ[name]}`"
        yield UserError(what, _WHERE, hint)
    if not broken and num_ranks() > 1:
        if missing := [name for name in (*_RANK, "MASTER_ADDR", _PORT) if not os.environ.get(name)]:
            what = (
                f"WORLD_SIZE is {num_ranks()}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
            )
            together = "set them in every process" if len(missing) > 1 else "set it in every process"
            advice = f"start the processes with torchrun, or {together}; or unset WORLD_SIZE to start one process"
            yield UserError(what, _WHERE, advice)
        else:
            yield from _contradictions(hint)
    elif not broken and os.environ.get("WORLD_SIZE") == "0":
        yield UserError("WORLD_SIZE is 0: a run has at least one process", _WHERE, hint)


def _contradictions(hint: str) -> Iterator[UserError]:
    """Yield which numbers of several processes do not go together."""
    rank, local_rank, size = (int(os.environ[name]) for name in _RANK)
    local_size = int(os.environ.get(_LOCAL_SIZE, size))
    if rank >= size:
        yield UserError(f"RANK is {rank}, and WORLD_SIZE is {size}: ranks count from 0", _WHERE, hint)
    if not 1 <= local_size <= size:
        what = f"LOCAL_WORLD_SIZE is {local_size}, and WORLD_SIZE is {size}: a machine has a part of all processes"
        yield UserError(what, _WHERE, hint)
    elif local_rank >= local_size:
        what = f"LOCAL_RANK is {local_rank}, and {_LOCAL_SIZE if _LOCAL_SIZE in os.environ else 'WORLD_SIZE'} is "
        yield UserError(f"{what}{local_size}: the ranks of a machine count from 0", _WHERE, hint)
    port = os.environ[_PORT]
    if not port.isdecimal() or not 1 <= int(port) < 2**16:
        yield UserError(f"{_PORT} is not the number of a port: `{port}`", _WHERE, "choose one from 1024 to 65535")
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # A launcher may show each process a card of its own.
    if _LOCAL_SIZE in os.environ and 1 < len(cards) < local_size:
        what = f"{local_size} processes are started on a machine, and CUDA_VISIBLE_DEVICES shows {len(cards)} GPUs"
        advice = f"start {len(cards)} processes there (`--nproc-per-node {len(cards)}`), or show as many GPUs"
        yield UserError(what, f"CUDA_VISIBLE_DEVICES={','.join(cards)}", advice)


def _engine_errors() -> Iterator[UserError]:
    """Yield what Accelerate is configured to do that the program does not."""
    fsdp = fsdp_configuration()
    for name, engine in _ENGINES.items():
        if is_on(name) and not (fsdp and name == "ACCELERATE_USE_PARALLELISM_CONFIG"):
            what = f"Accelerate is configured for {engine}, which dpo does not support"
            instead = "`training.sharding: full` shards weights, gradients and optimizer state"
            hint = f"unset {name}, choose no such engine in `accelerate config`, or start with torchrun; {instead}"
            yield UserError(what, _WHERE, hint)
    if os.environ.get(_PRECISION, "").lower() == "fp8":
        hint = "set `mixed_precision: no` there; `model.dtype` sets the precision: bfloat16, float16 or float32"
        yield UserError("Accelerate is configured for fp8, which dpo does not support", f"{_PRECISION}=fp8", hint)
    if (compiler := os.environ.get(_COMPILER, "no")).lower() not in ("", "no"):
        hint = "set `dynamo_backend: no` there, or unset it; `training.compile` compiles the decoder layers"
        yield UserError("Accelerate is configured to compile models", f"{_COMPILER}={compiler}", hint)
    if (steps := os.environ.get(_ACCUMULATION, "1")) != "1":
        hint = "set it to 1 there; `training.pairs_per_step` sets the number of pairs per step"
        yield UserError("Accelerate is configured to accumulate gradients", f"{_ACCUMULATION}={steps}", hint)
    if fsdp and fsdp.refused:
        settings = ", ".join(f"`{one.setting}`" for one in fsdp.refused)
        hint = "; ".join(f"`{one.setting}`: {one.hint}" for one in fsdp.refused)
        yield UserError(f"Accelerate's FSDP is configured for what dpo does not support: {settings}", _LAUNCHER, hint)
