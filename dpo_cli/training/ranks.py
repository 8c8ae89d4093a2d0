"""Several processes of one run watch each other, so that none waits for one that will not come.

What they compute together waits for every one of them; where one is killed, stopped or hangs, the others would wait
for hours. So each notes in the store by which the processes found each other how far it is, and reads the notes of
the others. A process that finds another missing, or all of them waiting for each other, says so and ends, whatever its
main thread waits for; but data, models and checkpoints that it is writing are finished first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.broken_off import is_broken_off
from dpo_cli.system.launchers import is_main_process
from dpo_cli.system.signals import STOPPING
from dpo_cli.system.storage import heartbeats, is_filling
from dpo_cli.training.collectives import Exchanges, count_exchanges, exchanges
from dpo_cli.training.exchange import meeting
from dpo_cli.training.rank_notes import Missing, Note, Notes

Result = TypeVar("Result")
Say = Callable[[UserError], None]

_LONGEST_INTERVAL_SECONDS = 1.0
_LONGEST_GRACE_SECONDS = 10.0
_NOTES_OF_PATIENCE = 10
"""Notes that come, if all is well, in the time that a rank may be silent."""
_LEAST_WORK = 0.02
"""The share of its time in which a rank that does not wait for others has to compute, or it hangs."""
_NOTES_OF_DOUBT = 4
"""Notes that a rank has to miss to be the one that broke a connection, where one broke."""
_LAST_RESORT_SECONDS = 10.0
"""After which a process that has to end does so, whatever it is stuck in."""


class Progress:
    """What the main thread of this process does, for the other ranks to see.

    Attributes:
        step: The optimizer step at hand; 0: none was begun.
        doing: What is at hand that others may wait for, empty within a step; None: what may take any time.
    """

    def __init__(self) -> None:
        self.step = 0
        self.doing: str | None = None

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Name what is at hand while the context lasts: `while held-out pairs were scored`."""
        before, self.doing = self.doing, doing
        try:
            yield
        finally:
            self.doing = before

    def following(self, results: Iterator[Result], done: int) -> Iterator[Result]:
        """Yield the results of steps, noting which step is at hand.

        Args:
            results: One for each step.
            done: The steps that were taken before.
        """
        self.step = done
        while True:
            self.step += 1
            with self.during(""):
                try:
                    result = next(results)
                except StopIteration:
                    self.step -= 1
                    return
            yield result


@contextlib.contextmanager
def gathering(timeout: float | None, say: Say) -> Iterator[None]:
    """Give the processes of a run some time to find each other; end this one where another does not come.

    Args:
        timeout: How long to wait for the others, in seconds; None: as long as torch does.
        say: Prints an error.

    Raises:
        UserError: One that had come is gone again.
    """
    num_ranks, is_main = int(os.environ.get("WORLD_SIZE", "1")), is_main_process()
    if num_ranks == 1:
        yield
        return
    where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    hint = "start as many processes as WORLD_SIZE says, with one address; the log of one that did not come tells why"

    def give_up() -> None:
        if is_main:
            _say_from_thread(say, UserError(f"not all {num_ranks} ranks have come within {timeout:g} s", where, hint))
        os._exit(FAILED)

    timer = threading.Timer(timeout or threading.TIMEOUT_MAX, give_up)
    timer.daemon = True
    timer.start()
    # Whoever waits for others does so in torch, where no handler of Python's is called.
    heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the ranks did not find each other: {_reason(error)}", where, hint, status=FAILED) from error
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watched(accelerator: Accelerator, timeout: float | None, say: Say) -> Iterator[Progress]:
    """Watch the other ranks while the context lasts, and tell them how this one leaves it.

    Args:
        accelerator: Knows the ranks.
        timeout: How long a rank may be silent, or get no further while others wait, in seconds; None: for ever.
        say: Prints an error, from any rank.

    Raises:
        UserError: What was exchanged with another rank broke off, because it is gone.
    """
    progress = Progress()
    if accelerator.num_processes == 1:
        yield progress
        return
    with gathering(timeout, say):
        watch = _Watch(accelerator, timeout, progress, say)
    try:
        yield progress
    except RuntimeError as error:
        missing = watch.explain(error)
        if missing is None:
            watch.leave(_reason(error), FAILED)
            raise
        # The console of the main process renders what is raised; those of the others are silent.
        if accelerator.process_index and watch.speaks(missing):
            _say_from_thread(say, _as_error(missing))
        # The others may know better where this one names nobody.
        watch.leave(missing.what, missing.status, missing if missing.ranks else None)
        _end_soon()
        raise _as_error(missing) from None
    except BaseException as error:
        watch.leave(_reason(error), getattr(error, "status", FAILED))
        raise
    watch.leave()


