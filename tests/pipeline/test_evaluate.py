"""`dpo eval --data`: what is known of the pairs that somebody chose to score."""

from __future__ import annotations

import json

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.reporting.console import Console
from tests.conftest import write_rows


def test_pairs_that_were_chosen_are_compared_with_those_that_are_trained_on(
    write_config, pairs_file, demo_rows, tiny_llama, tmp_path, capfd
):
    """Nobody has said that they are held out: some, all or none of them may be training pairs."""
    file = write_config(data={"eval": 0.25}, training={"max_steps": 1})
    list(dpo_cli.train(file))
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    others = [row for row in demo_rows if row["instruction"] not in {known["instruction"] for known in rows}][:6]
    mixed, apart = write_rows(tmp_path / "mixed.jsonl", [*others, *rows]), write_rows(tmp_path / "b.jsonl", others)
    capfd.readouterr()

    held_out = dpo_cli.evaluate(file, console=Console())
    said = capfd.readouterr().out
    assert "trained_on" not in held_out
    assert ("held-out pairs" in said, "trained on" in said) == (True, False)
    for data, trained_on in ((pairs_file, 40 - held_out["pairs"]), (mixed, 40 - held_out["pairs"]), (apart, 0)):
        found = dpo_cli.evaluate(file, data=str(data), console=Console())
        said = capfd.readouterr().out
        assert found["trained_on"] == trained_on
        assert f"trained on  {trained_on:,} of the {found['pairs']:,} pairs, by their tokens" in said
        assert ("held-out pairs" in said, "scored pairs" in said) == (False, True)


def test_what_is_not_prepared_is_not_known(write_config, pairs_file, demo_rows, tiny_llama, tmp_path, capfd):
    write_rows(tmp_path / "train.jsonl", demo_rows[50:70])
    file = write_config(data={"train": str(tmp_path / "train.jsonl")})
    assert load_config(file).data.train
    found = dpo_cli.evaluate(file, model=str(tiny_llama), data=str(pairs_file), console=Console())
    assert found["trained_on"] is None
    assert "trained on  not known" in capfd.readouterr().out
