"""A function over many items, in their order: by this process alone, or by worker processes once that pays.

The first items are done here, and so are those that follow until the workers have started: little work never waits
for a process to start. The results do not depend on which process did an item.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dpo_cli.errors import FAILED, UserError

_MOST = 16
"""Workers that one process can read for and write after."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any]
"""The function of a worker process."""


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, seconds_alone: float
) -> Generator[Result, None, None]:
    """Yield the function of each item, in the items' order.

    Args:
        function: It can be pickled, and so can items and results.
        items: They are read when they are needed: one for each worker ahead, and one more.
        num_workers: Processes to start; with fewer than two everything is done here.
        seconds_alone: How long items are done here before any process is started.

    Raises:
        UserError: The function raised it, a worker was ended from outside, or none can be started.
        Exception: The function raised it in a worker; its cause has the worker's traceback.
    """
    waiting, started = iter(items), time.monotonic()
    for item in waiting:
        if num_workers > 1 and time.monotonic() - started >= seconds_alone:
            yield from _with_workers(function, item, waiting, min(num_workers, _MOST))
        else:
            yield function(item)


def _with_workers(
    function: Callable[[Item], Result], first: Item, others: Iterator[Item], num_workers: int
) -> Iterator[Result]:
    """Start workers, and do items here until they have started."""
    pending: deque[Future[Result]] = deque()
    with _pool(function, num_workers) as pool:
        starting = [_submitted(pool, os.getpid) for _ in range(num_workers)]
        yield function(first)
        for item in others:
            if not _have_started(starting):
                yield function(item)
                continue
            pending.append(_submitted(pool, _call, item))
            if len(pending) > num_workers:
                yield _result(pending.popleft())
        yield from map(_result, pending)


@contextlib.contextmanager
def _pool(function: Callable[[Any], Any], num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of workers that have a function; with the context they end, whatever they are doing.

    They are fresh processes (`spawn`): a copy of this one would have its locks without the threads that hold them.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    # A queue is written by a thread: this process does not wait for workers that are still importing.
    functions = context.Queue()
    pickled = pickle.dumps(function)
    for _ in range(num_workers):
        functions.put(pickled)
    pool = ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(functions,))
    try:
        yield pool
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        functions.close()
        functions.cancel_join_thread()


def _submitted(pool: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Give a pool something to do, for which it may start a process."""
    # A process inherits the mask: an interrupt of the whole group is answered by this process.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *arguments)
    except BrokenProcessPool:
        raise _ended() from None
    except OSError as error:
        what = f"worker processes cannot be started: {error.strerror or error}"
        hint = "allow more processes (`ulimit -u`) or free some memory, and try again"
        raise UserError(what, "preparing the data", hint, status=FAILED) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _have_started(starting: Sequence[Future[int]]) -> bool:
    """Tell whether workers have done their first task."""
    return all(future.done() for future in starting)


def _result(future: Future[Result]) -> Result:
    """Return what a worker found, or raise what it met."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise _ended() from None


def _begin(functions: Any) -> None:
    """Take the function in a worker that has started, and end with the process that started it."""
    global _function
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The workers share the cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = pickle.loads(functions.get())


def _end_with_parent() -> None:
    """End this process when its parent has ended, however that came about: nobody else would end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(FAILED)


def _call(item: Any) -> Any:
    """Do an item in a worker."""
    return _function(item)


def _ended() -> UserError:
    hint = "if memory ran out, free some or choose a machine with more; otherwise try again"
    return UserError("a worker process ended before its work was done", "preparing the data", hint, status=FAILED)
