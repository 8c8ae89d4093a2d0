"""Ranks that are gone: the processes of a run watch each other, so that none waits for one that will not come.

What they compute together waits for every one of them; where one is killed, stopped or hangs, the others would wait for
hours. So a thread of each gives signs of life through the store by which the processes found each other, and reads
those of the others. The store may be gone as well and leave that thread waiting, so another one judges what was read.

A process that judges another to be gone says so and ends, whatever its main thread waits for. Outside of the steps
it lets the main thread finish first what it is at: prepared data, a block of the reference or a checkpoint is kept.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch.nn.modules.module import register_module_forward_pre_hook

from dpo_cli.errors import FAILED, UserError
from dpo_cli.reporting.console import Console
from dpo_cli.system.launchers import is_main_process
from dpo_cli.system.signals import STOPPING
from dpo_cli.training.signs import Sightings, Sign, Verdict

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")

_HINT = "look into what ended it (out of memory?); the last checkpoint is whole, and `--resume` goes on from there"
_SLOWEST_BEAT_SECONDS = 1.0
_LONGEST_GRACE_SECONDS = 10.0
_BEATS_OF_PATIENCE = 10
"""Signs of life that come, if all is well, in the time that a rank may be silent."""
_BEATS_OF_DOUBT = 4
"""Signs that a rank has to miss to be the one that broke a connection, where one broke."""
_LAST_RESORT_SECONDS = 10.0
"""After which a process that has to end does so, whatever it is stuck in."""


class Progress:
    """How far the main thread of this process is, for the other ranks to see.

    Attributes:
        finish: Waits until what is being saved in the background is saved.
    """

    def __init__(self) -> None:
        self.step, self.count, self.stepping = 0, 0, False
        self.finish: Callable[[], None] = lambda: None

    def following(self, results: Iterator[Result], done: int) -> Iterator[Result]:
        """Yield the results of steps; only while one is waited for, a main thread that stands still is judged.

        Args:
            results: One for each step.
            done: The steps that were taken before.
        """
        self.step = done
        while True:
            self.step, self.stepping = self.step + 1, True
            try:
                result = next(results)
            except StopIteration:
                return
            finally:
                self.stepping = False
            yield result

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count every layer of every forward pass while the context lasts."""

        def count(*_: object) -> None:
            self.count += 1

        hook = register_module_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()


