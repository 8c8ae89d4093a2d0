"""`dpo train --dry-run`: checks all that a run would, says what it would take, and writes nothing."""

from __future__ import annotations

import collections
import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dpo_cli.config import as_config, load_config
from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.folders.loading import empty_policy, load_policy
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.pace import measure_pace, measured_layers
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.responses import Predictions, Responses
from dpo_cli.pipeline.forecast import DiskNeed, disk_need, warn_of_disk
from dpo_cli.pipeline.plan import unusual_rate
from dpo_cli.reporting.console import Console
from dpo_cli.training.run_folder import RunFolder
from tests.conftest import build_llama, read_metrics


@pytest.fixture
def dry(write_config, forked_dpo):
    """Run a dry run under groups of settings."""

    def run(*arguments: object, **groups: Any) -> Any:
        return forked_dpo("train", "--config", write_config(**groups), "--dry-run", *arguments)

    return run


def rows(printed: str) -> dict[str, str]:
    """Return the rows of the plan."""
    lines = [line for line in printed.split("\n\n")[0].splitlines() if line.strip()]
    return dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in lines)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_says_what_a_run_takes_and_says_nothing_twice(dry, tmp_path):
    result = dry(evaluation={"every_steps": 3})
    assert result.returncode == 0, result.stderr
    plan = rows(result.stdout)
    assert re.fullmatch(r"about [\d,]+ tokens per second, by 2 of 2 layers measured with random weights", plan["speed"])
    assert re.match(r"about [\d:]+ \(training [\d:]+, reference, unless it is cached [\d:]+, eval", plan["time"])
    assert re.match(r"[\d.]+ GiB at most \(model .* and 3 × .* of checkpoints\); [\d.]+ GiB are free", plan["disk"])
    assert not (tmp_path / "runs").exists()
    # What is said of the run is in the plan, and nowhere else.
    counts = collections.Counter(re.findall(r"^[a-z][a-z :]*(?=  )", result.stdout + result.stderr, re.MULTILINE))
    assert [name for name in plan if counts[name] > 1] == []
    said = [line for line in result.stderr.splitlines() if line]
    assert len(said) == len(set(said))


def test_of_an_adapter_it_says_what_trains_and_counts_that_alone_on_the_disk(dry):
    """On each of two layers, rank 2 beside 32 → 32 twice, 32 → 16 twice, 32 → 64 twice and 64 → 32."""
    result = dry(adapter={"type": "lora", "rank": 2, "rslora": True})
    assert result.returncode == 0, result.stderr
    plan, trained = rows(result.stdout), 2 * 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert plan["parameters"].endswith(f", of which {trained:,} are trained (rsLoRA rank 2 on 14 layers)")
    assert plan["weights"] == "float32"
    assert plan["speed"].startswith("about ")
    assert plan["disk"].startswith("0.00 GiB at most")


def test_a_quantized_base_is_told_counted_and_measured(dry, tiny_llama):
    model = {"name": str(tiny_llama), "quantize": "nf4", "dtype": "bfloat16"}
    result = dry(model=model, adapter={"type": "lora", "rank": 2})
    assert result.returncode == 0, result.stderr
    plan = rows(result.stdout)
    assert plan["weights"] == "nf4 in linear layers, bfloat16 elsewhere, float32 in the adapter"
    assert plan["parameters"] == rows(dry(adapter={"type": "lora", "rank": 2}).stdout)["parameters"]
    assert plan["speed"].startswith("about ")
    assert "not counted" not in plan["memory: at the peak"]


@pytest.mark.parametrize(
    ("settings", "rate", "said"),
    [
        ({}, 1e-6, ""),
        ({}, 5e-5, ""),
        ({}, 1e-4, "0.0001 is high where all weights train"),
        ({"adapter": "lora"}, 1e-6, "1e-06 is low for an adapter"),
        ({"adapter": "lora"}, 2e-6, ""),
        ({"adapter": "lora"}, 1e-3, ""),
    ],
)
def test_a_learning_rate_that_suits_the_other_way_to_train_is_warned_of(write_config, settings, rate, said):
    found = unusual_rate(load_config(write_config(**settings, training={"learning_rate": rate})))
    assert said in found
    assert bool(found) == bool(said)


def test_the_warning_about_the_learning_rate_is_there_once(dry, write_config, forked_dpo):
    settings = {"adapter": "lora", "training": {"learning_rate": 1e-6, "max_steps": 1}}
    for result in (dry(**settings), forked_dpo("train", "--config", write_config(**settings))):
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("low for an adapter: 5e-6 to 5e-5 are usual with an adapter") == 1


