"""What launchers leave in the environment: how many processes a run has, which one speaks, what Accelerate has to do.

torchrun, Slurm and `accelerate launch` talk to a program through variables, which shells, notebooks and batch jobs hand
on to programs that were started alone. All of it is settled here, before anything slow is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from dpo_cli.errors import UserError

_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "other kinds of parallelism",
}
_IGNORED = {
    "ACCELERATE_DYNAMO_BACKEND": "models are not compiled",
    "ACCELERATE_MIXED_PRECISION": "`model.dtype` decides the precision",
}

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""What torch reads, when CUDA starts, of how it takes memory: today's name, and older ones."""


def is_main_process() -> bool:
    """Tell, before Accelerate is imported, whether this process is the one that speaks."""
    rank = os.environ.get("RANK", "0")
    # A value that is not a number is reported by all processes.
    return not rank.isdecimal() or int(rank) == 0


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
    for name, reason in _IGNORED.items():
        if (value := os.environ.get(name, "no")).lower() not in ("", "no"):
            del os.environ[name]
            lines.append(f"ignoring {name}={value} in the environment: {reason}")
    if sys.platform == "linux" and not any(name in os.environ for name in _ALLOCATOR):
        # Passes have a size of their own each; else what one leaves free is often too short for the next.
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    return lines


def environment_errors() -> Iterator[UserError]:
    """Yield what is wrong with what a launcher says, after `settle_environment`."""
    hint = "unset it, or let the launcher set it (torchrun, srun)"
    broken = [name for name in _RANK if not os.environ.get(name, "0").isdecimal()]
    for name in broken:
        what = f"the environment variable {name} is not a whole number: `{os.environ[name]}`"
        yield UserError(what, "the environment", hint)
    if not broken and (num_ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        if missing := [name for name in (*_RANK, "MASTER_ADDR") if not os.environ.get(name)]:
            what = f"WORLD_SIZE is {num_ranks}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
            yield UserError(what, "the environment", "start the processes with torchrun, or unset WORLD_SIZE")
        elif int(os.environ["RANK"]) >= num_ranks:
            what = f"RANK is {os.environ['RANK']}, and WORLD_SIZE is {num_ranks}: ranks count from 0"
            yield UserError(what, "the environment", hint)
    for name, engine in _ENGINES.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            what = f"Accelerate is configured for {engine}, which dpo does not support"
            hint = f"unset {name}, choose no such engine in `accelerate config`, or start with torchrun"
            yield UserError(what, "the environment", hint)
