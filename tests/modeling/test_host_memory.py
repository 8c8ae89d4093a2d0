"""Loading, saving, comparing and resuming take no more of the host than the weights, a tenth of them and one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from tests.conftest import GGUF, ROOT

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process"),
    pytest.mark.slow,
    pytest.mark.program,
]

_PEAK = """
import gc, json, sys
from pathlib import Path
from dpo_cli.modeling.allocator import return_freed_memory

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which + ":"))

def peak(work):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

return_freed_memory()
"""

_MEASURED = (
    _PEAK
    + """
from dpo_cli.modeling.allocator import take_over_weights
from dpo_cli.modeling.folders.saving import origin_of
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.held import held_as
from dpo_cli.modeling.policy import Policy

warm, folder, out, held = sys.argv[1:]

def everything(folder, out):
    tokenizer = load_tokenizer(warm)
    took = {"load": peak(lambda: kept.append(Policy.load(folder, held=held_as(held, held))))}
    policy = kept.pop()
    took["digest"] = peak(lambda: policy.identity)
    took["take over"] = peak(lambda: take_over_weights(policy.model))
    Path(out).mkdir()
    types = origin_of(policy.model).types
    took["write"] = peak(lambda: policy.weights.write(Path(out), tokenizer, types=types))
    took["compare"] = peak(lambda: policy.weights.check_written(Path(out), types=types))
    took["resume"] = peak(lambda: policy.weights.restore(Path(out)))
    return took, policy

kept = []
everything(warm, out + "-warm")
took, policy = everything(folder, out)
sizes = [parameter.nbytes for parameter in policy.model.parameters()]
largest = max(parameter.numel() for parameter in policy.model.parameters())
print(json.dumps({"took": took, "weights": sum(sizes), "tensor": 4 * largest}))
"""
)

_RESUMED = (
    _PEAK
    + """
import torch
from accelerate import Accelerator
from dpo_cli.config.schema import TrainingSettings
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.held import FLOAT32, Split
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import NoReference
from dpo_cli.training.checkpoints import CheckpointWriter
from dpo_cli.training.learner import Learner
from dpo_cli.training.optimizer import schedule
from dpo_cli.training.state import RunNotes, restore_checkpoint
from dpo_cli.modeling.allocator import take_over_weights

warm, folder, out, weights, name = sys.argv[1:]

def learner(folder):
    accelerator, optimizer = Accelerator(cpu=True), TrainingSettings(optimizer=name).optimizer
    policy = Policy.load(folder, held=Split(gradients=optimizer.gradients) if weights == "split" else FLOAT32)
    take_over_weights(policy.model)
    policy.place(accelerator, trained=True)
    chosen = optimizer.over(policy.weights.trained(), 1e-3, 0.0)
    return Learner(policy, Objective.of(DPO()), NoReference().open(None), accelerator.prepare_optimizer(chosen),
                   schedule(chosen, "constant", 0.0, 2), accelerator)

def resumed(folder, out):
    before = learner(folder)
    for parameter in before.policy.weights.trained():
        parameter.grad = torch.ones_like(parameter, dtype=parameter.grad_dtype)
    before.optimizer.step()
    before.rates.step()
    before.optimizer.zero_grad()
    CheckpointWriter(Path(out), load_tokenizer(warm), 1, background=False).save(before, RunNotes({}))
    tensors = list(before.state().tensors["optimizer.safetensors"].values())
    sizes = sum(tensor.nbytes for tensor in tensors), max(tensor.nbytes for tensor in tensors)
    largest = max(4 * parameter.numel() for parameter in before.policy.weights.trained())
    del before, tensors, parameter
    after = learner(folder)
    return peak(lambda: restore_checkpoint(Path(out, "step-000001"), after)), *sizes, largest

resumed(warm, out + "-warm")
print(json.dumps(dict(zip(("took", "state", "part", "tensor"), resumed(folder, out)))))
"""
)

_CONVERTED = (
    _PEAK
    + """
import dpo_cli.modeling.gguf.conversion as conversion

