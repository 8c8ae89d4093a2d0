"""Settings that ask for the best of several evaluations: what does not go together is told at once, by its place."""

from __future__ import annotations

import pytest

from dpo_cli.config import load_config
from dpo_cli.errors import UserError

MINIMAL = "model: m\ndata: {train: pairs.jsonl}\n"


def problems(tmp_path, text, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + text, encoding="utf-8")
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        load_config(file, overrides)
    found = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else [caught.value]
    assert all(error.hint and error.where for error in found)
    return found


@pytest.mark.parametrize("by", ["loss", "rewards/accuracies", "rewards/margins"])
def test_all_of_it_together_is_fine(tmp_path, by):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL, encoding="utf-8")
    overrides = [
        f"evaluation.best_by={by}",
        "evaluation.every_steps=5",
        "evaluation.patience=3",
        "checkpoints.keep_best=2",
    ]
    config = load_config(file, overrides)
    assert (config.evaluation.best_by, config.evaluation.patience, config.checkpoints.keep_best) == (by, 3, 2)


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("evaluation: {every_steps: 5, patience: 2}\n", "no `evaluation.best_by` says by which figure", 3),
        ("checkpoints:\n  keep_best: 3\n", "`checkpoints.keep_best: 3` keeps the best checkpoints, but no", 4),
        ("evaluation:\n  best_by: loss\n", "`evaluation.best_by` needs several evaluations, but the only one", 4),
        ("evaluation: {every_steps: 5, best_by: accuracy}\n", "`evaluation.best_by` should be one of `loss`", 3),
        ("evaluation: {every_steps: 5, best_by: loss, patience: 0}\n", "`evaluation.patience` should be", 3),
    ],
)
def test_what_lacks_its_other_half_is_an_error_in_its_line(tmp_path, text, what, line):
    (found,) = problems(tmp_path, text)
    assert what in found.what
    assert f"line {line}" in found.where


def test_without_held_out_pairs_each_of_them_has_no_effect(tmp_path):
    found = problems(tmp_path, "evaluation: {every_steps: 5, best_by: loss, patience: 2}\n", "data.eval=null")
    names = ("every_steps", "best_by", "patience")
    assert [error.what for error in found] == [
        f"`evaluation.{name}` has no effect, since `data.eval` is null" for name in names
    ]


def test_all_contradictions_are_told_at_once(tmp_path):
    found = problems(tmp_path, "evaluation: {patience: 2}\ncheckpoints: {keep_best: 3}\n", "loss.bta=0.2")
    # A setting that there is not is found before anything is compared.
    assert ["`loss.bta` is not a setting" in error.what for error in found] == [True]
    found = problems(tmp_path, "evaluation: {patience: 2}\ncheckpoints: {keep_best: 3}\n")
    assert [error.what.split("`")[1] for error in found] == [
        "checkpoints.keep_best: 3",
        "evaluation.patience",
        "evaluation.patience",
    ]
