"""The page of a real run: its figures are those of `dpo eval`; it is written at the end, or when a run breaks off."""

from __future__ import annotations

import json

import pytest

from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.reporting.detail_tables import detail_blocks
from dpo_cli.reporting.tables import plain_rows
from tests.conftest import make_config, read_metrics, write_rows
from tests.reporting.test_run_page import Page, drawn


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, demo_rows, forked_dpo):
    """A run of four steps, evaluated after two and at the end, of pairs of two categories; and what it said."""
    folder = tmp_path_factory.mktemp("reported")
    rows = [{**row, "category": "even" if index % 2 else "odd"} for index, row in enumerate(demo_rows[:60])]
    pairs = write_rows(folder / "pairs.jsonl", rows)
    settings = {"training": {"max_steps": 4}, "evaluation": {"every_steps": 2, "samples": 1}, "data": {"eval": 0.6}}
    file = make_config(folder, tiny_llama, pairs, **settings)
    result = forked_dpo("train", "--config", file)
    assert result.returncode == 0, result.stderr
    return file, folder / "runs" / "run", result


def test_the_summary_names_the_page_and_nothing_is_warned_of_it(finished):
    _, run, result = finished
    assert f"report   {run / 'report.html'}" in result.stdout
    assert "the report was not written" not in result.stderr


def test_all_figures_of_the_page_are_those_of_metrics_jsonl_and_dpo_eval(forked_dpo, finished, tmp_path):
    file, run, _ = finished
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    evaluations = read_metrics(run, "eval")
    assert drawn(page)[0]["held out"] == pytest.approx({row["step"]: row["loss"] for row in evaluations}, rel=1e-5)

    result = forked_dpo("eval", "--config", file, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    tables = {table[0][0] or "figures": table for table in page.tables if table[0][:1] != ["step"]}
    assert [cells[2] for cells in tables["figures"][1:]] == [figure.cell(found) for figure in FIGURES]
    accuracies = plain_rows(next(iter(detail_blocks(found))))
    assert tables["on the same pairs"] == accuracies
    by_category = {cells[0]: cells[1:] for cells in tables["category"][1:]}
    assert {name: [str(one["pairs"]), FIGURES[1].cell(one)] for name, one in found["by_category"].items()} == {
        name: cells[:2] for name, cells in by_category.items()
    }


def test_the_page_shows_what_the_run_said_when_it_began_and_its_answers(finished):
    _, run, _ = finished
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "24 to train on, 36 held out" in page.text
    assert "after step 4" in page.text
    assert "before training" in page.text
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples[0]["where"] in page.text


def test_a_run_that_is_resumed_has_a_mark_where_it_was_and_the_time_of_both_parts(forked_dpo, finished, tmp_path):
    """More steps are asked for of the finished run, which resumes it after the last one."""
    file, run, _ = finished
    first = json.loads((run / "environment.json").read_text())["starts"]
    assert [one["after_step"] for one in first] == [0]
    done = forked_dpo("train", "--config", file, "--extend", "training.max_steps=6")
    assert done.returncode == 0, done.stderr
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [one["after_step"] for one in starts] == [0, 4]
    assert starts[0] == first[0]
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert ("title", "resumed after step 4") in page.attributes
    assert max(drawn(page)[0]["training"]) == 6


def test_a_run_whose_page_cannot_be_written_is_done_all_the_same(forked_dpo, write_config, tmp_path):
    file = write_config(training={"max_steps": 1})
    assert forked_dpo("train", "--config", file).returncode == 0
    page = tmp_path / "runs/run/report.html"
    page.unlink()
    page.mkdir()
    done = forked_dpo("train", "--config", file, "--extend", "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "the report was not written: writing the report failed" in " ".join(done.stderr.split())


def test_a_run_that_fails_leaves_the_page_of_its_steps(forked_dpo, write_config, tmp_path):
    file = write_config(training={"max_steps": 6, "learning_rate": 1e30, "max_grad_norm": None})
    done = forked_dpo("train", "--config", file)
    assert done.returncode == 1, done.stderr
    text = (tmp_path / "runs/run/report.html").read_text(encoding="utf-8")
    assert "Not finished" in text