@contextlib.contextmanager
def gathering(timeout: float | None) -> Iterator[None]:
    """Give the processes of a run some time to find each other; end this one where another does not come.

    Args:
        timeout: How long to wait for the others, in seconds; None: as long as torch does.

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
            _say(UserError(f"not all {num_ranks} ranks have come within {timeout:g} s", where, hint))
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
def watched(accelerator: Accelerator, timeout: float | None) -> Iterator[Progress]:
    """Watch the other ranks while the context lasts, and tell them how this one leaves it.

    Args:
        accelerator: Knows the ranks.
        timeout: How long a rank may be silent, or stand still within a step, in seconds; None: for ever.

    Raises:
        UserError: What was exchanged with another rank broke off, because it is gone.
    """
    progress = Progress()
    if accelerator.num_processes == 1:
        yield progress
        return
    with gathering(timeout):
        watch = _Watch(accelerator, timeout, progress)
    with progress.counted():
        try:
            yield progress
        except RuntimeError as error:
            verdict = watch.explain(error)
            if verdict is None:
                watch.leave(_reason(error), FAILED)
                raise
            # The console of the main process renders what is raised; those of the others are silent.
            if accelerator.process_index and watch.speaks(verdict):
                _say(_as_error(verdict))
            watch.leave(verdict.what, verdict.status, verdict)
            _end_soon()
            raise _as_error(verdict) from None
        except BaseException as error:
            watch.leave(_reason(error), getattr(error, "status", FAILED))
            raise
        watch.leave()


class _Watch:
    """Two threads of a process that see to the other ranks.

    Args:
        accelerator: Knows the ranks.
        timeout: How long one may be silent, in seconds, or None.
        progress: How far the main thread is.
    """

    def __init__(self, accelerator: Accelerator, timeout: float | None, progress: Progress) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        self._rank, self._num_ranks = accelerator.process_index, accelerator.num_processes
        self._patience = timeout or math.inf
        self._grace = min(self._patience, _LONGEST_GRACE_SECONDS)
        self._interval = min(self._patience / _BEATS_OF_PATIENCE, _SLOWEST_BEAT_SECONDS)
        self._doubt_seconds = _BEATS_OF_DOUBT * self._interval
        self._progress = progress
        # A connection of its own: on that of the process group, one call waits for another.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout or _LONGEST_GRACE_SECONDS))
        self._store = PrefixStore("dpo/ranks", store)
        keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self._keeps_store = self._rank == keeper
        self._lock, self._clock = threading.Lock(), 0.0
        self._sightings = Sightings(self._rank, self._num_ranks, keeper, self._clock)
        self._beat, self._all_there = 0, False
        self._farewell: tuple[str, int, tuple[int, ...]] = "", 0, ()
        self._verdict: Verdict | None = None
        self._leaves, self._doubts, self._judged = threading.Event(), threading.Event(), threading.Event()
        self._signs = threading.Thread(target=self._give_signs, name="signs of life", daemon=True)
        self._signs.start()
        threading.Thread(target=self._judge, name="judge of ranks", daemon=True).start()

    def explain(self, error: RuntimeError) -> Verdict | None:
        """Find out which rank is behind an error, if one is."""
        self._doubts.set()
        self._judged.wait(2 * self._doubt_seconds)
        if self._verdict is None and "gloo" in str(error):
            return Verdict(f"what the ranks exchanged broke off: {_reason(error)}", frozenset())
        return self._verdict

    def speaks(self, verdict: Verdict) -> bool:
        """Tell whether it is for this rank to say it."""
        with self._lock:
            return self._sightings.speaks(verdict)

    def leave(self, why: str = "", status: int = 0, verdict: Verdict | None = None) -> None:
        """Say farewell; the rank that keeps the store stays for a moment, for the others to read it."""
        self._farewell = why, status, tuple(sorted(verdict.gone)) if verdict else ()
        self._verdict = verdict
        self._leaves.set()
        self._signs.join(2 * self._doubt_seconds)

    def _give_signs(self) -> None:
        """Write this rank's signs and read the others', until it leaves or the store is lost."""
        try:
            while not self._leaves.is_set():
                self._exchange(self._sign())
                self._leaves.wait(self._interval)
            self._exchange(self._last_sign())
            until = time.monotonic() + self._doubt_seconds
            while self._keeps_store and self._sightings.remaining(self._verdict) and time.monotonic() < until:
                time.sleep(self._interval / 20)
                self._exchange(self._last_sign())
        except RuntimeError:
            with self._lock:
                self._sightings.lose(self._clock)

    def _exchange(self, sign: Sign) -> None:
        """Write one sign and read those of all ranks."""
        self._store.set(str(self._rank), sign.encoded())
        keys = [str(rank) for rank in range(self._num_ranks)]
        if not self._all_there:
            # To ask for one that is not there yet would be to wait for it.
            keys = [key for key in keys if self._store.check([key])]
            self._all_there = len(keys) == self._num_ranks
        signs = [Sign.decoded(text) for text in self._store.multi_get(keys)]
        with self._lock:
            self._sightings.take(signs, self._clock)

    def _sign(self) -> Sign:
        """Make the next sign of life."""
        self._beat += 1
        waits, place = _standing()
        at = self._progress
        return Sign(self._rank, self._beat, at.step, at.count, at.stepping, waits, place)

    def _last_sign(self) -> Sign:
        """Make a sign that says why this rank leaves."""
        why, status, blames = self._farewell
        return Sign(self._rank, self._beat + 1, step=self._progress.step, farewell=why, status=status, blames=blames)

    def _judge(self) -> None:
        """Look at what is known of the others again and again; end this process where one of them is gone."""
        before = time.monotonic()
        while not self._leaves.wait(self._interval):
            now = time.monotonic()
            # Who was stopped himself, or slept with his machine, could not have seen the others' signs.
            self._clock += min(now - before, 2 * self._interval)
            before = now
            verdict = self._found()
            if verdict and self._doubts.is_set():
                self._verdict = verdict
                self._judged.set()
                return
            if verdict and (self._progress.stepping or _standing()[0]):
                if self.speaks(verdict):
                    _say(_as_error(verdict))
                self.leave(verdict.what, verdict.status, verdict)
                with contextlib.suppress(Exception):
                    self._progress.finish()
                os._exit(verdict.status)

    def _found(self) -> Verdict | None:
        """Judge by the time-out or, where a connection broke, at once."""
        patience, grace = (self._doubt_seconds, 0.0) if self._doubts.is_set() else (self._patience, self._grace)
        with self._lock:
            return self._sightings.judge(self._clock, patience, grace)


def _standing() -> tuple[bool, str]:
    """Return whether the main thread stands where ranks wait for each other, and its function of the program."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits, place = False, ""
    while frame:
        module = str(frame.f_globals.get("__name__"))
        # A backward pass exchanges gradients; the sums of a step are where a GPU is waited for.
        waits |= module.startswith("torch.distributed") or module in ("torch.autograd", "dpo_cli.training.step_sums")
        if not place and module.startswith("dpo_cli.") and module != __name__:
            place = f"{module.rpartition('.')[2]}.{frame.f_code.co_qualname.partition('.<')[0]}"
        frame = frame.f_back
    return waits, place


def _reason(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return str(error).partition("\n")[0] or type(error).__name__


def _as_error(verdict: Verdict) -> UserError:
    return UserError(verdict.what, None, _HINT, status=verdict.status)


def _say(error: UserError) -> None:
    """Print an error from any rank, and be stopped by nothing: a pipe may be full that nobody reads."""
    speaker = threading.Thread(target=Console().error, args=(error,), daemon=True)
    speaker.start()
    speaker.join(_LAST_RESORT_SECONDS)


def _end_soon() -> None:
    """See to it that the process ends, even if a destructor waits for a rank that is gone."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - it is kept open until the end.
    faulthandler.dump_traceback_later(_LAST_RESORT_SECONDS, exit=True, file=nowhere)
