"""`held_out.jsonl`: every evaluation, pair by pair."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import pytest

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.evaluation.held_out import held_out_rows
from dpo_cli.preference.metrics import LENGTHS, PAIR_METRICS
from tests.builders import prepare_pairs
from tests.conftest import DEMO_PAIRS, differing_rows, make_config, read_metrics, read_rows, write_rows


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_llama) -> Path:
    """The configuration of a run of ten steps that was evaluated four times, of two pairs of each prompt."""
    folder = tmp_path_factory.mktemp("held-out")
    rows = read_rows(DEMO_PAIRS)[:20]
    rows = [row | {"source": "web"} for row in rows] + [row | {"chosen": row["chosen"] + " Yes."} for row in rows]
    pairs = write_rows(folder / "pairs.jsonl", rows)
    file = make_config(
        folder,
        tiny_llama,
        pairs,
        data={"train": str(pairs), "eval": 0.6},
        evaluation={"every_steps": 2},
        checkpoints={"every_steps": 3, "keep": 9},
        training={"pairs_per_step": 4, "learning_rate": 1e-3, "epochs": 2},
    )
    list(dpo_cli.train(file))
    return file


@pytest.fixture(scope="module")
def run(file) -> Path:
    return Path(load_config(file).output_dir)


def test_every_evaluation_has_every_pair_once_and_its_figures_are_their_means(run):
    rows, evaluations = read_rows(run / "held_out.jsonl"), read_metrics(run, "eval")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6, 8]
    pairs = {row["pair"] for row in rows}
    assert Counter((row["step"], row["pair"]) for row in rows) == {
        (e["step"], p): 1 for e in evaluations for p in pairs
    }
    for figures in evaluations:
        measured = [row for row in rows if row["step"] == figures["step"]]
        assert len(measured) == figures["pairs"]
        for name in PAIR_METRICS:
            assert math.fsum(row[name] for row in measured) / len(measured) == figures[name]


def test_rows_name_a_pair_by_file_line_source_prompt_and_lengths(run, file, tokenizer):
    rows = [row for row in read_rows(run / "held_out.jsonl") if row["step"] == 0]
    data = read_rows(Path(load_config(file).data.train))
    prompts: dict[str, set[str]] = {}
    for row in rows:
        name, line = row["where"].rsplit(":", 1)
        asked = data[int(line) - 1]
        assert Path(name).name == "pairs.jsonl"
        assert row["pair"] == int(line) - 1
        assert (row["source"], row["category"]) == (asked.get("source"), None)
        for side in ("chosen", "rejected"):
            assert row[f"{side}_tokens"] == len(tokenizer(asked[side] + "<|im_end|>\n").input_ids)
        prompts.setdefault(row["prompt_key"], set()).add(asked["instruction"])
    assert all(len(instructions) == 1 for instructions in prompts.values())
    assert len(prompts) == len(rows) / 2


def test_the_ten_pairs_of_the_lowest_margin_have_their_text(run, file):
    data = read_rows(Path(load_config(file).data.train))
    rows = read_rows(run / "held_out.jsonl")
    for step in {row["step"] for row in rows}:
        measured = [row for row in rows if row["step"] == step]
        shown = [row for row in measured if "text" in row]
        assert len(shown) == 10
        highest = max(row["rewards/margins"] for row in shown)
        assert all(row["rewards/margins"] >= highest for row in measured if "text" not in row)
        for row in shown:
            asked = data[row["pair"]]
            assert asked["instruction"] in row["text"]["prompt"]
            assert {name: row["text"][name] for name in ("chosen", "rejected")} == {
                name: asked[name] for name in ("chosen", "rejected")
            }


def test_a_resumed_run_has_the_same_rows(run, file, tmp_path):
    """Cut back to the checkpoint, whatever an evaluation after it has left."""
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    shutil.rmtree(run / "final")
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    with (run / "held_out.jsonl").open("a", encoding="utf-8") as held_out:
        held_out.write('{"step": 8, "pair"')
    list(dpo_cli.train(file, resume=True))
    assert not differing_rows(run, whole)


@pytest.fixture
def pairs(tmp_path, tokenizer, demo_rows) -> PreparedPairs:
    return prepare_pairs(write_rows(tmp_path / "a.jsonl", demo_rows[:12]), tokenizer, tmp_path / "prepared")


def results(margins):
    """Made-up results of an evaluation of the first pairs."""
    metrics = [dict.fromkeys((*PAIR_METRICS, *LENGTHS), 7.0) | {"rewards/margins": margin} for margin in margins]
    return [PairResult(index, values) for index, values in enumerate(metrics)]


def test_texts_are_shortened_a_prompt_at_its_beginning_and_a_response_at_its_end(pairs):
    def decode(tokens):
        return f"{'x' * 3000}{tokens[0]}{'y' * 3000}"

    (row,) = held_out_rows(3, results([1.0]), pairs, decode)
    assert row["text"]["prompt"] == "…" + "y" * 1999
    assert row["text"]["chosen"] == row["text"]["rejected"] == "x" * 1999 + "…"
    assert {len(text) for text in row["text"].values()} == {2000}


def test_of_equal_margins_the_first_pairs_have_their_text(pairs):
    rows = held_out_rows(0, results([1.0] * 12), pairs, str)
    assert ["text" in row for row in rows] == [True] * 10 + [False] * 2
    assert not any("text" in row for row in held_out_rows(0, results([1.0] * 12), pairs))
