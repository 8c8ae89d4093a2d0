"""Processes that write one folder together: what fails in any of them is an error in all."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from accelerate.utils import gather_object
from torch import distributed

from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.folders.saving import disk_refusals
from dpo_cli.system.disks import first_of_each_disk
from dpo_cli.system.launchers import named_ranks
from dpo_cli.system.storage import DamagedFolder
from dpo_cli.training.collectives import ASIDE

Found = TypeVar("Found")

_LONGEST_WAIT = timedelta(hours=2)
"""How long a process waits for others in a save, as in all else; who is missing is found out before that."""

_DAMAGE_HINT = "check the disk, and whether another program writes to the folder; then resume"


class Together:
    """Processes that do something together on the disk, and tell each other over a group of their own.

    So a thread can write while the main thread computes. Every process has to make it, and to make the same calls.
    """

    def __init__(self) -> None:
        self.rank, self.num_ranks = distributed.get_rank(), distributed.get_world_size()
        self._named = named_ranks([self.rank], {self.rank: socket.gethostname()})
        self._group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT, group_desc=ASIDE)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that makes folders, seals them and renames them."""
        return self.rank == 0

    def of_all(self, found: Found) -> list[Found]:
        """Return what each process has found."""
        everywhere: list[Found] = [found] * self.num_ranks
        distributed.all_gather_object(everywhere, found, group=self._group)
        return everywhere

    def done(self, work: Callable[[], Found], doing: str, target: Path) -> list[Found]:
        """Do some work in every process; return what came of it in each.

        Args:
            work: What to do; it waits for no other process.
            doing: What failed, where it fails.
            target: What is written.

        Raises:
            UserError: It failed in one of them.
            Exception: It failed here, by a defect of the program.
        """
        result, refusal, defect = None, None, None
        try:
            with disk_refusals(doing, target):
                result = work()
        except UserError as error:
            refusal = (error.what, error.where, error.hint, error.status)
        except DamagedFolder as damage:
            refusal = (f"{doing} failed: {damage}", str(target), _DAMAGE_HINT, FAILED)
        except Exception as error:
            # The others would wait for a process that has ended.
            what, defect = f"{doing} failed: {type(error).__name__}: {error}", error
            refusal = (what, str(target), f"the log of {self._named} tells more", FAILED)
        found = self.of_all((result, self._named, refusal))
        if defect:
            raise defect
        for _, named, told in found:
            if told:
                what, where, hint, status = told
                raise UserError(f"{named}: {what}", where, hint, status=status)
        return [one for one, *_ in found]  # type: ignore[misc]

    def done_by_main(self, work: Callable[[], Found], doing: str, target: Path) -> Found:
        """Do some work in the main process; return in all what came of it.

        Raises:
            UserError: As `done`.
        """
        return self.done(lambda: work() if self.is_main else None, doing, target)[0]  # type: ignore[return-value]


def check_shared(folder: Path, num_ranks: int, why: str, otherwise: str) -> None:
    """Find out whether processes see the same files in a folder; every process has to ask.

    Args:
        folder: The folder, which is made where it is missing.
        num_ranks: How many, from the first on, have to.
        why: What they need it for.
        otherwise: What to do where they cannot have one.

    Raises:
        UserError: Some do not.
    """
    first = first_of_each_disk(folder, gather_object)
    hosts = gather_object([socket.gethostname()])
    # Where rank 0 has written nothing, there was nothing to see.
    blind = [rank for rank in range(num_ranks) if first[rank] != 0] if first[0] == 0 else [0]
    if blind:
        cannot = "see the files of rank 0" if first[0] == 0 else "write to it"
        what = f"{why} a folder that all processes share: {named_ranks(blind, hosts)} cannot {cannot}"
        hint = f"set `output_dir` to a folder on a disk that all machines share; or {otherwise}"
        raise UserError(what, str(folder), hint)
