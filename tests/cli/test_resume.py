"""Whatever ends a run, `--resume` finishes it as if nothing had happened.

Killed at any moment, with damage to any file, after every step and whatever the run is made of: `tests/faults`.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import sys

import pytest

from tests.conftest import ROOT, build_llama, make_config, read_metrics, run_dpo, without_clock, write_rows
from tests.faults.disk_faults import OPEN, REACHED
from tests.faults.trials import Gate, named

WEIGHTS = "final/model.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_llama, demo_rows):
    """A run over two epochs whose checkpoints fall into the middle of them; the tests leave it as it is.

    Its steps are cut by a number of its own: a run with another cache would measure one anew, and round otherwise.
    """
    training = {"epochs": 2, "pairs_per_step": 5, "micro_batch_tokens": 512}
    settings = {"training": training, "checkpoints": {"every_steps": 3, "keep": 100}}
    folder = tmp_path_factory.mktemp("uninterrupted")
    pairs = write_rows(folder / "pairs.jsonl", demo_rows[:40])
    file = make_config(folder, tiny_llama, pairs, "whole", **settings, evaluation={"every_steps": 4})
    result = run_dpo("train", "--config", file)
    assert result.returncode == 0, result.stderr
    return file, folder / "runs" / "whole"


HELD = """
import sys
from dpo_cli.cli import main
from tests.faults.disk_faults import held_at_step
held_at_step(2, sys.argv.pop(1))
main()
"""
"""The program, which stands still after its second step until a gate is opened."""


def assert_same_run(run, whole):
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for split in ("train", "eval"):
        assert without_clock(read_metrics(run, split)) == without_clock(read_metrics(whole, split))
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == sorted(set(steps))
    assert not list(run.rglob(".*"))


def test_a_run_does_not_go_on_with_another_reference(forked_dpo, write_config, tmp_path, tokenizer):
    other = build_llama(tmp_path / "other", tokenizer, seed=1)
    reference = {"type": "frozen", "model": str(other)}
    file = write_config("whole", reference=reference, training={"max_steps": 3}, data={"eval": None})
    result = forked_dpo("train", "--config", file)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tmp_path / "runs" / "whole" / "final")
    build_llama(other, tokenizer, seed=2)
    result = forked_dpo("train", "--config", file, "--resume")
    assert result.returncode == 2
    assert "the reference is not the one that the run was started with" in result.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_finishes_the_step_saves_and_says_so(
    zygote, forked_dpo, uninterrupted, tmp_path, number, status
):
    file, whole = uninterrupted
    run, gate = tmp_path / "stopped", Gate(tmp_path / "gate")
    running = zygote.start("train", "--config", file, f"output_dir={run}", fault=named(gate.at_step(2)))
    gate.wait_for(running)
    running.send(number)
    running.until("stopping after this step")
    gate.open()
    ended = running.wait()
    assert ended.status == status
    assert "saved" in ended.said
    assert "Traceback" not in ended.said
    done = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {done}" in result.stderr
    assert_same_run(run, whole)


def test_when_the_terminal_is_closed_the_step_is_finished_and_saved(forked_dpo, uninterrupted, tmp_path):
    """As an ssh connection that breaks: the terminal takes no more words, and SIGHUP comes."""
    file, whole = uninterrupted
    run, gate = tmp_path / "hung-up", tmp_path / "gate"
    gate.mkdir()
    command = [sys.executable, "-c", HELD, str(gate), "train", "--config", str(file), f"output_dir={run}"]
    pid, terminal = pty.fork()
    if not pid:
        os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)})
    while not (gate / REACHED).exists():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    (gate / OPEN).touch()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    done = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    assert_same_run(run, whole)


def test_asked_to_stop_while_loading_it_stops_at_once(zygote, uninterrupted, tmp_path):
    file, _ = uninterrupted
    # It would go on for so long that nobody is too late to tell it.
    running = zygote.start("train", "--config", file, f"output_dir={tmp_path / 'early'}", "training.epochs=1000")
    running.until("loading")
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert ended.status == 143
    assert "Traceback" not in ended.said


def test_what_only_decides_memory_may_change_when_a_run_goes_on(forked_dpo, uninterrupted, tmp_path):
    file, whole = uninterrupted
    run = shutil.copytree(whole, tmp_path / "smaller")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={run}", "training.micro_batch_tokens=200")
    assert result.returncode == 0, result.stderr
    ours, theirs = ([row["loss"] for row in read_metrics(folder)] for folder in (run, whole))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_run_does_not_go_on_with_other_data(forked_dpo, uninterrupted, tmp_path):
    file, whole = uninterrupted
    run, pairs = shutil.copytree(whole, tmp_path / "other"), file.parent / "pairs.jsonl"
    shutil.rmtree(run / "final")
    text = pairs.read_text(encoding="utf-8")
    try:
        pairs.write_text(text.replace("a", "e"), encoding="utf-8")
        result = forked_dpo("train", "--config", file, "--resume", f"output_dir={run}")
    finally:
        pairs.write_text(text, encoding="utf-8")
    assert result.returncode == 2
    assert "the data is not the one that the run was started with" in result.stderr
