"""What `dpo eval` counts as a trial."""

from __future__ import annotations

from dpo_cli import evaluate, prepare
from dpo_cli.config import load_config


def test_rows_that_a_weight_repeats_in_a_prepared_folder_are_scored_once(
    write_config, pairs_file, tiny_llama, tmp_path
):
    file = write_config(data={"train": {"path": str(pairs_file), "weight": 3}, "eval": None})
    config, folder = load_config(file), tmp_path / "prepared"
    assert prepare(config, out=folder).num_train == 120
    assert evaluate(config, model=str(tiny_llama), data=str(folder))["pairs"] == 40
