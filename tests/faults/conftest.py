"""What the tests of faults share: a quick way to run the program, and the ledger of what became of each case."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.journal import CPU_SECONDS, Recorder, read_journal
from tests.faults.ledger import PROPERTY, Ledger
from tests.faults.runs import Bench, build_bench
from tests.faults.zygote import ROUND, Zygote

FULL = ROUND in os.environ
"""Whether a round of `make faults` is run, or of most kinds a few cases (`make test`, `make test-rest`)."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep a journal in the process that the reports of all others come to."""
    journal = config.getoption("--faults-journal")
    if journal and not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(Recorder(journal), "faults-journal")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is known, and of later rounds what the first one has tried whole."""
    if not FULL:
        return
    journal = config.getoption("--faults-journal")
    known = {tried.test for tried in read_journal(journal) if tried.is_known} if journal else set()
    first = os.environ[ROUND] == "1"
    left = [item for item in items if item.nodeid not in known and (first or "share" in item.fixturenames)]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Takes down what became of each case; `make faults` makes a table of it."""
    zygote = request.getfixturevalue("zygote") if FULL and "zygote" in request.fixturenames else None

    def cpu_seconds() -> float:
        return time.process_time() + (zygote.cpu_seconds() if zygote else 0.0)

    ledger, before = Ledger(), cpu_seconds()
    yield ledger
    entries = [(PROPERTY, entry) for entry in ledger.entries()]
    request.node.user_properties += [*entries, (CPU_SECONDS, cpu_seconds() - before)]


@pytest.fixture(scope="session")
def bench(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, demo_rows: list[dict[str, str]]
) -> Callable[[str, int], Bench]:
    """Return the bench of a kind of run and a number of processes."""

    @functools.cache
    def find(name: str, num_ranks: int) -> Bench:
        return build_bench(zygote, tmp_path_factory.mktemp("bench"), tiny_llama, demo_rows, name, num_ranks)

    return find
