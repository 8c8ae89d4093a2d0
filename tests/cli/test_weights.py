"""Runs by how their weights are held: what each leaves behind, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import read_metrics

pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def split_run(tmp_path_factory, tiny_llama, demo_rows, forked_dpo):
    from tests.conftest import make_config, write_rows

    folder = tmp_path_factory.mktemp("split")
    pairs = write_rows(folder / "pairs.jsonl", demo_rows[:24])
    training = {"micro_batch_tokens": 400, "pairs_per_step": 6}
    file = make_config(folder, tiny_llama, pairs, "run", model={"weights": "split"}, training=training)
    result = forked_dpo("train", "--config", file)
    assert result.returncode == 0, result.stderr
    return file, folder / "runs" / "run"


def test_a_split_run_computes_in_bfloat16_and_leaves_float32_behind(split_run):
    _, run = split_run
    weights = load_file(run / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert json.loads((run / "final" / "config.json").read_text())["dtype"] == "float32"
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    assert not any("low" in name for name in weights)


def test_the_trained_model_is_scored_as_it_was_at_the_end_of_the_run(split_run, forked_dpo, tmp_path):
    file, run = split_run
    result = forked_dpo("eval", "--config", file, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures, last = json.loads((tmp_path / "figures.json").read_text()), read_metrics(run, "eval")[-1]
    assert figures["loss"] == last["loss"]
    assert figures["rewards/margins"] == last["rewards/margins"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.weights=bfloat16"], "most steps are too small to move a bfloat16 number"),
        (["model.weights=split", "adapter=lora"], "has no effect beside an adapter"),
        (["model.weights=split", "model.dtype=float32"], "computes in bfloat16, but `model.dtype` is float32"),
        (["model.weights=float32", "adapter=lora", "model.quantize=nf4"], "both say how weights are held"),
        (["training.offload=optimizer"], "leave it out on a CPU: it is for GPUs"),
        (["model.weights=half"], "`model.weights`"),
    ],
    ids=str,
)
def test_weights_that_do_not_go_with_the_rest_are_refused(forked_dpo, write_config, settings, said):
    result = forked_dpo("train", "--config", write_config(), *settings)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