class _Watch:
    """Two threads of a process: one exchanges notes, the other looks at them.

    Args:
        accelerator: Knows the ranks.
        timeout: How long one may be silent, in seconds, or None.
        progress: How far the main thread is.
        say: Prints an error.
    """

    def __init__(self, accelerator: Accelerator, timeout: float | None, progress: Progress, say: Say) -> None:
        self._rank, self._num_ranks = accelerator.process_index, accelerator.num_processes
        self._patience = timeout or math.inf
        self._grace = min(self._patience, _LONGEST_GRACE_SECONDS)
        self._interval = min(self._patience / _NOTES_OF_PATIENCE, _LONGEST_INTERVAL_SECONDS)
        self._doubt_seconds = _NOTES_OF_DOUBT * self._interval
        self._progress, self._say = progress, say
        self._store = meeting("ranks", timedelta(seconds=timeout or _LONGEST_GRACE_SECONDS))
        keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self._keeps_store = self._rank == keeper
        self._lock, self._clock, self._count = threading.Lock(), 0.0, 0
        self._notes = Notes(self._rank, self._num_ranks, keeper, self._clock)
        self._exchanged, self._stayed = 0, 0
        self._exchanges_seen: Exchanges | None = None
        self._farewell: tuple[str, int] | None = None
        self._missing: Missing | None = None
        self._leaves, self._doubts, self._looked = threading.Event(), threading.Event(), threading.Event()
        self._exchanges = threading.Thread(target=self._exchange_notes, name="notes of ranks", daemon=True)
        self._exchanges.start()
        # The store may be gone as well and leave the first thread waiting.
        self._looks = threading.Thread(target=self._look, name="watch of ranks", daemon=True)
        self._looks.start()

    def explain(self, error: RuntimeError) -> Missing | None:
        """Find out which rank is behind an error, if one is."""
        self._doubts.set()
        self._looked.wait(2 * self._doubt_seconds)
        if self._missing is None and is_broken_off(error):
            return Missing(f"what the ranks exchanged broke off: {_reason(error)}", frozenset())
        return self._missing

    def speaks(self, missing: Missing) -> bool:
        """Tell whether this rank has to say it."""
        with self._lock:
            return self._notes.speaks(missing)

    def leave(self, why: str = "", status: int = 0, missing: Missing | None = None) -> None:
        """Say farewell; the rank that keeps the store stays for a moment, for the others to read it."""
        self._farewell, self._missing = (why, status), missing
        self._leaves.set()
        # A thread that is there when Python ends is torn out of whatever it does.
        for thread in {self._exchanges, self._looks} - {threading.current_thread()}:
            thread.join(2 * self._doubt_seconds)

    def _exchange_notes(self) -> None:
        """Write this rank's notes and read the others', until it leaves or the store is lost."""
        try:
            while not self._leaves.is_set():
                self._exchange()
                self._leaves.wait(self._interval)
            self._exchange()
            until = time.monotonic() + self._doubt_seconds
            while self._keeps_store and self._notes.remaining(self._missing) and time.monotonic() < until:
                time.sleep(self._interval / 20)
                self._exchange()
        except RuntimeError:
            with self._lock:
                self._notes.lose(self._clock)

    def _exchange(self) -> None:
        """Write one note and read those of all ranks."""
        self._store.set(str(self._rank), self._note().encoded())
        # To ask for one that is not there yet would be to wait for it.
        keys = [key for key in map(str, range(self._num_ranks)) if self._store.check([key])]
        notes = [Note.decoded(text) for text in self._store.multi_get(keys)]
        with self._lock:
            self._notes.take(notes, self._clock)

    def _note(self) -> Note:
        """Make the next note; where this rank leaves, it says why."""
        at = self._progress
        if self._farewell is None:
            self._count += 1
            self._look_at_exchanges()
            work, seen = self._work(), self._exchanges_seen
            return Note(self._rank, self._count, at.step, at.doing, self._exchanged, work, seen)
        (why, status), last = self._farewell, Note(self._rank, self._count + 1, at.step)
        last = dataclasses.replace(last, farewell=why, status=status)
        if self._missing is None:
            return last
        return dataclasses.replace(last, blames=tuple(sorted(self._missing.ranks)), hint=self._missing.hint)

    def _look_at_exchanges(self) -> None:
        """Count what was exchanged; look closer once it has been the same for half of the time-out."""
        before, self._exchanged = self._exchanged, count_exchanges()
        if before != self._exchanged:
            self._stayed, self._exchanges_seen = 0, None
            return
        self._stayed += 1
        if self._exchanges_seen is None and self._stayed * self._interval >= self._patience / 2:
            self._exchanges_seen = exchanges()

    def _work(self) -> int:
        """Return a number that grows while this process computes, flushes files or waits for another run's lock."""
        seconds = time.process_time() - time.thread_time()
        return int(seconds / (self._patience * _LEAST_WORK)) + heartbeats()

    def _look(self) -> None:
        """Look at what is known of the others again and again; end this process where one of them is missing."""
        before = time.monotonic()
        while not self._leaves.wait(self._interval):
            now = time.monotonic()
            # Who was stopped himself, or slept with his machine, could not have seen the others' notes.
            self._clock += min(now - before, 2 * self._interval)
            before, doubts = now, self._doubts.is_set()
            silence, grace = (self._doubt_seconds, 0.0) if doubts else (self._patience, self._grace)
            with self._lock:
                missing = self._notes.missing(self._clock, silence, grace, self._patience)
            if missing and doubts:
                self._missing = missing
                self._looked.set()
                return
            # What hangs while it writes will not finish it.
            if missing and (self._rank in missing.ranks or not is_filling()):
                if self.speaks(missing):
                    _say_from_thread(self._say, _as_error(missing))
                self.leave(missing.what, missing.status, missing)
                os._exit(missing.status)


def _reason(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return str(error).partition("\n")[0] or type(error).__name__


def _as_error(missing: Missing) -> UserError:
    return UserError(missing.what, None, missing.hint, status=missing.status)


def _say_from_thread(say: Say, error: UserError) -> None:
    """Print an error and wait no longer than some seconds for it: a pipe may be full that nobody reads."""
    speaker = threading.Thread(target=say, args=(error,), daemon=True)
    speaker.start()
    speaker.join(_LAST_RESORT_SECONDS)


def _end_soon() -> None:
    """Make sure that the process ends, even if a destructor waits for a rank that is gone."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - it is kept open until the end.
    faulthandler.dump_traceback_later(_LAST_RESORT_SECONDS, exit=True, file=nowhere)
