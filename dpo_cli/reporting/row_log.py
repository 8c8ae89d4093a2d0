"""The files to which a run adds rows, each with the step that it is of: `metrics.jsonl` and those beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dpo_cli.errors import FAILED, UserError, from_os_error
from dpo_cli.system.storage import is_open_at, rewritten

OF_THE_MACHINE = ("tokens_per_second", "seconds", "memory_bytes")
"""What a row says of the machine: of the same steps taken again it says something else."""


class RowLog:
    """A file of rows, in which those of each step are once, also after crashes.

    Args:
        path: The file.
        last_step: Rows of later steps, and an incomplete last line, were left by a crash; they are removed,
            since those steps run again. 0: nothing is done yet, and no row is kept.
        first: The row that the file begins with, even if it was lost; None: the one in the file.

    Attributes:
        evaluations: The rows of all evaluations so far, in their order.
    """

    def __init__(self, path: Path, last_step: int, first: dict[str, Any] | None = None) -> None:
        self._path = path
        self._keep(lambda row: 0 < row["step"] <= last_step or (0 == row["step"] < last_step and not first), first)

    @property
    def digest(self) -> str:
        """A digest of all rows so far, without speed, by which a resumed run checks that it still has them."""
        return self._digest.hexdigest()

    def forget(self, step: int, split: str | None = None) -> None:
        """Remove the rows of a step, those of a split alone if one is named: they are written again.

        Raises:
            UserError: The file cannot be written.
        """
        self.close()
        self._keep(lambda row: row["step"] != step or row.get("split") != split)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add rows; a reader of the file sees them at once.

        Raises:
            UserError: They cannot be written, or the file is gone.
        """
        try:
            if not is_open_at(self._file.fileno(), self._path):
                what = f"{self._path.name} was removed or replaced during the run"
                hint = "use `--resume` to continue from the last checkpoint if it still exists"
                raise UserError(what, str(self._path), hint, status=FAILED)
            lines = list(map(_line, rows))
            self._file.write("".join(lines))
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error
        for line in lines:
            self._remember(json.loads(line))

    def _keep(self, wanted: Callable[[dict[str, Any]], bool], first: dict[str, Any] | None = None) -> None:
        """Keep the rows that are wanted, after `first` if there is one, and append to them from now on."""
        self._digest = hashlib.sha256()
        self.evaluations: list[dict[str, Any]] = []
        try:
            # One row at a time: of many held-out pairs there are many.
            with rewritten(self._path) as file:
                if first:
                    self._keep_one(file, _line(first), first)
                for line, row in _whole_lines(self._path):
                    if wanted(row):
                        self._keep_one(file, line, row)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._refused(error) from error

    def _keep_one(self, file: BinaryIO, line: str, row: dict[str, Any]) -> None:
        file.write(line.encode())
        self._remember(row)

    def _refused(self, error: OSError) -> UserError:
        return from_os_error(error, f"writing {self._path.name}", str(self._path))

    def _remember(self, row: dict[str, Any]) -> None:
        """Add a row to the digest, without speed, which differs between runs, and to the evaluations if it is one."""
        self._digest.update(_digested(row))
        if row.get("split") == "eval":
            self.evaluations.append(row)

    def sync(self) -> None:
        """Flush the rows to the disk; called before a checkpoint that relies on them.

        Raises:
            UserError: It cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Close the file; a write that failed before may fail again, which is ignored."""
        with contextlib.suppress(OSError):
            self._file.close()


def digest_in(path: Path) -> str:
    """Return the digest of all rows of a file, as that of a `RowLog`."""
    return _digest_of(row for _, row in _whole_lines(path))


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that are complete; none where there is no file."""
    return [row for _, row in _whole_lines(path)]


def _digest_of(rows: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_digested(row))
    return digest.hexdigest()


def _digested(row: dict[str, Any]) -> bytes:
    """Return what a digest of rows knows of one: all but what differs between runs of the same steps."""
    known = {name: value for name, value in row.items() if name not in OF_THE_MACHINE}
    return json.dumps({**known, "tokens_per_second": None}, sort_keys=True).encode()


def _line(row: Mapping[str, Any]) -> str:
    """Write a row as JSON, which has no infinity: an overflowed gradient norm is null."""
    known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(known, allow_nan=False) + "\n"


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows that are complete, each with its line."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line.rstrip("\n") + "\n", row
