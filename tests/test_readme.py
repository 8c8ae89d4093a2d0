"""Every command that the README and the pages under docs show runs as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, write_rows
from tests.marks import slow_unless
from tests.waiting import PATIENCE

pytestmark = pytest.mark.program

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), ROOT / "CONTRIBUTING.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
# The page of the first run is followed in its own order, by test_first_run.
BY_THEMSELVES = TEXT.replace((ROOT / "docs" / "first-run.md").read_text(encoding="utf-8"), "")
LAUNCHER = r"(?:torchrun [^\n]*? -m dpo_cli|accelerate launch [^\n]*? -m dpo_cli|dpo)"
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone"],
    "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--main_process_port", "0"],
}
COMMANDS = sorted(
    set(
        re.findall(
            rf"^    ({LAUNCHER} (?:prepare-data|train|eval|sample|report|config)[^#\n]*?) *(?:#.*)?$",
            BY_THEMSELVES,
            re.M,
        )
    )
)

SHIPPED = ("quickstart", "lora")
"""Configurations that commands train and score."""
AFTER_A_RUN = ("eval", "sample", "report")
"""Commands that take what a run has left."""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama, demo_rows) -> Path:
    """A folder as the commands expect it, with a tiny model in place of the real one."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in SHIPPED:
        file = folder / "configs" / f"{name}.yaml"
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        settings["model"] = str(tiny_llama)
        settings["training"]["max_steps"] = 2
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    write_rows(folder / "pairs.jsonl", demo_rows[:20])
    (folder / "my.yaml").write_text(f"model: {tiny_llama}\ndata:\n  train: pairs.jsonl\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("Name the capital of France.\nName a prime.\n", encoding="utf-8")
    return folder


def test_there_are_commands_to_run():
    assert {command.split()[0] for command in COMMANDS} == {"dpo", "torchrun", "accelerate"}
    assert len(COMMANDS) >= 8


def _takes_a_run(command: str) -> bool:
    return any(f" {name} " in command for name in AFTER_A_RUN)


# Under torchrun, tests/cli/test_two_processes.py trains as well.
IN_ORDER = slow_unless(lambda c: not c.startswith("torchrun"), sorted(COMMANDS, key=lambda c: (_takes_a_run(c), c)))


@pytest.mark.parametrize("command", IN_ORDER)
def test_a_command_runs(project, forked_dpo, command):
    program, *words = command.split()
    if "train" in words and "--resume" not in words:
        shutil.rmtree(project / "runs", ignore_errors=True)
    if _takes_a_run(command):
        for run, configuration in re.findall(r"runs/(\w+)|(\w+)\.yaml", command):
            _leave_a_run(project, forked_dpo, run or configuration)
    if program == "dpo":
        done = forked_dpo(*words, cwd=project)
    else:
        words = words[words[0] == "launch" :]
        launch = [sys.executable, "-m", *LAUNCHERS[program], *words]
        done = subprocess.run(launch, cwd=project, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr


def _leave_a_run(project: Path, forked_dpo, name: str) -> None:
    """Train a configuration that has no run yet; a run that only its folder names is a copy of another one."""
    run = project / "runs" / name
    file = next((f for f in (f"configs/{name}.yaml", f"{name}.yaml") if (project / f).exists()), None)
    if run.exists():
        return
    if file is not None:
        assert forked_dpo("train", "--config", file, cwd=project).returncode == 0
        return
    _leave_a_run(project, forked_dpo, "my")
    shutil.copytree(project / "runs" / "my", run)


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", TEXT, re.M))
    assert named
    assert named <= targets


def test_every_link_to_a_file_or_a_heading_leads_somewhere():
    for page in PAGES:
        for name, _, heading in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", page.read_text(encoding="utf-8")):
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name} links to {name}"
            if heading:
                assert heading in _anchors(target), f"{page.name} links to {name}#{heading}"


def _anchors(page: Path) -> set[str]:
    """Return what links call the headings of a page: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
