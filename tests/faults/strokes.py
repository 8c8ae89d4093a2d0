"""What may strike one rank of several at a chosen call of a chosen function.

It is killed, stopped, hangs or fails, works for long, or exchanges something that the others do not.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import signal
import sys
import time
from typing import Any

STRUCK = "struck"
"""What a rank says on the moment."""


def _fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _use_up_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB.")


WORK_SECONDS = 8.0
"""How long `work` takes, in seconds."""


def _work() -> None:
    until = time.monotonic() + WORK_SECONDS
    while time.monotonic() < until:
        pass


def _exchange_something_else() -> None:
    import torch

    torch.distributed.barrier()


STROKES = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(3600),
    "work": _work,
    "stray": _exchange_something_else,
    "fail": _fail,
    "memory": _use_up_memory,
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def strike(where: str, how: str, call: int = 1, then: str = "") -> None:
    """Arrange for a function to be a rank's last.

    Args:
        where: The function, `module:name` or `module:Class.name`.
        how: One of `STROKES`.
        call: At which call, counted from 1.
        then: Another function whose next call is the one, if not this one is.
    """
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *above, name = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def struck(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and then:
            strike(then, how)
        elif calls == call:
            print(STRUCK, file=sys.stderr, flush=True)
            STROKES[how]()
        return function(*arguments, **keywords)

    setattr(owner, name, struck)
    # Modules that imported it have it, too, under whatever name.
    for loaded in [module for title, module in sys.modules.items() if title.startswith("dpo_cli.")]:
        for there in [there for there, value in vars(loaded).items() if value is function]:
            setattr(loaded, there, struck)


def move_elsewhere(threads: int, build: str) -> None:
    """Let a run find itself on a machine with another number of threads and another build of torch.

    Args:
        threads: How many torch computes with.
        build: What torch adds to its version.
    """
    import torch

    torch.set_num_threads(threads)
    torch.__version__ = f"{torch.__version__}.{build}"
