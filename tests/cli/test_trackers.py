"""Where metrics go beside metrics.jsonl: TensorBoard as it is, W&B as it is called."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from dpo_cli.reporting.trackers import MLflow, Tracker
from dpo_cli.settings import types
from tests.conftest import read_metrics, read_samples

WANDB = """
import json, os

def told(**what):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class config:
    update = staticmethod(lambda values, **how: told(config=values, **how))

def Table(columns, data, dataframe=None):
    if os.environ.get("REFUSES_TABLES"):
        raise PermissionError("files may not be kept")
    return {"columns": columns, "data": data}

class Run:
    log = staticmethod(lambda values, step=None: told(log=values, step=step))
    finish = staticmethod(lambda: told(finish=True))

def init(**what):
    if os.environ.get("REFUSES"):
        raise RuntimeError("api_key not configured (no-tty)")
    told(init=what)
    return Run()
"""
"""A module with the part of wandb's interface that a run uses; it writes down what it is told."""


@pytest.fixture
def wandb(tmp_path):
    """The environment in which `import wandb` finds that module, and a function that reads what it was told."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(WANDB)
    environment = {"PYTHONPATH": str(tmp_path / "modules"), "TOLD": str(tmp_path / "told")}
    return environment, lambda: list(map(json.loads, (tmp_path / "told").read_text().splitlines()))


def board_of(folder):
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    board = EventMultiplexer().AddRunsFromDirectory(str(folder))
    board.Reload()
    return board


def test_tensorboard_shows_one_run_by_its_name_with_all_metrics_also_after_a_crash(forked_dpo, write_config, tmp_path):
    """The crash came after step 7, the last checkpoint is of step 6; a second start does not show steps twice."""
    run = tmp_path / "runs" / "run"
    result = forked_dpo("train", "--config", write_config(tracking="tensorboard"))
    assert result.returncode == 0, result.stderr
    for again in (False, True):
        if again:
            shutil.rmtree(run / "final")
            shutil.rmtree(run / "checkpoints" / "step-000008")
            resumed = forked_dpo("train", "--config", tmp_path / "run.yaml", "--resume")
            assert "resuming after step 6" in resumed.stderr
        board = board_of(run / "trackers")
        assert list(board.Runs()) == ["run"]
        for split, steps in (("train", list(range(1, 9))), ("eval", [0, 8])):
            rows = read_metrics(run, split)
            for name in ("loss", "logps/accuracies"):
                shown = board.Scalars("run", f"{split}/{name}")
                assert [event.step for event in shown] == steps
                assert [event.value for event in shown] == pytest.approx([row[name] for row in rows], rel=1e-6)
        for where in {row["where"] for row in read_samples(run)}:
            texts = board.Tensors("run", f"samples/{where}/text_summary")
            answers = [row["answer"] for row in read_samples(run) if row["where"] == where]
            # Of texts TensorBoard drops none that come twice.
            assert [event.step for event in texts] == [0, 8, *[8] * again]
            for event, answer in zip(texts, [*answers, answers[-1]], strict=False):
                assert answer in event.tensor_proto.string_val[0].decode()
    assert len(list((run / "trackers").rglob("*tfevents*"))) == 2
    assert board_of(tmp_path / "runs").Runs().keys() == {"run/trackers/run"}


def test_wandb_is_told_project_and_name_and_a_resumed_run_is_the_same_run(forked_dpo, write_config, tmp_path, wandb):
    environment, told = wandb
    file = write_config(tracking=[{"type": "wandb", "project": "mine"}])
    run = tmp_path / "runs" / "run"
    assert forked_dpo("train", "--config", file, env=environment).returncode == 0
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    assert forked_dpo("train", "--config", file, "--resume", env=environment).returncode == 0
    first, second = (entry["init"] for entry in told() if "init" in entry)
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mine", "run", "allow")
    assert first["dir"] == str(run / "trackers")
    settings = next(entry["config"] for entry in told() if "config" in entry)
    assert settings["training.pairs_per_step"] == 4
    logged = [(entry["step"], entry["log"]) for entry in told() if "log" in entry]
    assert [step for step, _ in logged] == [0, 0, *range(1, 9), 8, 8, 7, 8, 8, 8]
    tables = [(step, values["samples"]) for step, values in logged if "samples" in values]
    assert [step for step, _ in tables] == [0, 8, 8]
    rows = [row for row in read_samples(run) if row["step"] == 8]
    assert tables[-1][1] == {"columns": [*rows[0]], "data": [[*row.values()] for row in rows]}
    assert logged[0][1]["eval/loss"] == read_metrics(run, "eval")[0]["loss"]
    assert told()[-1] == {"finish": True}

    assert forked_dpo("train", "--config", file, "--overwrite", env=environment).returncode == 0
    assert [entry["init"]["id"] for entry in told() if "init" in entry][2] != first["id"]


def test_a_tracker_that_does_not_start_is_an_error(forked_dpo, write_config, wandb):
    environment, _ = wandb
    result = forked_dpo("train", "--config", write_config(tracking="wandb"), env={**environment, "REFUSES": "1"})
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "a tracker did not start (wandb): RuntimeError: api_key not configured" in result.stderr


def test_a_tracker_that_takes_numbers_and_no_answers_does_not_end_the_run(forked_dpo, write_config, tmp_path, wandb):
    environment, told = wandb
    file = write_config(tracking="wandb", training={"max_steps": 2})
    result = forked_dpo("train", "--config", file, env={**environment, "REFUSES_TABLES": "1"})
    assert result.returncode == 0, result.stderr
    samples = tmp_path / "runs" / "run" / "samples.jsonl"
    what = "the tracker `wandb` did not take answers: PermissionError: files may not be kept"
    assert result.stderr.count(f"warning: {what}; `{samples}` has them") == 2
    assert {row["step"] for row in read_samples(samples.parent)} == {0, 2}
    assert [entry["step"] for entry in told() if "log" in entry] == [0, 1, 2, 2]


def test_mlflow_is_given_the_answers_of_each_evaluation_as_a_file(monkeypatch):
    """As it is called, where it is not installed; the next test asks the package itself."""
    kept = {}
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_text=lambda text, file: kept.update({file: text})))
    answers = [{"step": 120, "where": f"a:{n}", "prompt": "Wie?", "answer": "So.\nÄ \U0001f600"} for n in range(2)]
    MLflow().show_samples(None, answers)
    MLflow().show_samples(None, [{**answers[0], "step": 0}])
    assert sorted(kept) == ["samples/step-000000.jsonl", "samples/step-000120.jsonl"]
    assert list(map(json.loads, kept["samples/step-000120.jsonl"].splitlines())) == answers


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_keeps_the_answers_and_a_resumed_run_is_the_same_run(forked_dpo, write_config, tmp_path):
    package = Path(importlib.util.find_spec("mlflow").origin).parents[1]
    # In files, which takes no database.
    env = {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    env["PYTHONPATH"] = str(package)
    file, run = write_config(tracking="mlflow"), tmp_path / "runs" / "run"
    done = forked_dpo("train", "--config", file, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "did not take answers" not in done.stderr
    number = (run / "trackers/mlflow-id").read_text(encoding="utf-8")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    assert forked_dpo("train", "--config", file, "--resume", env=env, cwd=tmp_path).returncode == 0
    assert (run / "trackers/mlflow-id").read_text(encoding="utf-8") == number
    kept = {path.name: path for path in tmp_path.rglob("samples/step-*.jsonl")}
    assert sorted(kept) == ["step-000000.jsonl", "step-000008.jsonl"]
    found = [json.loads(line) for name in sorted(kept) for line in kept[name].read_text(encoding="utf-8").splitlines()]
    assert found == read_samples(run)
    assert all(number.strip() in path.parts for path in kept.values())


def test_every_tracker_of_accelerate_is_known():
    assert set(types(Tracker)) == set(LOGGER_TYPE_TO_CLASS)