def test_it_works_beside_a_run_and_says_what_a_real_one_would_need(dry, write_config, forked_dpo, tmp_path):
    started = forked_dpo("train", "--config", write_config(training={"max_steps": 1}))
    assert started.returncode == 0, started.stderr
    for finished in (True, False):
        if not finished:
            shutil.rmtree(tmp_path / "runs/run/final")
        before = content(tmp_path / "runs")
        result = dry()
        assert result.returncode == 0, result.stderr
        assert "contains another run: training needs `--resume` or `--overwrite` there" in result.stderr
        assert rows(result.stdout)["steps"].startswith("8 of 4")
        assert content(tmp_path / "runs") == before
    (tmp_path / "runs/run/config.yaml").unlink()
    assert "the settings of the run are missing" in dry().stderr


def test_it_checks_whether_a_run_can_be_extended(write_config, forked_dpo):
    file = write_config(training={"max_steps": 3})
    assert forked_dpo("train", "--config", file).returncode == 0
    longer = ("train", "--config", file, "--dry-run", "training.max_steps=6")
    refused = forked_dpo(*longer, "--resume")
    assert (refused.returncode, "`--extend`" in refused.stderr) == (2, True)
    result = forked_dpo(*longer, "--extend")
    assert result.returncode == 0, result.stderr
    assert "extending the run from 3 to 6 steps" in result.stderr
    assert rows(result.stdout)["steps"].startswith("6 of 4")


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ({"reference": {"type": "frozen", "model": "./nowhere"}}, "there is no model folder"),
        ({"tracking": ["wandb"]}, "the tracker `wandb` is not installed"),
        ({"model": {"chat_template": "nowhere.jinja"}}, "chat template"),
    ],
    ids=["reference", "tracker", "template"],
)
def test_what_a_run_would_refuse_it_refuses(dry, tiny_llama, groups, error):
    if "model" in groups:
        groups["model"]["name"] = str(tiny_llama)
    result = dry(**groups)
    assert result.returncode == 2
    assert error in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("kind", ["frozen", "synced"])
def test_a_reference_that_does_not_fit_is_refused_without_its_weights(dry, tmp_path, tokenizer, kind):
    other = build_llama(tmp_path / "other", tokenizer, seed=1)
    settings = json.loads((other / "config.json").read_text())
    changed = {"vocab_size": 500} if kind == "frozen" else {"intermediate_size": 96}
    (other / "config.json").write_text(json.dumps({**settings, **changed}))
    moves = {"every_steps": 2} if kind == "synced" else {}
    result = dry(reference={"type": kind, "model": str(other), **moves})
    assert result.returncode == 2
    assert ("a vocabulary of 500" if kind == "frozen" else "names or shapes") in result.stderr


def test_a_disk_that_is_too_small_is_told_and_one_that_is_not_is_not(tmp_path, capsys):
    for free, told in ((2**40, False), (2**33, True)):
        need = DiskNeed(model=2**32, checkpoint=3 * 2**32, num_checkpoints=3, free=free)
        warn_of_disk(need, RunFolder(tmp_path / "run"), Console())
        said = capsys.readouterr().err
        assert ("is too small: 40.00 GiB at most" in said) == told
        assert ("`checkpoints.keep`" in said) == told


def test_a_model_that_is_too_large_to_be_measured_is_not(tmp_path, tokenizer):
    large = build_llama(tmp_path / "large", tokenizer, seed=0)
    (large / "model.safetensors").unlink()
    settings = json.loads((large / "config.json").read_text())
    size = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 200, "head_dim": 16384}
    (large / "config.json").write_text(json.dumps({**settings, **size}))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    ones = torch.ones_like(ids)
    predictions, responses = Predictions.of(ids[0].numpy()), Responses.of((2, 2))
    batch = PairBatch((0,), ids, ones, None, ones[0], predictions, ids[0], ids[0], ids[0], responses, 8)
    with pytest.raises(MemoryError, match="too little memory is free"):
        measure_pace(
            Policy.empty(str(large)),
            LAYOUTS["padded"],
            batch,
            contextlib.nullcontext,
            torch.optim.SGD,
            recomputed=False,
            collisions=False,
        )


