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


def fill_memory(step: int, passes: int, *, going_back: bool = False) -> None:
    """Let memory run out once, in a pass with gradient.

    Args:
        step: In which step.
        passes: In which of its passes, counted from 1; counted from the last: -1.
        going_back: In the middle of its backward pass, when later layers have their gradients already; else at the end
            of its forward pass.
    """
    from dpo_cli.modeling.scorer import Scorer
    from dpo_cli.training.learner import Learner

    add_up, forward = Learner._add_up_gradients, Scorer.forward
    left: list[int] = []

    @functools.wraps(add_up)
    def counted(learner: Any, at_hand: Any, batches: Any) -> Any:
        if at_hand.number == step:
            Learner._add_up_gradients = add_up  # type: ignore[method-assign]
            left.append(passes if passes > 0 else len(at_hand.micro_batches) + 1 + passes)
        return add_up(learner, at_hand, batches)

    @functools.wraps(forward)
    def filling(scorer: Any, batch: Any, **how: Any) -> Any:
        found = forward(scorer, batch, **how)
        if left and found.requires_grad:
            left[0] -= 1
        if left == [0]:
            left.clear()
            print(STRUCK, file=sys.stderr, flush=True)
            if not going_back:
                _use_up_memory()
            trained = [weights for weights in scorer.parameters() if weights.requires_grad]

            def once(gradient: Any) -> None:
                hook.remove()
                _use_up_memory()

            hook = trained[len(trained) // 2].register_hook(once)
        return found

    Learner._add_up_gradients = counted  # type: ignore[method-assign]
    Scorer.forward = filling  # type: ignore[method-assign]
