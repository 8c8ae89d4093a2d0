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
from dpo_cli.training.collectives import Exchanges

HINT = "look into what ended it (out of memory?); the last checkpoint is whole, and `--resume` continues from there"
_APART_HINT = (
    "start all ranks with the same version, configuration, data and settings, and check the network between them; "
    "the last checkpoint is whole, and `--resume` continues from there"
)


@dataclass(frozen=True)
class Note:
    """What a rank says of itself, again and again as long as it lives.

    Attributes:
        rank: Whose it is.
        count: Counts the notes of this rank.
        step: The optimizer step at hand; 0: none was begun.
        doing: What it does that others may wait for, empty within a step; None: what may take any time.
        exchanged: Another number whenever an operation with other ranks was begun or has ended.
        work: Another number whenever this process has computed a little, or shows in another way that it gets on.
        exchanges: Which operations it has begun and waits for; known once their number has stayed for a while.
        farewell: Why the rank leaves; empty: all is done; None: it does not.
        status: The exit status with which it leaves.
        blames: The ranks because of which it leaves, maybe none; its farewell is then what the others say, too.
        hint: What the others say to do about it.
        host: The name of its machine.
        pid: Its process there.
    """

    rank: int
    count: int = 0
    step: int = 0
    doing: str | None = None
    exchanged: int = 0
    work: int = 0
    exchanges: Exchanges | None = None
    farewell: str | None = None
    status: int = 0
    blames: tuple[int, ...] | None = None
    hint: str = HINT
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def encoded(self) -> str:
        """Write it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decoded(cls, text: bytes) -> Note:
        """Read what `encoded` wrote."""
        values = json.loads(text)
        blames, found = values["blames"], values["exchanges"]
        exchanges = None if found is None else Exchanges.decoded(found)
        return cls(**{**values, "blames": None if blames is None else tuple(blames), "exchanges": exchanges})

    def __str__(self) -> str:
        """Name the rank: `rank 1 (process 4242 on node7)`."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def when(self) -> str:
        """Say where in the run it is."""
        step = f"at step {self.step}" if self.step else "before step 1"
        return f"{self.doing}, {step}" if self.doing else step

    @property
    def waits(self) -> bool:
        """Whether its main thread waits for other ranks, as far as is known."""
        return self.exchanges is not None and any(not wait.aside for wait in self.exchanges.waits)

    def has_begun(self, group: str, number: int) -> bool:
        """Tell whether it has begun an operation of a group."""
        return self.exchanges is not None and self.exchanges.begun.get(group, 0) >= number


@dataclass(frozen=True)
class Missing:
    """Why a run cannot go on.

    Attributes:
        what: A line that names the ranks that are missing.
        ranks: Those ranks.
        status: The exit status that follows.
        said: Whether the main process said it itself.
        hint: What to do about it.
    """

    what: str
    ranks: frozenset[int]
    status: int = FAILED
    said: bool = False
    hint: str = HINT


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
        self._advanced = dict.fromkeys(range(num_ranks), now)
        self._worked = dict.fromkeys(range(num_ranks), now)
        self._answered = now
        self._lost: float | None = None

    def take(self, notes: Iterable[Note], now: float) -> None:
        """Take what the store answered."""
        self._answered = now
        for note in notes:
            before = self.last.get(note.rank)
            if before is None or before.count != note.count:
                self._noted[note.rank] = now
            if before is None or _position(before) != _position(note):
                self._advanced[note.rank] = now
            if before is None or before.work != note.work or note.doing is None:
                self._worked[note.rank] = now
            self.last[note.rank] = note

    def lose(self, now: float) -> None:
        """Take it that the connection to the store broke, or that the store did not answer."""
        self._lost = now

    def missing(self, now: float, silence: float, grace: float, stillness: float) -> Missing | None:
        """Say which ranks are missing, if any.

        Args:
            now: The time, in seconds.
            silence: How long a rank may be silent, in seconds.
            grace: How long one may go on after another failed, or after the store was lost, in seconds: who fails
                for the same reason should say so itself, and who is done should not be taken for gone.
            stillness: How long no rank may get any further while some wait for others, in seconds.
        """
        return self._blamed() or self._failed(now, grace) or self._silent(now, silence, grace) or self._stuck(stillness)

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
            if note.blames is not None and note.farewell is not None:
                return Missing(note.farewell, frozenset(note.blames), note.status, hint=note.hint)
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

    def _stuck(self, patience: float) -> Missing | None:
        """Look for those that keep others waiting, where no rank gets any further."""
        notes = [note for _, note in sorted(self.last.items())]
        if len(notes) < len(self._noted) or not all(self._is_still(note, patience) for note in notes):
            return None
        # Of several groups of ranks, some wait for ranks that wait themselves: they are not to blame.
        waiting = [(note, wait) for note in notes if note.exchanges for wait in note.exchanges.waits]
        behind = [
            note
            for note in notes
            if not note.waits
            and any(note.rank in wait.ranks and not note.has_begun(wait.group, wait.number) for _, wait in waiting)
        ]
        if behind:
            what = "; ".join(f"{note} hangs: {self._stillness(note)}, {note.when}" for note in behind)
            return Missing(what, frozenset(note.rank for note in behind))
        return self._apart([(note, wait.what) for note, wait in waiting]) if waiting else None

    def _is_still(self, note: Note, patience: float) -> bool:
        """Tell whether a rank has got no further; one that waits for others may turn in circles meanwhile."""
        moved = self._advanced[note.rank]
        moved = moved if note.waits else max(moved, self._worked[note.rank])
        return note.farewell is None and self._answered - moved > patience

    def _stillness(self, note: Note) -> str:
        return f"it has got no further for {self._answered - self._advanced[note.rank]:.1f} s"

    def _apart(self, waiting: list[tuple[Note, str]]) -> Missing:
        """Say what each rank waits for, where all that others wait for wait themselves."""
        alike: dict[str, list[Note]] = {}
        for note, what in waiting:
            alike.setdefault(f"{what}, {note.when}", []).append(note)
        if len(alike) == 1:
            [(what, notes)] = alike.items()
            said = f"no rank is behind, and what all wait for does not end: {what}; {self._stillness(notes[0])}"
        else:
            each = (f"{_some(notes)} for {what}" for what, notes in alike.items())
            said = f"the ranks wait for different operations: {'; '.join(each)}"
        return Missing(said, frozenset(), hint=_APART_HINT)


def _position(note: Note) -> tuple[int, str | None, int]:
    return note.step, note.doing, note.exchanged


def _some(notes: list[Note]) -> str:
    """Name the first of some ranks, and how many there are."""
    return f"{notes[0]}" + f" and {len(notes) - 1} more" * (len(notes) > 1)
