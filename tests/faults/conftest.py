"""What the tests of faults share: a quick way to run the program, and the ledger of what became of each case."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.ledger import PROPERTY, Ledger
from tests.faults.zygote import Zygote

FULL = os.environ.get("DPO_FAULTS") == "full"
"""Whether every case is tried (`make faults`), or of each kind a few (`make test`)."""


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts runs of the program in a tenth of a second."""
    zygote = Zygote(tmp_path_factory.mktemp("output"))
    yield zygote
    zygote.close()


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Takes down what became of each case; `make faults` makes a table of it."""
    ledger = Ledger()
    yield ledger
    request.node.user_properties += [(PROPERTY, entry) for entry in ledger.entries()]