@pytest.mark.parametrize(
    ("groups", "num_checkpoints"),
    [
        ({"checkpoints": {"every_steps": 3, "keep": 1}, "training": {"optimizer": "rmsprop"}}, 1),
        ({"checkpoints": {"every_steps": 9, "at_end": False}}, 0),
        ({"checkpoints": {"every_steps": 9}, "reference": {"type": "synced", "every_steps": 2}}, 1),
    ],
    ids=["some", "none", "with a reference that moves"],
)
def test_the_disk_holds_what_was_counted(write_config, forked_dpo, tmp_path, tiny_llama, groups, num_checkpoints):
    file = write_config(**{**groups, "training": {"pairs_per_step": 4, **groups.get("training", {})}})
    result = forked_dpo("train", "--config", file)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/run"

    class EightSteps:
        num_steps = 8

    need = disk_need(load_config(file), RunFolder(run), EightSteps(), Policy.load(str(tiny_llama)))
    assert len(read_metrics(run)) == EightSteps.num_steps
    # Headers of the files, and what else lies beside weights, is small where weights are not as tiny as here.
    assert need.model == pytest.approx((run / "final/model.safetensors").stat().st_size, rel=0.1)
    kept = list((run / "checkpoints").glob("step-*"))
    assert len(kept) == num_checkpoints
    # While the newest is written, the one before it is still there.
    assert need.num_checkpoints == (2 if groups["checkpoints"].get("keep") == 1 else num_checkpoints)
    for checkpoint in kept:
        files = [path for path in checkpoint.glob("*.safetensors") if "random" not in path.name]
        assert need.checkpoint == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)


def at_once(losses: list[float], every: int, between: int, keep: int, keep_best: int, *, at_end: bool) -> int:
    """Go through the steps of a run with such held-out losses; return how many checkpoints there were at most."""
    saved, known, most = set(), {}, 0
    for step, loss in enumerate(losses, 1):
        ends = step == len(losses)
        if step % between == 0 or ends:
            known[step] = loss
        best = sorted(known, key=lambda one: (known[one], one))[: max(keep_best, 1)]
        if step % every == 0 or step in best or (ends and at_end):
            saved.add(step)
            most = max(most, len(saved))
            saved = {*sorted(saved)[-keep:], *(saved & set(best))}
    return most


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    losses=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=12),
    every=st.integers(1, 13),
    between=st.integers(1, 5),
    keep=st.integers(1, 3),
    keep_best=st.integers(0, 3),
    at_end=st.booleans(),
)
def test_with_the_best_ones_the_disk_holds_no_more_than_was_counted(
    tiny_llama, tmp_path, losses, every, between, keep, keep_best, at_end
):
    class Steps:
        num_steps = len(losses)

    saving = {"every_steps": every, "keep": keep, "keep_best": keep_best, "at_end": at_end}
    evaluation = {"every_steps": between, "best_by": "loss"}
    config = as_config({"model": str(tiny_llama), "checkpoints": saving, "evaluation": evaluation})
    need = disk_need(config, RunFolder(tmp_path / "run"), Steps(), Policy.empty(str(tiny_llama)))
    assert at_once(losses, every, between, keep, keep_best, at_end=at_end) <= need.num_checkpoints
    assert need.num_checkpoints <= keep + max(keep_best, 1) + 1


def test_the_plan_says_that_its_steps_are_the_most_and_what_is_chosen_of_them(dry):
    """Of 8 steps: two newest ones, two best ones, and the one that is being written."""
    evaluation = {"every_steps": 1, "best_by": "rewards/margins", "patience": 3}
    result = dry(evaluation=evaluation, checkpoints={"keep_best": 2})
    assert result.returncode == 0, result.stderr
    plan = rows(result.stdout)
    assert plan["steps"].startswith("at most 8 of 4 pairs")
    chosen = "the best of all evaluations by rewards/margins, stopping after 3 without a better one"
    assert plan["final"] == f"{chosen}, keeping the best 2"
    assert " and 5 × " in plan["disk"]
    result = dry(evaluation={**evaluation, "patience": 9})
    assert "`evaluation.patience` 9 is never exhausted: the run has 8 evaluations after step 1" in result.stderr


def test_few_layers_are_measured_whole(tiny_llama, tmp_path, tokenizer):
    assert measured_layers(load_policy(str(tiny_llama))) == [2]
    deep = build_llama(tmp_path / "deep", tokenizer, seed=0)
    settings = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 12}))
    assert measured_layers(empty_policy(str(deep))) == [1, 5]
