"""Every kind of model is read, trained and saved as the same thing, in whatever precision it comes."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from tiny_models import KINDS, build
from transformers import AutoModelForCausalLM

from tests.conftest import make_config, read_metrics
from tests.marks import slow_unless

SAVED_IN = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *zip(KINDS, itertools.cycle(SAVED_IN), itertools.repeat("float32")),
    *(("llama", dtype, "float32") for dtype in SAVED_IN[1:]),
    ("llama", torch.bfloat16, "bfloat16"),
]


STANDING_FOR_ALL = {
    "llama",
    "mistral with a window",
    "gemma2",
    "gpt2",
    "qwen3_moe",
    "mpt",
    "mamba",
}
"""Grouped heads; a window; soft caps; learned positions; experts; a bias by distance; no attention."""


@pytest.mark.parametrize(
    ("kind", "saved_in", "computed_in"), slow_unless(lambda case: case[0] in STANDING_FOR_ALL, CASES)
)
def test_what_a_run_trained_is_what_its_folder_holds(
    forked_dpo, tmp_path, tokenizer, pairs_file, kind, saved_in, computed_in
):
    """The held-out figures of the run, of what it saved in full and of a run that goes on are the same."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    longest = {"max_seq_len" if kind == "mpt" else "max_position_embeddings": 512}
    model = build(kind, vocab_size=len(tokenizer), **longest, **ids)
    model.to(saved_in).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = make_config(
        tmp_path, tmp_path / "model", pairs_file, model={"dtype": computed_in}, training={"max_steps": 2},
        data={"eval": 0.1}, checkpoints={"every_steps": 1},
    )  # fmt: skip
    trained = forked_dpo("train", "--config", config)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "run"
    (first, last) = read_metrics(run, "eval")
    assert first["logps/chosen"] != last["logps/chosen"]

    # `final/` has the dtype that the model came in; the checkpoint of the last step is not rounded.
    full = run / ("final" if saved_in == torch.float32 else "checkpoints/step-000002")
    scored = forked_dpo("eval", "--config", config, "--model", full, "--json", tmp_path / "figures.json")
    assert scored.returncode == 0, scored.stderr
    assert_same(figures(tmp_path), last)

    _, info = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True)
    assert not any(info.values()), info

    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    resumed = forked_dpo("train", "--config", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(read_metrics(run, "eval")[-1], last)


def figures(folder):
    return json.loads((folder / "figures.json").read_text())


def assert_same(found, expected):
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def test_pairs_that_are_longer_than_a_model_reads_are_refused_however_it_names_its_limit(
    forked_dpo, tmp_path, tokenizer, pairs_file
):
    build("mpt", vocab_size=len(tokenizer), max_seq_len=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    refused = forked_dpo("train", "--config", make_config(tmp_path, tmp_path / "model", pairs_file))
    assert refused.returncode == 2
    assert "the model has positions for 32" in refused.stderr
