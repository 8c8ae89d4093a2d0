"""The estimate of memory: what is counted without computing is what a real pass keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import build

from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling import logps, memory
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.folders.model_files import NO_TRUST
from dpo_cli.modeling.held import held_as
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.memory import MemoryEstimate, activation_bytes, logits_bytes
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import recompute_activations
from dpo_cli.modeling.trained import Whole


def batch_of(layout, num_pairs):
    generator = np.random.default_rng(0)
    pairs = [
        TokenizedPair(*(generator.integers(3, 300, n).astype(np.int32) for n in (9, 14, 11)), origin=f"f:{i}")
        for i in range(num_pairs)
    ]
    return LAYOUTS[layout].batch(range(num_pairs), pairs)


def really_kept(policy, batch, dtype=torch.float32):
    """Bytes that a real forward pass through the body holds on to."""
    model, lower = policy.model, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with keeping, lower, policy.weights.training_pass(), memory.reading(batch.tree):
        states = model.base_model(**memory.model_inputs(batch))[0]
    assert states.requires_grad
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_are_counted_as_a_real_pass_keeps_them_without_the_models_weights(tiny_llama, layout):
    policy = Policy.load(str(tiny_llama))
    policy.read(LAYOUTS[layout])
    for num_pairs in (1, 6):
        batch = batch_of(layout, num_pairs)
        empty = Policy.empty(str(tiny_llama))
        counted = activation_bytes(empty, LAYOUTS[layout], batch, torch.float32, recomputed=False)
        assert counted == pytest.approx(really_kept(policy, batch), rel=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [
        ({}, "float32"),
        ({"dropout": 0.1}, "float32"),
        ({"dora": True}, "float32"),
        ({"targets": ["q_proj"]}, "float32"),
        ({}, "bfloat16"),
    ],
    ids=["LoRA", "dropout", "DoRA", "one layer of several", "bfloat16"],
)
def test_activations_beside_a_frozen_base_are_counted_as_a_real_pass_keeps_them(tiny_llama, layout, adapter, dtype):
    """A weight that does not train needs its input no more, an adapter keeps its own; in bfloat16 both are smaller."""
    ways = Adapted(Lora(**adapter)), held_as(dtype, dtype)
    policy = Policy.load(str(tiny_llama), NO_TRUST, "cpu", *ways)
    policy.read(LAYOUTS[layout])
    batch, computed = batch_of(layout, 4), getattr(torch, dtype)
    empty = Policy.empty(str(tiny_llama), NO_TRUST, *ways)
    counted = activation_bytes(empty, LAYOUTS[layout], batch, computed, recomputed=False)
    assert counted == pytest.approx(really_kept(policy, batch, computed), rel=0.01)
    assert counted != pytest.approx(
        activation_bytes(Policy.empty(str(tiny_llama)), LAYOUTS[layout], batch, computed, recomputed=False), rel=0.02
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_activations_of_experts_are_counted_as_well(kind, caplog):
    policy, batch = Policy(build(kind, vocab_size=1000, max_position_embeddings=1000)), batch_of("padded", 4)
    counted = activation_bytes(policy, LAYOUTS["padded"], batch, torch.float32, recomputed=False)
    assert counted == pytest.approx(really_kept(policy, batch), rel=0.02)
    assert not caplog.records


def test_activations_of_experts_behind_dense_layers_are_counted_as_well():
    """The first three of the layers are no sign of what the others keep."""
    layers = {"num_hidden_layers": 12, "first_k_dense_replace": 3}
    sizes = {"vocab_size": 1000, "intermediate_size": 200}
    policy, batch = Policy(build("deepseek_v3", **layers, **sizes)), batch_of("padded", 4)
    counted = activation_bytes(policy, LAYOUTS["padded"], batch, torch.float32, recomputed=False)
    assert counted == pytest.approx(really_kept(policy, batch), rel=0.02)


@pytest.mark.parametrize("trained", [Whole(), Adapted(Lora())], ids=["all weights", "adapter"])
def test_recomputed_activations_are_those_that_layers_begin_with_and_all_of_one_layer(trained):
    policy = Policy(build("llama", num_hidden_layers=6, hidden_size=64, intermediate_size=256, vocab_size=400), trained)
    policy.read(LAYOUTS["packed"])
    batch = batch_of("packed", 6)
    counted = activation_bytes(policy, LAYOUTS["packed"], batch, torch.float32, recomputed=True)
    whole = really_kept(policy, batch)
    recompute_activations(policy.model)
    assert counted == pytest.approx(really_kept(policy, batch) + whole / 6, rel=0.1)


def test_recomputed_activations_take_less(tiny_llama):
    model = load_policy(str(tiny_llama))
    whole, recomputed = (
        activation_bytes(Policy(model), LAYOUTS["packed"], batch_of("packed", 4), torch.float32, recomputed=answer)
        for answer in (False, True)
    )
    assert recomputed < 0.7 * whole


def test_logits_are_bounded_by_the_chunk_however_many_pairs_there_are(tiny_llama, monkeypatch):
    model = load_policy(str(tiny_llama))
    row = model.get_output_embeddings().weight.shape[0] * 4
    monkeypatch.setattr(logps, "SMALL_CHUNK_BYTES", 100 * row)
    few, many, more = (logits_bytes(model, batch_of("packed", n), torch.float32, "cpu") for n in (1, 20, 40))
    assert few < many == more


def test_the_matrix_in_lower_precision_and_a_float32_gradient_are_counted(tiny_llama):
    model = load_policy(str(tiny_llama))
    weight, batch = model.get_output_embeddings().weight, batch_of("packed", 4)
    chunk = 4 * weight.shape[0] * len(torch.unique(batch.positions))
    whole = logits_bytes(model, batch, torch.bfloat16, "cuda")
    # Two bytes a number of the matrix, four of its gradient; four of a logit and two of its gradient for the products.
    assert whole == weight.numel() * (2 + 4) + chunk * 6 // 4
    weight.requires_grad_(False)
    assert whole - logits_bytes(model, batch, torch.bfloat16, "cuda") == 4 * weight.numel()
    held = model.to(torch.bfloat16)
    assert logits_bytes(held, batch, torch.bfloat16, "cuda") == chunk * 6 // 4


def test_gradients_stand_beside_activations_only_where_a_step_has_several_passes():
    parts = {"program": 1, "weights": 100, "reference": 0, "optimizer": 200, "gradients": 100, "copy": 0}
    one = MemoryEstimate(**parts, activations=70, logits=20, counted=True, several=False)
    assert one.peak == 1 + 100 + 200 + 100
    assert MemoryEstimate(**parts, activations=70, logits=20, counted=True, several=True).peak == 301 + 70 + 20 + 100
    assert MemoryEstimate(**parts, activations=300, logits=20, counted=True, several=False).peak == 301 + 320


@pytest.mark.parametrize(
    ("own", "root", "names"),
    [
        ("0::/system.slice/dpo.service\n", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu,cpuacct:/slurm\n4:memory:/slurm/job_7\n",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_limits_of_a_job_count_as_far_up_as_there_are_some(tmp_path, own, root, names):
    (tmp_path / "own").write_text(own)
    deepest = tmp_path / "groups" / root / own.splitlines()[-1].split(":/")[1]
    deepest.mkdir(parents=True)
    limit, used, given_up = names
    for group, most in ((deepest, "max" if not root else str(2**60)), (deepest.parent, "1000")):
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text("600\n")
        (group / "memory.stat").write_text(f"anon 1\n{given_up} 150\n")
    assert min(memory._group_bytes(tmp_path / "groups", tmp_path / "own")) == 1000 - 600 + 150
    assert list(memory._group_bytes(tmp_path / "groups", tmp_path / "none")) == []
