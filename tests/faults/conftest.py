"""What the tests of faults share: a quick way to run the program, and the ledger of what became of each case."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.faults.ledger import PROPERTY, Ledger
from tests.faults.runs import Bench, build_bench
from tests.faults.zygote import Zygote

FULL = os.environ.get("DPO_FAULTS") == "full"
"""Whether every case is tried (`make faults`), or of each kind a few (`make test`)."""

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Takes down what became of each case; `make faults` makes a table of it."""
    ledger = Ledger()
    yield ledger
    if request.node.stash[_FAILED]:
        ledger.record_failure(request.node.name)
    request.node.user_properties += [(PROPERTY, entry) for entry in ledger.entries()]


@pytest.fixture(scope="session")
def bench(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, demo_rows: list[dict[str, str]]
) -> Callable[[str, int], Bench]:
    """Return the bench of a kind of run and a number of processes."""

    @functools.cache
    def find(name: str, num_ranks: int) -> Bench:
        return build_bench(zygote, tmp_path_factory.mktemp("bench"), tiny_llama, demo_rows, name, num_ranks)

    return find
