"""What goes wrong with disks, folders and numbers: installed in a process that is about to run the program.

Each function is named by a test as the fault of a run. Steps are counted in the process itself, from 1.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedTokenizerBase

from dpo_cli.modeling.scorer import Scorer

_PATHS_OF = {
    "open": ((0, None),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
}
"""Where the arguments of what changes a disk hold a path, and the descriptor of the folder that it is relative to."""

REACHED, OPEN = "reached", "open"
"""What stands in the folder of a gate."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REMOVING = {"os.remove", "os.rmdir"}
_FULL = {"ENOSPC", "EDQUOT"}


def largest_file(num_bytes: int) -> None:
    """Refuse files that would become larger: how a disk fills up for one process, whatever writes to it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_for_tokenizer() -> None:
    """Let the disk be full while a checkpoint's tokenizer is saved, which its library does in a way of its own."""
    save = PreTrainedTokenizerBase.save_pretrained

    def saved(self: PreTrainedTokenizerBase, folder: Any, *arguments: Any, **keywords: Any) -> Any:
        if "checkpoints" in str(folder):
            largest_file(4096)
        return save(self, folder, *arguments, **keywords)

    PreTrainedTokenizerBase.save_pretrained = saved


def refuse(part: str, code: str, from_step: int = 0) -> None:
    """Let whatever would make or change a file fail where its path holds a text; a full disk removes files still.

    Args:
        part: The text.
        code: The name of the error, as in `errno`.
        from_step: How many steps are taken before.
    """
    number = getattr(errno, code)
    refused = _PATHS_OF.keys() - (_REMOVING if code in _FULL else set())
    refusing = not from_step

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if refusing and event in refused and (event != "open" or arguments[2] & _WRITING):
            for path in _paths(event, arguments):
                if part in path:
                    raise OSError(number, os.strerror(number), path)

    def start(optimizer: AcceleratedOptimizer) -> None:
        nonlocal refusing
        refusing = True

    sys.addaudithook(look)
    if from_step:
        _after_step(from_step, start)


def failing_flush(number: int, code: str = "EIO") -> None:
    """Let the disk fail to keep a file: at the flush of this number, from 1."""
    flushes, error = itertools.count(1), getattr(errno, code)

    def fail() -> None:
        if next(flushes) == number:
            raise OSError(error, os.strerror(error))

    _on_flushes("", fail)


def killed_at_flush(part: str) -> None:
    """Kill this process where a file is to be kept whose path holds a text."""
    _on_flushes(part, lambda: os.kill(os.getpid(), signal.SIGKILL))


def slow_flush(seconds: float, part: str = "") -> None:
    """Let the disk take its time over files whose path holds a text."""
    _on_flushes(part, lambda: time.sleep(seconds))


def full_file(name: str, step: int) -> None:
    """Let a file that is open find no space for what is written to it after a step."""

    def fill(optimizer: AcceleratedOptimizer) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for link in Path("/proc/self/fd").iterdir():
            if link.is_symlink() and link.readlink().name == name:
                os.dup2(full, int(link.name))

    _after_step(step, fill)


def removed(path: str, step: int) -> None:
    """Remove a folder or a file after a step."""

    def remove(optimizer: AcceleratedOptimizer) -> None:
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink()

    _after_step(step, remove)


def held_at_flush(part: str, gate: str) -> None:
    """Stand still where a file or folder is to be kept whose path holds a text."""
    _on_flushes(part, lambda: _stand(Path(gate)))


def held_at_step(step: int, gate: str) -> None:
    """Stand still after a step."""
    _after_step(step, lambda optimizer: _stand(Path(gate)))


def signalled(name: str, step: int) -> None:
    """Send this process a signal after a step."""
    _after_step(step, lambda optimizer: os.kill(os.getpid(), getattr(signal, name)))


def spoilt_weight(value: str, step: int) -> None:
    """Put NaN or infinity into a weight with a step."""

    def spoil(optimizer: AcceleratedOptimizer) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].view(-1)[0] = float(value)

    _after_step(step, spoil)


def spoilt_loss(value: str, step: int) -> None:
    """Multiply by NaN or infinity what the policy answers in a step of one pass."""
    passes = itertools.count(1)
    _on_passes(lambda answer: answer * float(value) if next(passes) == step else answer)


def spoilt_gradient(value: str, step: int) -> None:
    """Multiply by NaN or infinity what flows back in a step of one pass; the loss is as it should be."""
    passes = itertools.count(1)

    def spoil(answer: torch.Tensor) -> torch.Tensor:
        if next(passes) == step:
            answer.register_hook(lambda slope: slope * float(value))
        return answer

    _on_passes(spoil)


def _stand(gate: Path) -> None:
    """Say that the gate is reached, and wait until it is open."""
    (gate / REACHED).touch()
    while not (gate / OPEN).exists():
        time.sleep(0.01)


def _on_flushes(part: str, act: Callable[[], object]) -> None:
    """Do something before a file or folder is flushed to the disk whose path holds a text."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if part in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            act()
        flush(descriptor)

    os.fsync = fsync


def _paths(event: str, arguments: tuple[Any, ...]) -> Iterator[str]:
    """Yield the whole paths that an event is about."""
    for place, base in _PATHS_OF[event]:
        path = arguments[place]
        if not isinstance(path, (str, os.PathLike)):
            continue
        descriptor = arguments[base] if base is not None else -1
        folder = Path.cwd() if descriptor < 0 else Path(f"/proc/self/fd/{descriptor}").readlink()
        yield str(folder / path)


def _after_step(number: int | None, act: Callable[[AcceleratedOptimizer], object]) -> None:
    """Do something when the optimizer has taken the step of this number, or each where there is none."""
    step, steps = AcceleratedOptimizer.step, itertools.count(1)

    @functools.wraps(step)
    def stepped(self: AcceleratedOptimizer, *arguments: Any, **keywords: Any) -> Any:
        result = step(self, *arguments, **keywords)
        if next(steps) == number or number is None:
            act(self)
        return result

    AcceleratedOptimizer.step = stepped


def _on_passes(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change what the policy answers in every pass that takes a gradient."""
    forward = Scorer.forward

    @functools.wraps(forward)
    def passed(self: Scorer, *arguments: Any, **keywords: Any) -> torch.Tensor:
        answer = forward(self, *arguments, **keywords)
        return change(answer) if torch.is_grad_enabled() else answer

    Scorer.forward = passed
