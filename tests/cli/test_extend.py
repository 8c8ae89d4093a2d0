"""A finished run goes on with more steps: exactly where its learning rate allows, and otherwise when told to."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import read_metrics, without_clock
from tests.faults.trials import Gate, named

NUM_STEPS = 8
"""Steps of an epoch: 32 pairs by fours, eight held out."""
CONSTANT = {"schedule": "constant", "warmup_ratio": 0, "pairs_per_step": 4, "micro_batch_tokens": 512}
AT_END = {"checkpoints": {"every_steps": 100}}


@pytest.fixture
def train(write_config, zygote):
    """Run training in an output folder of that name, under settings of `training` beside `CONSTANT`."""

    def run(name: str, *arguments: object, **training: Any) -> Any:
        file = write_config(name, training={**CONSTANT, **training}, **AT_END)
        return zygote.run("train", "--config", file, *arguments)

    return run


def done(ended: Any) -> str:
    assert ended.status == 0, ended.said
    return ended.said


def refused(ended: Any) -> str:
    assert ended.status == 2, ended.said
    assert "hint: " in ended.said
    return ended.said


def state_after(run: Path, step: int) -> dict[str, str]:
    """Return the digests of all that the state after a step is made of."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())
    files = {name: file["sha256"] for name, file in manifest["files"].items()}
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("short", "long", "steps"),
    [
        ({"epochs": 1}, {"epochs": 2}, (8, 16)),
        ({"epochs": 0.4}, {"epochs": 1.4}, (4, 12)),
        ({"epochs": 2, "max_steps": 3}, {"epochs": 2, "max_steps": 9}, (3, 9)),
        ({"epochs": 1, "warmup_ratio": 0.1}, {"epochs": 1.2, "warmup_ratio": 0.1}, (8, 10)),
        ({"schedule": "linear", "max_steps": 1}, {"schedule": "linear", "max_steps": 4}, (1, 4)),
    ],
    ids=["an epoch more", "parts of epochs", "max_steps", "as long a warm-up", "one step, whatever the schedule"],
)
def test_an_extended_run_is_byte_for_byte_one_that_was_started_longer(train, tmp_path, short, long, steps):
    runs = tmp_path / "runs"
    before, after = steps
    done(train("extended", **short))
    assert state_after(runs / "extended", before)
    said = done(train("extended", "--resume", **long))
    assert f"extending the run from {before} to {after} steps: the same as" in said
    assert f"resuming after step {before}" in said
    done(train("whole", **long))

    ours, theirs = runs / "extended", runs / "whole"
    weights = "final/model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert state_after(ours, after) == state_after(theirs, after)
    assert without_clock(read_metrics(ours)) == without_clock(read_metrics(theirs))
    held_out = {row["step"]: row for row in read_metrics(ours, "eval")}
    assert held_out.keys() == {0, before, after}
    assert [held_out[0], held_out[after]] == read_metrics(theirs, "eval")
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (ours, theirs)]
    assert configs[0]["training"] == configs[1]["training"]
    assert f"optimizer steps | {after}" in (ours / "final/README.md").read_text()
    # It is a finished run like any other.
    assert "is finished" in done(train("extended", "--resume", **long))


@pytest.mark.parametrize(("every", "named_too"), [(3, True), (4, False)])
def test_where_the_best_is_asked_for_an_evaluation_that_a_longer_run_would_not_have_is_named(
    write_config, zygote, tmp_path, every, named_too
):
    best = {"evaluation": {"every_steps": every, "best_by": "loss", "samples": 0}}
    file = write_config("run", training={**CONSTANT, "epochs": 2, "max_steps": 8}, **AT_END, **best)
    done(zygote.run("train", "--config", file))
    said = done(zygote.run("train", "--config", file, "--resume", "training.max_steps=10"))
    known = "the same as a run that was started with 10"
    named = f"{known}, but that the evaluation after step 8 counts for `evaluation.best_by` too\n"
    assert (named in said, f"{known}\n" in said) == (named_too, not named_too)
    # It counts.
    assert "final (step 10, the best" in said
    evaluated = [row["step"] for row in read_metrics(tmp_path / "runs" / "run", "eval")]
    assert evaluated == ([0, 3, 6, 8, 9, 10] if named_too else [0, 4, 8, 10])


@pytest.mark.parametrize(
    "training",
    [{"schedule": "linear"}, {"schedule": "cosine"}, {"warmup_ratio": 0.3}],
    ids=["linear", "cosine", "a longer warm-up"],
)
def test_where_the_learning_rate_would_have_been_another_it_is_refused(train, tmp_path, training):
    done(train("run", **training))
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    said = refused(train("run", "--resume", epochs=2, **training))
    assert "the learning rate of the first 8 steps would have been different in a run of 16 steps" in said
    assert "`--extend`" in said
    assert "`--overwrite`" in said
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


