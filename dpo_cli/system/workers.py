"""A function over many items, in their order: by this process alone, or with worker processes once it pays.

The first items are done here, and so are those that follow until a worker has started: little work never waits
for a process to start. Which process did an item cannot be told from the results.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from dpo_cli.errors import FAILED, UserError

_MOST = 16
"""Workers that one process can read for and write after."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, num_alone: int
) -> Generator[Result, None, None]:
    """Yield the function of each item, in the items' order.

    Args:
        function: What is done; it can be pickled, and so can items and results.
        items: They are read when they are needed: one for each worker ahead, and one more.
        num_workers: Processes to start; with fewer than two everything is done here.
        num_alone: How many items are done before any process is started.

    Raises:
        UserError: The function raised it, a worker was ended from outside, or none can be started.
        RuntimeError: The function has a defect; the message holds the worker's traceback.
    """
    waiting = iter(items)
    yield from map(function, itertools.islice(waiting, num_alone) if num_workers > 1 else waiting)
    for first in waiting:
        with _Workers(function, min(num_workers, _MOST)) as workers:
            yield function(first)
            for item in waiting:
                if workers.have_started():
                    yield from workers.map(itertools.chain([item], waiting))
                else:
                    yield function(item)


class _Workers(contextlib.AbstractContextManager["_Workers"]):
    """Worker processes that are started beside this one's work, and ended with the context.

    They are fresh processes (`spawn`): a copy of this one would have its locks without the threads that hold them.
    """

    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        self._function, self._count = function, count
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        self._problem: Exception | None = None
        self._leaving = threading.Event()
        self._starting = threading.Thread(target=self._start, daemon=True)
        self._starting.start()

    def __exit__(self, *_: object) -> None:
        """End the workers, whatever they are doing."""
        self._leaving.set()
        while self._starting.is_alive():
            # It may be waiting for one of them to take the function.
            self._terminate()
            self._starting.join(0.05)
        self._terminate()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()

    def _terminate(self) -> None:
        for process in self._processes:
            process.terminate()

    def _start(self) -> None:
        """Start the processes; each takes its copy of the function when it is up."""
        try:
            # What counts the processes' resources would lift the mask, were it started after it is set.
            resource_tracker.ensure_running()
            # A worker inherits the mask: an interrupt of the whole group is this process's to answer.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            context = multiprocessing.get_context("spawn")
            for _ in range(self._count):
                if not self._leaving.is_set():
                    self._start_one(context)
            # Sent when all are on their way: a process must be up before it can take it.
            function = ForkingPickler.dumps(self._function)
            for connection in self._connections:
                connection.send_bytes(function)
        except OSError as error:
            what = f"worker processes cannot be started: {error.strerror or error}"
            hint = "allow more processes (`ulimit -u`) or free some memory, and try again"
            self._problem = UserError(what, "preparing the data", hint, status=FAILED)
        except Exception as problem:
            self._problem = problem

    def _start_one(self, context: SpawnContext) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        self._connections.append(ours)

    def have_started(self) -> bool:
        """Tell whether all workers wait for items.

        Raises:
            UserError: They cannot be started.
        """
        if self._starting.is_alive():
            return False
        if self._problem:
            raise self._problem
        return all(connection.poll() for connection in self._connections)

    def map(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield the function of each item, dealt to the workers in turn."""
        turns = itertools.cycle(self._connections)
        busy: list[Connection] = []
        for connection in self._connections:
            _received(connection)
        for item in items:
            connection = next(turns)
            result = [_received(busy.pop(0))] if len(busy) == len(self._connections) else []
            _send(connection, item)
            busy.append(connection)
            yield from result
        yield from map(_received, busy)


def _serve(connection: Connection) -> None:
    """Answer items with results until nobody is there any more."""
    # The workers share the cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        function = connection.recv()
        connection.send((True, None))
        while True:
            item = connection.recv()
            try:
                answer = True, function(item)
            except UserError as error:
                answer = False, error
            except Exception:
                answer = False, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
            connection.send(answer)


def _send(connection: Connection, item: Any) -> None:
    """Give a worker an item."""
    try:
        connection.send(item)
    except (BrokenPipeError, ConnectionResetError):
        raise _ended() from None


def _received(connection: Connection) -> Any:
    """Return a worker's next result, or raise what it met."""
    try:
        good, result = connection.recv()
    except (EOFError, ConnectionResetError):
        raise _ended() from None
    if not good:
        raise result
    return result


def _ended() -> UserError:
    hint = "if memory ran out, free some or choose a machine with more; otherwise try again"
    return UserError("a worker process ended before its work was done", "preparing the data", hint, status=FAILED)
