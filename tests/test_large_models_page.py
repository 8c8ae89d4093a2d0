"""docs/large-models.md: its figures are those that `dpo train --dry-run --assume-devices` prints for such models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpo_cli.config import load_config
from dpo_cli.jobs import forecast
from dpo_cli.reporting.console import Console
from tests.conftest import build_llama, make_config, write_rows
from tests.marks import slow_unless

PAGE = Path(__file__).parents[1] / "docs" / "large-models.md"
SHAPES = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
PARTS = ("weights", "optimizer", "gradients", "activations", "logits", "gathered from other processes", "at the peak")


def plans():
    """Return the rows of the page's tables: the model, the devices, the settings, and what a process then takes."""
    rows = re.findall(r"^\| (\S+B) \| `(\S+)` \| (.+?) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [
        (size, devices, re.findall("`([^`]+)`", said), figures.split(" | ")) for size, devices, said, figures in rows
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Folders of both models with a tokenizer, without weights."""
    folders = {}
    for name, shape in SHAPES.items():
        folder = folders[name] = build_llama(tmp_path_factory.mktemp(name), tokenizer, seed=0)
        (folder / "model.safetensors").unlink()
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | shape | LLAMA | {"tie_word_embeddings": False}))
    return folders


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sixty-four pairs whose prompts have about 1,000 tokens, and each response 500."""
    responses = {"chosen": "~" * 499 + "!", "rejected": "~" * 499 + "?"}
    rows = [{"instruction": f"{number} " + "~" * 1000, **responses} for number in range(64)]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def printed(folder, model, pairs, devices, settings, capsys):
    """Return what a process takes by what the command prints, in GiB; of what is not there nothing."""
    data = {"eval": None, "max_length": 2048}
    file = make_config(folder, model, pairs, data=data, training={"pairs_per_step": 64}, checkpoints={"every_steps": 1})
    forecast(
        load_config(file, [setting.replace(": ", "=") for setting in settings]), devices, console=Console(quiet=True)
    )
    said = capsys.readouterr().out
    found = dict(re.findall(r"^memory of each process: (.*?) {2,}([\d.]+) GiB", said, re.MULTILINE))
    return [found.get(name, "–") for name in PARTS]


@pytest.mark.parametrize("row", slow_unless(lambda row: row in (1, 4), range(len(plans()))))
def test_a_row_has_what_the_command_prints(tmp_path, models, pairs, capsys, row):
    size, devices, settings, figures = plans()[row]
    assert printed(tmp_path, models[size], pairs, devices, settings, capsys) == figures
    assert float(figures[-1]) < 80e9 / 2**30


def test_the_page_plans_both_models():
    assert {(size, devices) for size, devices, _, _ in plans()} >= {("70B", "8x80GB"), ("405B", "8x8x80GB")}