file = Path(sys.argv[1])
conversion.settings_of(file)
found = []
took = peak(lambda: found.append(conversion.converted(file)))
sizes = [size for name, size in conversion.GgufContent.of(__import__("gguf").GGUFReader(file)).sizes.items()]
print(json.dumps({"took": took, "weights": 4 * sum(sizes), "tensor": 4 * max(sizes)}))
"""
)

_EXPERTS = (
    _PEAK
    + """
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.gguf.tensors import round_as_in_file
from dpo_cli.modeling.gguf.vocabulary import Vocabulary
from dpo_cli.modeling.gguf.writing import write_gguf
from dpo_cli.modeling.policy import Policy

warm, folder, kind, file = sys.argv[1:]

def everything(folder, file):
    tokenizer, policy = load_tokenizer(warm), Policy.load(folder)
    words = Vocabulary.of(tokenizer, policy.model.config.vocab_size)
    took = {"write": peak(lambda: write_gguf(policy.model, Path(file), kind, "experts", words.add_to))}
    took["round"] = peak(lambda: round_as_in_file(policy.model, kind))
    weights = [parameter.nbytes for parameter in policy.model.parameters()]
    return {"took": took, "weights": sum(weights), "tensor": max(weights)}

everything(warm, file + "-warm")
print(json.dumps(everything(folder, file)))
"""
)


def measured(code: str, *arguments: object, **surroundings: str) -> dict[str, Any]:
    """Run code in a process of its own and return what it found."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, **surroundings}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def large(folder: Path, tiny_llama: Path, dtype: torch.dtype, **how: Any) -> Path:
    """Save a model of 30 million weights, the largest tensor of which has a tenth of them."""
    config = AutoConfig.from_pretrained(
        tiny_llama, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8, head_dim=64
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **how)
    return folder


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
    found = measured(_MEASURED, tiny_llama, folder, tmp_path / "out", held)
    weights, tensor, took = found["weights"], found["tensor"], found["took"]
    assert weights > (100 if held == "float32" else 50) * 2**20 and tensor < weights / 5
    # What is there already counts once: the rest of what a step takes has to fit into a tenth and one tensor.
    allowed = {"load": weights, "digest": weights if dtype == held else 0}
    over = {name: size / 2**20 for name, size in took.items() if size > allowed.get(name, 0) + weights / 10 + tensor}
    assert not over, (weights / 2**20, tensor / 2**20, over)


@pytest.mark.parametrize(
    ("weights", "optimizer"),
    [("float32", "adamw"), ("float32", "adamw_8bit"), ("split", "adamw"), ("split", "rmsprop")],
)
def test_resuming_holds_what_an_optimizer_keeps_once(
    tmp_path: Path, tiny_llama: Path, weights: str, optimizer: str
) -> None:
    folder = large(tmp_path / "model", tiny_llama, torch.float32)
    found = measured(_RESUMED, tiny_llama, folder, tmp_path / "out", weights, optimizer)
    assert found["state"] > 50 * 2**20
    # What is held of it from then on, a tenth of that, and one tensor of the weights that come after it.
    assert found["took"] < 1.1 * found["state"] + found["tensor"], found


@pytest.mark.real_model
def test_a_gguf_file_is_converted_in_the_memory_of_its_weights(tmp_path: Path) -> None:
    """The file's vocabulary, its pages and its blocks are not there beside all of the weights."""
    found = measured(_CONVERTED, GGUF, DPO_CACHE_DIR=str(tmp_path))
    assert found["took"] < 1.1 * found["weights"] + found["tensor"], found


def test_experts_are_written_and_read_one_layer_of_them_at_a_time(tmp_path: Path, tokenizer: Any) -> None:
    """Gate and up are one tensor in the model, and all experts of a layer are: it is the largest that there is."""
    small = {"hidden_size": 256, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    for name, layers, size in (("warm", 1, 32), ("model", 12, 384)):
        settings = {**small, "num_hidden_layers": layers, "moe_intermediate_size": size, "vocab_size": len(tokenizer)}
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**settings), dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    file = tmp_path / "model.gguf"
    written = measured(_EXPERTS, tmp_path / "warm", tmp_path / "model", "q8_0", file)
    weights, tensor, took = written["weights"], written["tensor"], written["took"]
    assert weights > 100 * 2**20 and tensor < weights / 10
    assert max(took.values()) < weights / 10 + tensor, written
    read = measured(_CONVERTED, file, DPO_CACHE_DIR=str(tmp_path))
    assert read["took"] < 1.1 * weights + tensor, read
