"""A stage of the check, and what it is given: where it computes, how large, and where its answers go."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class TooLong(Exception):
    """A stage took more than its time."""


class NotBuilt(Exception):
    """The program has no such setting or module yet."""


@dataclass(frozen=True)
class Check:
    """What every stage is given.

    Attributes:
        device: Where it computes.
        dry: Whether sizes are tiny: to see that the check runs.
        out: A folder for what is written on the way.
        stage: The stage that runs.
    """

    device: torch.device
    dry: bool
    out: str
    stage: str = ""

    def tell(self, **facts: Any) -> None:
        """Give an answer at once: a line of JSON."""
        sys.stdout.write(json.dumps({"stage": self.stage, **facts}) + "\n")
        sys.stdout.flush()

    @property
    def on_cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def reset_peak(self) -> None:
        """Begin to measure the largest memory of the device."""
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Return the largest memory of the device since then; None on a CPU."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 3) if self.on_cuda else None

    def milliseconds(self, work: Callable[[], Any], times: int = 3) -> float:
        """Do work once to warm up and then some times; return what one takes."""
        work()
        self._wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self._wait()
        return 1e3 * (time.perf_counter() - started) / times

    def _wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Stage:
    """One question to the card.

    Attributes:
        name: What it is called in the answers.
        seconds: The most that it may take.
        ask: Gives the answers.
    """

    name: str
    seconds: int
    ask: Callable[[Check], None]

    def run(self, check: Check, seconds: int) -> None:
        """Ask, within some seconds; what goes wrong is an answer too."""

        def stop(*_: object) -> None:
            raise TooLong(f"more than {seconds} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(seconds)
        started = time.perf_counter()
        try:
            self.ask(check)
            check.tell(done=True, seconds=round(time.perf_counter() - started, 1))
        except NotBuilt as reason:
            check.tell(not_built=str(reason)[:400])
        except Exception as error:
            where = [line.strip() for line in traceback.format_exc().splitlines()[-5:-1]]
            check.tell(error=f"{type(error).__name__}: {str(error)[:400]}", where=where)
        finally:
            signal.alarm(0)
            torch._dynamo.reset()
            gc.collect()
            if check.on_cuda:
                torch.cuda.empty_cache()
