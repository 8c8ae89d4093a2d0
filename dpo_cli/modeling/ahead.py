"""The next micro-batch is prepared by a thread while the device works on the one at hand."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.modeling.batch import Batches, Prepared

IN_TURN = {"cpu"}
"""Devices beside which no thread prepares anything: it would take a core from the passes, which take a thousand times
as long."""


@contextlib.contextmanager
def prepared_ahead(batches: Batches, upcoming: Iterable[MicroBatch]) -> Iterator[Batches]:
    """Return batches of which each is prepared by a thread while the device works on the one before.

    What goes wrong in the thread is raised where the micro-batch is asked for. The thread ends with the context. It and
    the main thread may read pairs at once: an Arrow table never changes, and may be read by several threads.

    Args:
        batches: What prepares micro-batches.
        upcoming: The micro-batches in the order in which they will be asked for; the thread goes through them. One that
            comes out of turn is prepared when it is asked for.
    """
    if batches.device.type in IN_TURN:
        yield batches
        return
    executor = ThreadPoolExecutor(1, "next micro-batch")
    try:
        yield dataclasses.replace(batches, source=_Ahead(batches, iter(upcoming), executor))
    finally:
        executor.shutdown(cancel_futures=True)


class _Ahead:
    """Hands out what was prepared, and has the next one prepared."""

    def __init__(self, batches: Batches, upcoming: Iterator[MicroBatch], executor: ThreadPoolExecutor) -> None:
        self._batches, self._upcoming, self._executor = batches, upcoming, executor
        self._next: Future[tuple[MicroBatch, Prepared] | None] = executor.submit(self._prepare)

    def __call__(self, micro_batch: MicroBatch) -> Prepared:
        """Return a micro-batch, prepared."""
        upcoming = self._next.result()
        if upcoming is None or upcoming[0] != micro_batch:
            return self._batches.prepare(micro_batch)
        self._next = self._executor.submit(self._prepare)
        return upcoming[1]

    def _prepare(self) -> tuple[MicroBatch, Prepared] | None:
        return next(((one, self._batches.prepare(one)) for one in self._upcoming), None)