def test_told_to_it_goes_on_under_the_longer_schedule_and_says_what_the_learning_rate_does(train, tmp_path):
    linear = {"schedule": "linear", "learning_rate": 1e-3}
    done(train("run", **linear))
    said = done(train("run", "--extend", epochs=2, **linear))
    # Of 16 steps the ninth has done half: the share of the rate that is left is 1 − 8/16; at the last it is 1/16.
    course = re.search(r"the learning rate was (\S+) at step 8; it is (\S+) at the next and (\S+) at the last", said)
    assert [float(rate) for rate in course.groups()] == pytest.approx([1e-3 / 8, 1e-3 / 2, 1e-3 / 16], rel=0.05)
    assert "resuming after step 8" in said
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "runs" / "run")]
    shares = [1 - step / 8 for step in range(8)] + [1 - step / 16 for step in range(8, 16)]
    assert rates == pytest.approx([1e-3 * share for share in shares], rel=1e-9)
    # The same command again finds it finished; nothing is left to extend.
    assert "is finished" in done(train("run", "--extend", epochs=2, **linear))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_interrupted_while_it_is_extended_it_goes_on(train, write_config, zygote, tmp_path, number):
    linear = {"schedule": "linear"}
    done(train("whole", **linear))
    runs = tmp_path / "runs"
    shutil.copytree(runs / "whole", runs / "broken")
    done(train("whole", "--extend", epochs=2, **linear))

    file = write_config("broken", training={**CONSTANT, **linear, "epochs": 2}, **AT_END)
    gate = Gate(tmp_path / "gate")
    running = zygote.start("train", "--config", file, "--extend", fault=named(gate.at_step(2)))
    gate.wait_for(running)
    running.send(number)
    if number == signal.SIGTERM:
        running.until("stopping after this step")
        gate.open()
    assert running.wait().status == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (runs / "broken" / "final").exists()
    # By now the run is one of 16 steps, and nobody has to allow that again.
    said = done(zygote.run("train", "--config", file, "--resume"))
    assert "extending" not in said
    weights = "final/model.safetensors"
    assert (runs / "broken" / weights).read_bytes() == (runs / "whole" / weights).read_bytes()
    ours, theirs = (without_clock(read_metrics(runs / name)) for name in ("broken", "whole"))
    assert ours == theirs
    assert "with fewer steps" in refused(train("broken", "--resume", **linear))


def test_a_run_that_was_stopped_may_be_given_more_steps_as_well(train, tmp_path):
    done(train("run", max_steps=5))
    shutil.rmtree(tmp_path / "runs" / "run" / "final")
    assert "extending the run from 5 to 8 steps" in done(train("run", "--resume"))
    done(train("whole"))
    ours, theirs = (tmp_path / "runs" / name / "final/model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_as_many_steps_in_other_words_are_no_extension(train):
    done(train("run"))
    assert "is finished" in done(train("run", "--resume", max_steps=NUM_STEPS))


def test_fewer_steps_are_refused(train, tmp_path):
    done(train("run"))
    said = refused(train("run", "--resume", max_steps=4))
    assert "a run cannot be resumed with fewer steps: it was started with 8, and 4 are asked for" in said
    assert (tmp_path / "runs" / "run" / "final").is_dir()


def test_without_the_last_state_the_run_cannot_be_extended_and_says_how_it_could(train, tmp_path):
    done(train("run", "checkpoints.at_end=false"))
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()
    said = refused(train("run", "--resume", epochs=2))
    assert "the run cannot be extended: it has no checkpoint" in said
    assert "`checkpoints.at_end: true`" in said
    assert (tmp_path / "runs" / "run" / "final").is_dir()


def test_length_that_somebody_wrote_into_the_runs_settings_is_not_believed(train, tmp_path):
    done(train("run"))
    file = tmp_path / "runs" / "run" / "config.yaml"
    file.write_text(file.read_text().replace("epochs: 1", "epochs: many"))
    said = refused(train("run", "--resume", epochs=2))
    assert "cannot be read" in said


def test_a_run_that_was_moved_goes_on_where_it_is_and_is_not_begun_anew(train, zygote, tmp_path):
    """Its own config.yaml still names the old folder; a copy of the file alone starts a run there as before."""
    done(train("run", max_steps=2))
    old, new = tmp_path / "runs" / "run", tmp_path / "runs" / "renamed"
    old.rename(new)
    said = refused(zygote.run("train", new / "config.yaml", "--resume", "training.max_steps=4"))
    assert f"`output_dir={new}`" in said
    assert not old.exists()
    shutil.copy(new / "config.yaml", tmp_path / "config.yaml")
    said = done(zygote.run("train", new / "config.yaml", f"output_dir={new}", "--resume", "training.max_steps=4"))
    assert "resuming after step 2" in said
    said = done(zygote.run("train", tmp_path / "config.yaml", "--resume", "training.max_steps=1"))
    assert "starting from step 1" in said


def test_extend_and_overwrite_exclude_each_other(train):
    assert "`--extend` and `--overwrite` exclude each other" in refused(train("run", "--extend", "--overwrite"))
