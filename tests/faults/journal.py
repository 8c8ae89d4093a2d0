"""What `make faults` has tried, test by test: what was broken off goes on where it was, and rounds add up."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.ledger import PROPERTY, Outcome
from tests.faults.zygote import ROUND

ROOT = Path(__file__).parents[2]
CPU_SECONDS = "cpu_seconds"
"""The name under which a test's report carries what it took of the processors."""


@functools.cache
def code_digest(tests: str) -> str:
    """Digest the program and what tests are made of: what was tried holds of them alone.

    Args:
        tests: The file of tests, or the folder of what searches for inputs, from the root of the checkout.
    """
    whole, own = hashlib.sha256(), ROOT / tests
    bench = [found for found in (ROOT / "tests" / "faults").glob("*.py") if not found.name.startswith("test_")]
    own_files = own.glob("*.py") if own.is_dir() else [own]
    for found in sorted([*(ROOT / "dpo_cli").rglob("*.py"), *bench, *own_files]):
        whole.update(f"{found.relative_to(ROOT)}\0{found.stat().st_size}\0".encode() + found.read_bytes())
    return whole.hexdigest()[:16]


@dataclass(frozen=True)
class Tried:
    """A test that was run.

    Attributes:
        test: Its name, with its file.
        code: The digest of what it was run with.
        round: In which round.
        cases: Kind of fault, outcome and number.
        cpu_seconds: What it took of the processors.
        skipped: Why it was skipped, if it was.
    """

    test: str
    code: str
    round: int
    cases: list[tuple[str, str, int]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    skipped: str = ""

    @property
    def is_known(self) -> bool:
        """Whether another run would tell nothing more: the code is the same, and every case survived or was skipped."""
        survived = all(outcome == Outcome.SURVIVED.value for _, outcome, _ in self.cases)
        return survived and self.holds

    @property
    def holds(self) -> bool:
        """Whether it was run with the code that is there now."""
        file = self.test.partition("::")[0]
        return (ROOT / file).exists() and self.code == code_digest(file)


def read_journal(file: Path) -> list[Tried]:
    """Return the tests that were run with the code that is there now; of one that was run twice, the last time."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    tried = {found.test: found for found in (Tried(**json.loads(line)) for line in lines)}
    return [found for found in tried.values() if found.holds]


class Recorder:
    """Writes a line about each test as it ends, in the process that all reports come to.

    Args:
        file: The journal.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(exist_ok=True)
        self._file, self._failed, self._skipped = file, set[str](), dict[str, str]()
        # The code as it is before the first test: it may be changed while they run.
        for found in (ROOT / "tests" / "faults").glob("test_*.py"):
            code_digest(found.relative_to(ROOT).as_posix())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what became of a test when it is torn down."""
        if report.failed:
            self._failed.add(report.nodeid)
        if report.skipped:
            *_, reason = report.longrepr
            self._skipped[report.nodeid] = reason.removeprefix("Skipped: ")
        if report.when != "teardown":
            return
        cases: list[Any] = [value for name, value in report.user_properties if name == PROPERTY]
        seconds = sum(float(str(value)) for name, value in report.user_properties if name == CPU_SECONDS)
        if report.nodeid in self._failed and all(outcome == Outcome.SURVIVED.value for _, outcome, _ in cases):
            cases.append((f"failed: {report.nodeid.partition('::')[2]}", Outcome.LOST.value, 1))
        file = report.nodeid.partition("::")[0]
        line = {"test": report.nodeid, "code": code_digest(file), "round": int(os.environ[ROUND]), "cases": cases}
        line |= {CPU_SECONDS: round(seconds, 2), "skipped": self._skipped.get(report.nodeid, "")}
        with self._file.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
