"""The page of the first run, followed from its first command to its last, ends with a model that answers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_rows

pytestmark = pytest.mark.program

PAGE = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    dpo (.*)$", PAGE, re.M)
(SNIPPET,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, demo_rows) -> Path:
    """A folder with pairs and a model, and nothing else."""
    write_rows(tmp_path / "pairs.jsonl", demo_rows[:60])
    shutil.copytree(tiny_llama, tmp_path / "path" / "to" / "model")
    return tmp_path


def test_the_page_holds_every_command_of_a_first_run():
    assert {command.split()[0] for command in COMMANDS} == {"init", "prepare-data", "train", "eval", "sample", "export"}


def test_every_command_of_the_page_runs_after_those_before_it_and_the_model_answers(forked_dpo, folder):
    for command in COMMANDS:
        done = forked_dpo(*command.split(), cwd=folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (folder / "runs" / "slower" / "final").is_dir()
    answered = subprocess.run([sys.executable, "-c", SNIPPET], cwd=folder, capture_output=True, text=True, check=False)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
