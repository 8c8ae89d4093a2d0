"""Whatever ends a run, `--resume` finishes it as if nothing had happened.

Killed at any moment, with damage to any file, after every step and whatever the run is made of: `tests/faults`.
"""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import build_llama, dpo_command, make_config, read_metrics, run_dpo, without_clock, write_rows

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


def start(file, *arguments, env=None):
    return subprocess.Popen(
        dpo_command("train", "--config", file, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
    )


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
def test_asked_to_stop_it_finishes_the_step_saves_and_says_so(forked_dpo, uninterrupted, tmp_path, number, status):
    file, whole = uninterrupted
    run = tmp_path / "stopped"
    process = start(file, f"output_dir={run}")
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status
    assert "saved" in said
    assert "Traceback" not in said
    done = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {done}" in result.stderr
    assert_same_run(run, whole)


def test_when_the_terminal_is_closed_the_step_is_finished_and_saved(forked_dpo, uninterrupted, tmp_path):
    """As an ssh connection that breaks: the terminal takes no more words, and SIGHUP comes."""
    file, whole = uninterrupted
    run = tmp_path / "hung-up"
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, dpo_command("train", "--config", file, f"output_dir={run}"))
    while not (run / "metrics.jsonl").is_file() or not read_metrics(run):
        os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    done = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    result = forked_dpo("train", "--config", file, "--resume", f"output_dir={run}")
    assert result.returncode == 0, result.stderr
    assert_same_run(run, whole)


def test_asked_to_stop_while_loading_it_stops_at_once(uninterrupted, tmp_path):
    file, _ = uninterrupted
    process = start(file, f"output_dir={tmp_path / 'early'}")
    for line in process.stdout:
        if line.startswith("loading"):
            process.send_signal(signal.SIGTERM)
            break
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in said


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
