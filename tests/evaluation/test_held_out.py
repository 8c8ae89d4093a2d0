"""What `dpo eval` counts as a trial."""

from __future__ import annotations

from dpo_cli import prepare
from dpo_cli.config import load_config
from dpo_cli.pipeline.evaluate import _held_out
from dpo_cli.pipeline.pairs import load_tokenizer
from dpo_cli.reporting.console import Console


def test_rows_that_a_weight_repeats_in_a_prepared_folder_are_scored_once(write_config, pairs_file, tmp_path):
    file = write_config(data={"train": {"path": str(pairs_file), "weight": 3}, "eval": None})
    config, console, folder = load_config(file), Console(prints=False), tmp_path / "prepared"
    prepare(config, out=folder)
    _, tokenize = load_tokenizer(config, console)
    pairs, held_out, _ = _held_out(config, str(folder), tokenize, console)
    assert (len(pairs), len(held_out)) == (120, 40)
