"""`final/` is the best evaluated step, and a run stops when it gets no better: exactly, however it was interrupted.

The runs learn from pairs of which every fourth is the wrong way round, which they learn by heart: their held-out loss
falls and then rises. What they should have chosen is read from metrics.jsonl by other means than the program's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.system.storage import verify
from tests.conftest import build_llama, make_config, read_metrics, without_clock, write_rows
from tests.faults.launching import run_ranks

CARD = ("README.md", "manifest.json")
"""What differs between runs of different names: the card names the run, and the manifest has its digest."""

NUM_STEPS = 16
SETTINGS: dict[str, Any] = {
    "training": {"epochs": 2, "pairs_per_step": 4, "learning_rate": 2e-3, "micro_batch_tokens": 600},
    "evaluation": {"every_steps": 1, "best_by": "loss", "samples": 0},
    "checkpoints": {"every_steps": 100, "keep": 1},
}


@pytest.fixture(scope="module")
def noisy(demo_rows):
    """Pairs of which every fourth is the wrong way round."""
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in demo_rows[:40]]
    return [turned[place] if place % 4 == 0 else row for place, row in enumerate(demo_rows[:40])]


@pytest.fixture(scope="module")
def train(tmp_path_factory, zygote, tiny_llama, noisy):
    """Run training in a folder of a name, under settings other than `SETTINGS`; return how it ended, and the run."""
    folder = tmp_path_factory.mktemp("best")
    pairs = write_rows(folder / "pairs.jsonl", noisy)

    def run(name: str, *arguments: object, model: Path = tiny_llama, ranks: int = 1, **groups: Any) -> Any:
        settings = {group: {**SETTINGS.get(group, {}), **groups.get(group, {})} for group in {**SETTINGS, **groups}}
        file = make_config(folder, model, pairs, name, **settings)
        return run_ranks(zygote, ranks, "train", "--config", file, *arguments), folder / "runs" / name

    return run


@pytest.fixture(scope="module")
def stopped(train):
    """A run that its patience has ended."""
    ended, run = train("stopped", evaluation={"patience": 3})
    assert ended.status == 0, ended.said
    return ended.said, run


def read_lowest(run: Path) -> int:
    """Read from metrics.jsonl which step after the first had the lowest held-out loss."""
    losses = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "eval" and row["step"]:
            losses[row["step"]] = row["loss"]
    return min(losses, key=losses.__getitem__)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def files(folder: Path, *leave_out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in leave_out}


def assert_same(run: Path, whole: Path) -> None:
    """Compare what two runs left, but for their names."""
    for name in ("final", *(f"checkpoints/{path.name}" for path in (whole / "checkpoints").iterdir())):
        assert files(run / name, *CARD) == files(whole / name, *CARD)
    assert saved(run) == saved(whole)
    for split in ("train", "eval"):
        assert without_clock(read_metrics(run, split)) == without_clock(read_metrics(whole, split))
    assert not list(run.rglob(".*"))


def test_the_trained_model_is_the_checkpoint_of_the_lowest_loss_bit_for_bit(stopped):
    _, run = stopped
    best, last = read_lowest(run), read_metrics(run)[-1]["step"]
    assert best < last
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run / "final", checkpoint(run, best)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    newest = load_file(checkpoint(run, last) / "model.safetensors")
    assert any(not torch.equal(tensor, newest[name]) for name, tensor in ours.items())
    verify(run / "final")
    AutoModelForCausalLM.from_pretrained(run / "final")


def test_it_stops_after_as_many_evaluations_as_its_patience_and_keeps_the_best_beside_the_newest(stopped):
    said, run = stopped
    best = read_lowest(run)
    assert [row["step"] for row in read_metrics(run)] == list(range(1, best + 3 + 1))
    assert f"stopping after step {best + 3}: the last 3 evaluations were no better by loss" in said
    assert saved(run) == [best, best + 3]


def test_the_card_names_the_step_and_shows_its_figures_beside_those_of_the_last(stopped):
    _, run = stopped
    best = read_lowest(run)
    losses = {row["step"]: f"{row['loss']:.4f}" for row in read_metrics(run, "eval")}
    card = (run / "final" / "README.md").read_text()
    described = f"step {best}, the best evaluation by loss (training went on to step {best + 3})"
    assert f"| optimizer steps | {best} |" in card
    assert f"| selected | {described} |" in card
    assert f"|  | before | best (step {best}) | last (step {best + 3}) |" in card
    assert f"| loss | {losses[0]} | {losses[best]} | {losses[best + 3]} |" in card


def test_a_resumed_run_that_patience_has_ended_is_finished_and_says_what_would_continue_it(stopped, train):
    _, run = stopped
    before = files(run / "final")
    best = read_lowest(run)
    ended, _ = train("stopped", "--resume", evaluation={"patience": 3})
    assert ended.status == 0, ended.said
    assert "is finished" in ended.said
    told = f"it stopped after step {best + 3} of {NUM_STEPS}: 3 evaluations were no better by loss than step {best}"
    assert f"{told}; to continue it, raise `evaluation.patience`" in ended.said
    # More steps alone change nothing of that.
    ended, _ = train("stopped", "--extend", "training.epochs=3", evaluation={"patience": 3})
    assert ended.status == 0, ended.said
    assert "raise `evaluation.patience`" in ended.said
    assert files(run / "final") == before


@pytest.fixture(scope="module")
def whole(train):
    """A run without patience."""
    ended, run = train("whole", checkpoints={"keep_best": 3})
    assert ended.status == 0, ended.said
    return run


def test_with_more_patience_it_goes_on_and_ends_as_one_that_was_started_with_it(stopped, train, whole):
    copy = shutil.copytree(stopped[1], stopped[1].with_name("patient"))
    ended, _ = train("patient", "--resume", evaluation={"patience": 100}, checkpoints={"keep_best": 3})
    assert ended.status == 0, ended.said
    assert "takes more steps" in ended.said
    assert [row["step"] for row in read_metrics(copy)] == list(range(1, NUM_STEPS + 1))
    assert files(copy / "final", *CARD) == files(whole / "final", *CARD)
    for split in ("train", "eval"):
        assert without_clock(read_metrics(copy, split)) == without_clock(read_metrics(whole, split))


def test_so_many_of_the_best_are_kept_as_was_asked_for(whole):
    losses = {row["step"]: row["loss"] for row in read_metrics(whole, "eval") if row["step"]}
    best = sorted(losses, key=losses.__getitem__)[:3]
    assert saved(whole) == sorted({*best, NUM_STEPS})
    theirs = weights(checkpoint(whole, best[0]))
    assert all(torch.equal(one, theirs[name]) for name, one in weights(whole / "final").items())


def test_killed_after_the_last_checkpoint_and_before_the_trained_model_it_takes_no_step_more(stopped, train):
    _, run = stopped
    copy = shutil.copytree(run, run.with_name("finals"))
    shutil.rmtree(copy / "final")
    ended, _ = train("finals", "--resume", evaluation={"patience": 3})
    assert ended.status == 0, ended.said
    assert "stopping after step" in ended.said
    assert_same(copy, run)


def test_what_cannot_be_the_best_any_more_is_an_error_and_the_last_step_can_be_taken_instead(stopped, train):
    _, run = stopped
    best = read_lowest(run)
    copy = shutil.copytree(run, run.with_name("gone"))
    shutil.rmtree(copy / "final")
    shutil.rmtree(checkpoint(copy, best))
    ended, _ = train("gone", "--resume", evaluation={"patience": 3})
    assert ended.status == 1
    assert (
        f"warning: the best evaluation by loss so far is that after step {best}, which has no checkpoint" in ended.said
    )
    assert f"error: the checkpoint of the best step, {best}, cannot be used: manifest.json is missing" in ended.said
    assert "hint: " in ended.said and "Traceback" not in ended.said
    assert not (copy / "final").exists()
    # What the hint says.
    none = "evaluation.best_by=null", "evaluation.patience=null", "checkpoints.keep_best=0"
    ended, _ = train("gone", "--resume", *none)
    assert ended.status == 0, ended.said
    assert files(copy / "final", *CARD) == {
        name: content
        for name, content in files(checkpoint(copy, NUM_STEPS)).items()
        if name in files(copy / "final", *CARD)
    }


def test_rows_that_are_damaged_are_no_reason_to_choose_another_step(stopped, train):
    _, run = stopped
    copy = shutil.copytree(run, run.with_name("edited"))
    shutil.rmtree(copy / "final")
    rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(
        "".join(row for row in rows if f'"eval", "step": {read_lowest(run)},' not in row)
    )
    ended, _ = train("edited", "--resume", evaluation={"patience": 3})
    assert ended.status == 1
    assert "the best step is not known" in ended.said
    assert "Traceback" not in ended.said and not (copy / "final").exists()


def test_where_nothing_is_better_than_before_step_1_a_warning_says_so(train):
    """At such a rate the first step leaves the model worse than it was."""
    ended, run = train("worse", training={"learning_rate": 0.3, "max_steps": 3, "max_grad_norm": None})
    assert ended.status == 0, ended.said
    losses = {row["step"]: row["loss"] for row in read_metrics(run, "eval")}
    best = read_lowest(run)
    assert losses[best] > losses[0]
    assert f"warning: no evaluation was better by loss than before step 1 ({losses[0]:.4f})" in ended.said
    theirs = weights(checkpoint(run, best))
    assert all(torch.equal(one, theirs[name]) for name, one in weights(run / "final").items())


@pytest.mark.slow
@pytest.mark.parametrize("by", ["rewards/accuracies", "rewards/margins"])
def test_by_rewards_it_is_the_highest_and_the_earlier_of_equals(train, by):
    ended, run = train(by.replace("/", "-"), evaluation={"best_by": by, "patience": 2})
    assert ended.status == 0, ended.said
    values = [(row["step"], row[by]) for row in read_metrics(run, "eval") if row["step"]]
    best = next(step for step, value in values if value == max(value for _, value in values))
    theirs = weights(checkpoint(run, best))
    assert all(torch.equal(one, theirs[name]) for name, one in weights(run / "final").items())


@pytest.mark.slow
def test_of_a_model_that_came_in_bfloat16_it_is_the_rounded_checkpoint(train, tokenizer, tmp_path, zygote):
    model = build_llama(tmp_path / "model", tokenizer, seed=0)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    ended, run = train("bfloat16", model=model)
    assert ended.status == 0, ended.said
    best = read_lowest(run)
    assert best < NUM_STEPS
    exact = weights(checkpoint(run, best))
    final = weights(run / "final")
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in final.items())
    assert f"`{checkpoint(run, best)}` has them in float32" in ended.said
    # Named by its run, it is that one which is exported.
    out = tmp_path / "out"
    ended = zygote.run("export", run, "--dtype", "float32", "--to", out)
    assert ended.status == 0, ended.said
    assert all(torch.equal(tensor, exact[name]) for name, tensor in weights(out).items())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adapter", "background", "two processes", "shards", "shards of an adapter"])
def test_however_it_trains_the_best_is_what_its_checkpoint_holds(train, case, tmp_path, zygote):
    groups: dict[str, dict[str, Any]] = {"evaluation": {"patience": 3}}
    if "adapter" in case:
        groups |= {"adapter": {"rank": 4}, "training": {"learning_rate": 4e-2}}
    if "shards" in case:
        groups["training"] = {**groups.get("training", {}), "sharding": "full"}
    if case == "background":
        groups["checkpoints"] = {"background": True}
    ranks = 2 if "shards" in case or case == "two processes" else 1
    ended, run = train(case.replace(" ", "-"), ranks=ranks, **groups)
    assert ended.status == 0, ended.said
    best, last = read_lowest(run), read_metrics(run)[-1]["step"]
    assert best < last == best + 3 and saved(run) == [best, last]
    file = "adapter_model.safetensors" if "adapter" in case else "model.safetensors"
    if case == "shards":
        out = tmp_path / "out"
        ended = zygote.run("export", run, "--dtype", "float32", "--to", out)
        assert ended.status == 0, ended.said
        theirs = load_file(out / file)
    else:
        theirs = load_file(checkpoint(run, best) / file)
    ours = load_file(run / "final" / file)
    assert ours.keys() == theirs.keys() and all(torch.equal(one, theirs[name]) for name, one in ours.items())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["evaluation"]["best_by"] == "loss"
    shutil.rmtree(run / "final")
    again, _ = train(case.replace(" ", "-"), "--resume", ranks=ranks, **groups)
    assert again.status == 0, again.said
    assert all(torch.equal(one, theirs[name]) for name, one in load_file(run / "final" / file).items())
