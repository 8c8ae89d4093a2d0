"""Run by `test_two_ranks` in each of two ranks: do all that is in `SCRIPTS` together, and print what came of each.

python -m tests.training.two_ranks PORT RANK
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn

from dpo_cli.modeling.placement import Replicated
from dpo_cli.system.storage import DamagedFolder
from dpo_cli.training.together import Together

LAYERS = 4


def gradients_of(rank: int) -> list[torch.Tensor | None]:
    """Return what a rank has before the exchange: the second rank has nothing for two of the weights."""
    return [None if rank and number % 2 else torch.full((3,), 10.0 * rank + number) for number in range(LAYERS)]


def averaged(rank: int, owner: Any, name: str, number: int) -> list[list[float]]:
    """Average gradients where memory runs out once in the second rank, at the call of a number; return the averages."""
    # It averages by itself what torch's own averaging cannot.
    model = nn.ParameterList(torch.zeros(3) for _ in range(LAYERS))
    placement, asked, calls = Replicated(Accelerator(cpu=True)), getattr(owner, name), 0

    def full(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank and calls == number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return asked(*arguments, **options)

    # The step is taken once more after the one that broke off.
    for _ in range(2):
        placement.begin_step()
        for weights, gradient in zip(model, gradients_of(rank), strict=True):
            weights.grad = gradient
        setattr(owner, name, full)
        try:
            with placement.adding_up(model, last=True):
                pass
        except torch.OutOfMemoryError:
            placement.rejoin(model)
        finally:
            setattr(owner, name, asked)
    # No exchange is left over for which the other waits.
    distributed.barrier()
    return [weights.grad.tolist() for weights in model if weights.grad is not None]


def memory_for_a_gradient(rank: int) -> Any:
    return averaged(rank, torch, "zeros_like", 2)


def memory_for_an_exchange(rank: int) -> Any:
    return averaged(rank, distributed, "all_reduce", 3)


def steps_that_are_not_begun(rank: int) -> Any:
    """Every step exchanges all gradients, also where none may be broken off."""
    model, placement, found = nn.ParameterList([torch.zeros(1)]), Replicated(Accelerator(cpu=True)), []
    for step in range(3):
        model[0].grad = torch.tensor([float(step + 2 * rank)])
        with placement.adding_up(model, last=True):
            pass
        found.append(model[0].grad.item())
    return found


def refused(rank: int, error: Exception) -> list[str]:
    """Let some work fail in the second rank; return what each of them raises, and that both go on together."""
    together = Together()

    def work() -> None:
        if rank:
            raise error

    try:
        together.done(work, "saving a checkpoint", Path("run/step-1"))
    except Exception as raised:
        return [type(raised).__name__, str(raised), str(together.of_all(rank))]
    return []


def damage(rank: int) -> Any:
    return refused(rank, DamagedFolder("weights.safetensors is missing"))


def defect(rank: int) -> Any:
    return refused(rank, KeyError("layers.7"))


def full_disk(rank: int) -> Any:
    return refused(rank, OSError(28, "No space left on device"))


SCRIPTS = [memory_for_a_gradient, memory_for_an_exchange, steps_that_are_not_begun, damage, defect, full_disk]


def main(port: str, rank: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    print(json.dumps({script.__name__: script(int(rank)) for script in SCRIPTS}), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
