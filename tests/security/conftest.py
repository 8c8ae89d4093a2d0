"""What the tests of hostile input share: a project that is right, a command, and a watch on what it takes."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.system.bounds import bounded_memory
from tests.cli.test_bad_inputs import Project, call, enter, errors, finished
from tests.conftest import write_rows


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit status, and what it said on both streams."""

    status: int
    said: str

    @property
    def errors(self) -> list[tuple[str, str]]:
        """Each error with its hint."""
        return errors(self.said)


Command = Callable[[str], Said]


@pytest.fixture
def dpo(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the program in this process."""

    def run(arguments: str) -> Said:
        capfd.readouterr()
        status = call(arguments)
        printed, said = capfd.readouterr()
        assert "Traceback" not in said, said
        return Said(status, printed + said)

    return run


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, demo_rows: list[dict[str, str]]) -> Path:
    """A folder with a model and pairs."""
    folder = tmp_path_factory.mktemp("intact")
    shutil.copytree(tiny_llama, folder / "model")
    write_rows(folder / "pairs.jsonl", demo_rows[:24])
    return folder


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory, intact: Path, tokenizer: Any) -> Path:
    """A project with a finished run in it."""
    return finished(tmp_path_factory.mktemp("started"), intact, tokenizer)


@pytest.fixture
def project(tmp_path: Path, intact: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project in the current folder; nothing has run in it."""
    return enter(tmp_path, intact, tokenizer, monkeypatch, tmp_path)


@contextlib.contextmanager
def within(seconds: float, megabytes: int) -> Iterator[None]:
    """Fail where what runs within takes more of the processor's time, or more memory than there was before."""
    started = time.process_time()
    with bounded_memory(megabytes << 20):
        yield
    assert time.process_time() - started < seconds
