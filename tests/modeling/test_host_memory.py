"""Loading, saving, comparing and resuming take no more of the host than the weights, a tenth of them and one tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import ROOT

_MEASURED = """
import gc, json, sys
from pathlib import Path
from dpo_cli.modeling.allocator import return_freed_memory, take_over_weights
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.held import held_as
from dpo_cli.modeling.policy import Policy

warm, folder, out, held = sys.argv[1:]

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which + ":"))

def peak(work):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

def everything(folder, out):
    tokenizer = load_tokenizer(warm)
    took = {"load": peak(lambda: kept.append(Policy.load(folder, held=held_as(held, held))))}
    policy = kept.pop()
    took["digest"] = peak(lambda: policy.identity)
    took["take over"] = peak(lambda: take_over_weights(policy.model))
    Path(out).mkdir()
    took["write"] = peak(lambda: policy.write(Path(out), tokenizer, types=policy.came_in))
    took["compare"] = peak(lambda: policy.check_written(Path(out), policy.came_in))
    took["resume"] = peak(lambda: policy.restore(Path(out)))
    return took, policy

kept = []
return_freed_memory()
everything(warm, out + "-warm")
took, policy = everything(folder, out)
sizes = [parameter.nbytes for parameter in policy.model.parameters()]
largest = max(parameter.numel() for parameter in policy.model.parameters())
print(json.dumps({"took": took, "weights": sum(sizes), "tensor": 4 * largest}))
"""


def large(folder: Path, tiny_llama: Path, dtype: torch.dtype, **how: Any) -> Path:
    """Save a model of 30 million weights, the largest tensor of which has a tenth of them."""
    config = AutoConfig.from_pretrained(
        tiny_llama, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8, head_dim=64
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **how)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
@pytest.mark.slow
@pytest.mark.program
@pytest.mark.parametrize(
    ("dtype", "held", "how"),
    [
        ("float32", "float32", {}),
        ("float32", "float32", {"max_shard_size": "30MB"}),
        ("bfloat16", "float32", {}),
        ("bfloat16", "float32", {"max_shard_size": "30MB"}),
        ("bfloat16", "bfloat16", {}),
        ("float32", "bfloat16", {}),
    ],
)
def test_no_step_of_a_models_life_holds_it_twice(
    tmp_path: Path, tiny_llama: Path, dtype: str, held: str, how: dict[str, Any]
) -> None:
    folder = large(tmp_path / "model", tiny_llama, getattr(torch, dtype), **how)
    command = [sys.executable, "-c", _MEASURED, str(tiny_llama), str(folder), str(tmp_path / "out"), held]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    weights, tensor, took = found["weights"], found["tensor"], found["took"]
    assert weights > (100 if held == "float32" else 50) * 2**20 and tensor < weights / 5
    # What is there already counts once: the rest of what a step takes has to fit into a tenth and one tensor.
    allowed = {"load": weights, "digest": weights if dtype == held else 0}
    over = {name: size / 2**20 for name, size in took.items() if size > allowed.get(name, 0) + weights / 10 + tensor}
    assert not over, (weights / 2**20, tensor / 2**20, over)
