"""What the processes of a run tell each other of themselves, and what follows when one of them falls silent.

Nothing here waits or talks: signs of life come in, and a judgement comes out. Seconds are those of the one who judges;
clocks of other machines play no part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dpo_cli.errors import FAILED


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Attributes:
        rank: Whose it is.
        beat: Counts the signs of this rank.
        step: The optimizer step at hand; 0: none was begun.
        progress: Counts what its main thread has done.
        stepping: Whether it is within a step, where all ranks have work or wait for one that has.
        waits: Whether its main thread stands where ranks wait for each other.
        place: The function of the program in which its main thread is.
        farewell: Why the rank leaves; empty: all is done; None: it does not.
        status: The exit status with which it leaves.
        blames: The ranks that it leaves for; what it says of them is its farewell.
        host: The name of its machine.
        pid: Its process there.
    """

    rank: int
    beat: int = 0
    step: int = 0
    progress: int = 0
    stepping: bool = False
    waits: bool = False
    place: str = ""
    farewell: str | None = None
    status: int = 0
    blames: tuple[int, ...] = ()
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def encoded(self) -> str:
        """Write it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decoded(cls, text: bytes) -> Sign:
        """Read what `encoded` wrote."""
        values = json.loads(text)
        return cls(**{**values, "blames": tuple(values["blames"])})

    def __str__(self) -> str:
        """Name the rank: `rank 1 (process 4242 on node7)`."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def whereabouts(self) -> str:
        """Say what it was at: `at step 12, in score_pairs`."""
        when = f"at step {self.step}" if self.step else "before step 1"
        return f"{when}, in {self.place}" if self.place else when


@dataclass(frozen=True)
class Verdict:
    """Why a run cannot go on.

    Attributes:
        what: A line that names who is gone.
        gone: The ranks that it is about.
        status: The exit status that follows.
        said: Whether the main process said it itself.
    """

    what: str
    gone: frozenset[int]
    status: int = FAILED
    said: bool = False


class Sightings:
    """The signs of all ranks as one of them sees them.

    Args:
        rank: Who looks.
        num_ranks: How many there are.
        host: Who keeps the store through which signs are given, as a rank; None: a launcher does.
        now: The time at which it begins to look, in seconds.
    """

    def __init__(self, rank: int, num_ranks: int, host: int | None, now: float) -> None:
        self.rank, self._host = rank, host
        self.last: dict[int, Sign] = {}
        self._beaten = dict.fromkeys(range(num_ranks), now)
        self._progressed = dict.fromkeys(range(num_ranks), now)
        self._answered = now
        self._lost: float | None = None

    def take(self, signs: Iterable[Sign], now: float) -> None:
        """Take what the store answered."""
        self._answered = now
        for sign in signs:
            before = self.last.get(sign.rank)
            if before is None or before.beat != sign.beat:
                self._beaten[sign.rank] = now
            if before is None or _progress(before) != _progress(sign):
                self._progressed[sign.rank] = now
            self.last[sign.rank] = sign

    def lose(self, now: float) -> None:
        """Take it that the connection to the store broke."""
        self._lost = now

    def judge(self, now: float, patience: float, grace: float) -> Verdict | None:
        """Say who is gone, if somebody is.

        Args:
            now: The time, in seconds.
            patience: How long a rank may be silent, or stand still within a step, in seconds.
            grace: How long one may go on after another failed, or after the store was lost, in seconds: who fails
                for the same reason should say so itself, and who is done should not be taken for gone.
        """
        return self._blamed() or self._failed(now, grace) or self._silent(now, patience, grace) or self._still(patience)

    def speaks(self, verdict: Verdict) -> bool:
        """Tell whether it is for this rank to say it: the lowest on its machine that is not gone itself."""
        own = self.last.get(self.rank)
        here = {sign.rank for sign in self.last.values() if own and sign.host == own.host} | {self.rank}
        return not verdict.said and self.rank == min(here - verdict.gone or here)

    def remaining(self, verdict: Verdict | None = None) -> set[int]:
        """Return the other ranks that have not said farewell and are not gone."""
        gone = verdict.gone if verdict else frozenset()
        return {rank for rank in self._beaten if rank != self.rank and rank not in gone and self._left(rank) is None}

    def _left(self, rank: int) -> str | None:
        """Return a rank's farewell, or None."""
        sign = self.last.get(rank)
        return sign.farewell if sign else None

    def _others(self) -> Iterator[Sign]:
        return (sign for rank, sign in self.last.items() if rank != self.rank)

    def _blamed(self) -> Verdict | None:
        """Take over the judgement of another that leaves for it."""
        for sign in self._others():
            if sign.blames and sign.farewell is not None:
                return Verdict(sign.farewell, frozenset(sign.blames), sign.status)
        return None

    def _failed(self, now: float, grace: float) -> Verdict | None:
        """Look for one that said that it failed; the main process has told the user itself."""
        for sign in self._others():
            if sign.farewell and now - self._beaten[sign.rank] >= grace:
                what = f"{sign} ended {sign.whereabouts}: {sign.farewell}"
                return Verdict(what, frozenset([sign.rank]), sign.status, said=sign.rank == 0)
        return None

    def _silent(self, now: float, patience: float, grace: float) -> Verdict | None:
        """Look for those that give no signs any more."""
        lost = self._lost is not None and now - self._lost >= grace
        if lost or now - self._answered > patience:
            # Whoever keeps the store is gone with it; of the others nothing can be known.
            if self._host is None:
                return Verdict("the launcher is gone: its store, by which ranks find each other, is shut", frozenset())
            silent = [self._host]
        else:
            silent = [
                rank
                for rank, beaten in self._beaten.items()
                if self._left(rank) is None and self._answered - beaten > patience
            ]
        if not silent:
            return None
        return Verdict("; ".join(self._silence(rank, now) for rank in silent), frozenset(silent))

    def _silence(self, rank: int, now: float) -> str:
        """Say that a rank is silent, since when, and what it was at."""
        sign = self.last.get(rank)
        if sign is None:
            return f"rank {rank} is gone: it never gave a sign of life"
        seconds = now - self._beaten[rank]
        return f"{sign} is gone: its last sign of life came {seconds:.1f} s ago, {sign.whereabouts}"

    def _still(self, patience: float) -> Verdict | None:
        """Look for those that keep all others from getting on with a step."""
        if len(self.last) < len(self._beaten) or not all(
            sign.stepping and self._answered - self._progressed[rank] > patience for rank, sign in self.last.items()
        ):
            return None
        hanging = [sign for sign in self.last.values() if not sign.waits]
        if not hanging:
            return None
        what = "; ".join(
            f"{sign} hangs: it has stood still for {self._answered - self._progressed[sign.rank]:.1f} s, "
            f"{sign.whereabouts}"
            for sign in hanging
        )
        return Verdict(what, frozenset(sign.rank for sign in hanging))


def _progress(sign: Sign) -> tuple[int, int, bool]:
    """Return what changes when a main thread gets any further."""
    return sign.step, sign.progress, sign.stepping
