"""What the processes of a run note of themselves for each other, and which of them the others cannot go on without.

Nothing here waits or talks: notes come in, and missing ranks come out. Seconds are those of the process that
looks; clocks of other machines play no part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

from dpo_cli.errors import FAILED


@dataclass(frozen=True)
class Note:
    """What a rank says of itself, again and again as long as it lives.

    Attributes:
        rank: Whose it is.
        count: Counts the notes of this rank.
        step: The optimizer step at hand; 0: none was begun.
        passes: Forward passes that were begun.
        in_step: Whether it is within a step, where all ranks have work or wait for one that has.
        last_pass: Whether it has begun the last pass of its share of the step, at whose end ranks wait for each other.
        farewell: Why the rank leaves; empty: all is done; None: it does not.
        status: The exit status with which it leaves.
        blames: The ranks because of which it leaves; its farewell is then what the others say, too.
        host: The name of its machine.
        pid: Its process there.
    """

    rank: int
    count: int = 0
    step: int = 0
    passes: int = 0
    in_step: bool = False
    last_pass: bool = False
    farewell: str | None = None
    status: int = 0
    blames: tuple[int, ...] = ()
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def encoded(self) -> str:
        """Write it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decoded(cls, text: bytes) -> Note:
        """Read what `encoded` wrote."""
        values = json.loads(text)
        return cls(**{**values, "blames": tuple(values["blames"])})

    def __str__(self) -> str:
        """Name the rank: `rank 1 (process 4242 on node7)`."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def position(self) -> tuple[int, bool]:
        """How far it is on the way to where all ranks wait for each other."""
        return self.step, self.last_pass

    @property
    def when(self) -> str:
        """Say where in the run it is."""
        return f"at step {self.step}" if self.step else "before step 1"


@dataclass(frozen=True)
class Missing:
    """Why a run cannot go on.

    Attributes:
        what: A line that names the ranks that are missing.
        ranks: Those ranks.
        status: The exit status that follows.
        said: Whether the main process said it itself.
    """

    what: str
    ranks: frozenset[int]
    status: int = FAILED
    said: bool = False


class Notes:
    """The notes of all ranks as one of them sees them.

    Args:
        rank: Who looks.
        num_ranks: How many there are.
        keeper: Which rank keeps the store through which notes are exchanged; None: a launcher does.
        now: The time at which it begins to look, in seconds.
    """

    def __init__(self, rank: int, num_ranks: int, keeper: int | None, now: float) -> None:
        self.rank, self._keeper = rank, keeper
        self.last: dict[int, Note] = {}
        self._noted = dict.fromkeys(range(num_ranks), now)
        self._moved = dict.fromkeys(range(num_ranks), now)
        self._answered = now
        self._lost: float | None = None

    def take(self, notes: Iterable[Note], now: float) -> None:
        """Take what the store answered."""
        self._answered = now
        for note in notes:
            before = self.last.get(note.rank)
            if before is None or before.count != note.count:
                self._noted[note.rank] = now
            if before is None or (before.step, before.passes) != (note.step, note.passes) or not note.in_step:
                self._moved[note.rank] = now
            self.last[note.rank] = note

    def lose(self, now: float) -> None:
        """Take it that the connection to the store broke, or that the store did not answer."""
        self._lost = now

    def missing(self, now: float, patience: float, grace: float) -> Missing | None:
        """Say which ranks are missing, if any.

        Args:
            now: The time, in seconds.
            patience: How long a rank may be silent, or get no further within a step, in seconds.
            grace: How long one may go on after another failed, or after the store was lost, in seconds: who fails
                for the same reason should say so itself, and who is done should not be taken for gone.
        """
        return (
            self._blamed() or self._failed(now, grace) or self._silent(now, patience, grace) or self._behind(patience)
        )

    def speaks(self, missing: Missing) -> bool:
        """Tell whether this rank has to say it: the lowest on its machine that is not missing itself."""
        own = self.last.get(self.rank)
        here = {note.rank for note in self.last.values() if own and note.host == own.host} | {self.rank}
        return not missing.said and self.rank == min(here - missing.ranks or here)

    def remaining(self, missing: Missing | None = None) -> set[int]:
        """Return the other ranks that have not said farewell and are not missing."""
        gone = missing.ranks if missing else frozenset()
        return {rank for rank in self._noted if rank != self.rank and rank not in gone and not self._has_left(rank)}

    def _has_left(self, rank: int) -> bool:
        return rank in self.last and self.last[rank].farewell is not None

    def _others(self) -> list[Note]:
        return [note for rank, note in self.last.items() if rank != self.rank]

    def _blamed(self) -> Missing | None:
        """Take over what another found that leaves because of it."""
        for note in self._others():
            if note.blames and note.farewell is not None:
                return Missing(note.farewell, frozenset(note.blames), note.status)
        return None

    def _failed(self, now: float, grace: float) -> Missing | None:
        """Look for one that said that it failed; the main process has shown it itself."""
        for note in self._others():
            if note.farewell and now - self._noted[note.rank] >= grace:
                what = f"{note} ended {note.when}: {note.farewell}"
                return Missing(what, frozenset([note.rank]), note.status, said=note.rank == 0)
        return None

    def _silent(self, now: float, patience: float, grace: float) -> Missing | None:
        """Look for those that write no notes any more."""
        lost = self._lost is not None and now - self._lost >= grace
        if lost or now - self._answered > patience:
            # Whoever keeps the store is gone with it; of the others nothing can be known.
            if self._keeper is None:
                return Missing("the launcher is gone: its store, by which ranks find each other, is shut", frozenset())
            silent = [self._keeper]
        else:
            silent = [
                rank
                for rank, noted in self._noted.items()
                if not self._has_left(rank) and self._answered - noted > patience
            ]
        return Missing("; ".join(self._silence(rank, now) for rank in silent), frozenset(silent)) if silent else None

    def _silence(self, rank: int, now: float) -> str:
        """Say that a rank is silent, since when, and where it was."""
        if rank not in self.last:
            return f"rank {rank} is gone: it never gave a sign of life"
        note, seconds = self.last[rank], now - self._noted[rank]
        return f"{note} is gone: its last sign of life came {seconds:.1f} s ago, {note.when}"

    def _behind(self, patience: float) -> Missing | None:
        """Look for those that keep all others from getting on with a step."""
        notes = self.last.values()
        if len(notes) < len(self._noted) or not all(
            note.in_step and self._answered - self._moved[note.rank] > patience for note in notes
        ):
            return None
        # Where all are equally far, each may be in a pass, or wait for another: nobody can be named.
        furthest = max(note.position for note in notes)
        behind = [note for note in notes if note.position < furthest]
        what = "; ".join(
            f"{note} hangs: it has got no further for {self._answered - self._moved[note.rank]:.1f} s, {note.when}"
            for note in behind
        )
        return Missing(what, frozenset(note.rank for note in behind)) if behind else None
