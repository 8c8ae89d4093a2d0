"""What docs/operations.md promises to those who keep runs going: the one command, its exit statuses, the scripts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, read_metrics
from tests.faults.trials import Gate, named
from tests.waiting import PATIENCE

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
STATUSES = {int(status): again for status, again in re.findall(r"^\| (\d+) \| .* \| (.*) \|$", PAGE, re.M)}
"""Every exit status of the page's table, and whether a run should be started again then."""

FOUR_STEPS = {"training": {"max_steps": 4}, "data": {"eval": None}, "checkpoints": {"every_steps": 100}}


def block(start: str) -> str:
    """Return the script or unit on the page that holds some words."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.M)
    (found,) = [text for text in blocks if start in text]
    return re.sub(r"^    ", "", found, flags=re.M)


@pytest.fixture
def tools(tmp_path):
    """Put programs of the same name before those that a script calls; return the function that writes one."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def write(name: str, *lines: str) -> None:
        (folder / name).write_text("\n".join(["#!/bin/bash", *lines, ""]), encoding="utf-8")
        (folder / name).chmod(0o755)

    return write


def run_script(text: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script where `tools` come first."""
    path = f"{folder / 'tools'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


# The command and its exit statuses


def test_one_command_starts_a_run_and_finds_it_finished(zygote, write_config):
    file = write_config(**FOUR_STEPS)
    started = zygote.run("train", "--config", file, "--resume")
    assert (started.status, "no checkpoint yet: starting from step 1" in started.said) == (0, True), started.said
    again = zygote.run("train", "--config", file, "--resume")
    assert (again.status, "is finished" in again.said) == (0, True), again.said
    assert "step 1/" not in again.said


def test_every_status_of_the_page_is_tested_here():
    assert {status for status in STATUSES if status < 128} == {0, 1, 2}
    assert {status for status in STATUSES if status > 128} == {129, 130, 138, 143}


@pytest.mark.parametrize("status", [status for status in STATUSES if status > 128])
def test_a_signal_ahead_of_the_end_saves_the_step_and_the_same_command_goes_on(zygote, write_config, tmp_path, status):
    file = write_config(**{**FOUR_STEPS, "training": {"max_steps": 8}})
    run = tmp_path / "runs" / "run"
    gate = Gate(tmp_path / "gate")
    running = zygote.start("train", "--config", file, "--resume", fault=named(gate.at_step(1)))
    gate.wait_for(running)
    running.send(signal.Signals(status - 128))
    running.until("stopping after this step")
    gate.open()
    ended = running.wait()
    assert ended.status == status, ended.said
    assert "Traceback" not in ended.said
    done = read_metrics(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    again = zygote.run("train", "--config", file, "--resume")
    assert (again.status, f"resuming after step {done}" in again.said) == (0, True), again.said


def test_a_run_that_fails_ends_with_one_and_a_wrong_command_with_two(zygote, write_config):
    diverging = write_config("diverging", **{**FOUR_STEPS, "training": {"max_steps": 4, "learning_rate": 1e30}})
    failed = zygote.run("train", "--config", diverging, "--resume")
    assert (failed.status, "not finite" in failed.said) == (1, True), failed.said
    wrong = zygote.run("train", "--config", diverging, "--resume", "training.epochs=-1")
    assert (wrong.status, "hint:" in wrong.said) == (2, True), wrong.said


def test_what_the_page_says_that_one_sees_is_what_the_program_says():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dpo_cli").rglob("*.py"))
    table = PAGE[PAGE.index("| what you see |") :]
    quoted = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(quoted) >= 8
    for words in quoted:
        assert words in source


# Scripts


def test_the_loop_starts_a_run_again_where_the_page_says_so(tools, tmp_path):
    """A program of the same name ends with one status after the other, which a killed one's is the first of."""
    tools("dpo", 'echo "$@" >> called', 'status=$(head -n 1 statuses); sed -i 1d statuses; exit "$status"')
    tools("sleep")
    loop = block("while [")
    again = [status for status in STATUSES if STATUSES[status].startswith("yes")]
    assert again == [1, 138, 143]
    for last in sorted(STATUSES.keys() - set(again)):
        statuses = [137, *again, last]
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        (tmp_path / "called").unlink(missing_ok=True)
        assert run_script(loop, tmp_path).returncode == last
        calls = (tmp_path / "called").read_text().splitlines()
        assert calls == ["train --config run.yaml --resume"] * len(statuses)


def test_the_loop_gives_up_on_a_run_that_fails_every_time(tools, tmp_path):
    tools("dpo", "echo >> called", "exit 1")
    tools("sleep")
    assert run_script(block("while ["), tmp_path).returncode == 1
    assert len((tmp_path / "called").read_text().splitlines()) == 5


@pytest.mark.parametrize("status", [0, 1, 2, 138])
def test_the_slurm_script_asks_for_the_job_again_after_a_time_limit_alone(tools, tmp_path, status):
    tools("dpo", f"exit {status}")
    tools("srun", 'exec "$@"')
    tools("scontrol", 'echo "$@" > asked')
    script = block("#SBATCH --signal=USR1@300")
    assert run_script(script, tmp_path, SLURM_JOB_ID="77").returncode == status
    assert (tmp_path / "asked").exists() == (status == 138)
    if status == 138:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here to ask")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    program = tmp_path / "dpo"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "dpo.service"
    unit.write_text(block("[Service]").replace("/srv/dpo/.venv/bin/dpo", str(program)))
    command = ["systemd-analyze", "verify", "--recursive-errors=no", str(unit)]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    about_it = [line for line in asked.stderr.splitlines() if "dpo.service" in line]
    assert (asked.returncode, about_it) == (0, []), asked.stderr


def test_torchrun_hands_on_a_signal_and_its_workers_save(write_config, tmp_path):
    # They are stopped long before: nobody is too late to tell them.
    file = write_config(**{**FOUR_STEPS, "training": {"epochs": 1000}})
    run = tmp_path / "runs" / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--signals-to-handle", re.search(r"--signals-to-handle (\S+)`", PAGE)[1], "-m", "dpo_cli"]
    with subprocess.Popen(
        [*launch, "train", "--config", str(file), "--resume"], stderr=subprocess.PIPE, text=True
    ) as running:
        for line in running.stderr:
            if line.startswith("step 1/"):
                running.send_signal(signal.SIGUSR1)
                break
        said = running.stderr.read()
    assert running.returncode == 1
    done = read_metrics(run)[-1]["step"]
    assert f"stopped after step {done}" in said
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
