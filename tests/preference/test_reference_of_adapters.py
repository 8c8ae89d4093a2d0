"""The reference of an adapter is the policy before step 1: its base, or that with the adapter that it goes on from."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.reference import Cached, Frozen, Synced
from dpo_cli.preference.reference_work import ReferenceWork
from dpo_cli.training.learner import Learner
from tests.builders import prepare_pairs, save_adapter, silent, stirred, train_in_process
from tests.conftest import build_llama

STRATEGIES = {"cached": Cached(), "frozen": Frozen(), "synced": Synced(every_steps=2, alpha=0.6)}
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "reference"
    # The next run in this process may have another precision.
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pairs(tmp_path, pairs_file, tokenizer):
    return prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def start(tmp_path, tiny_llama, kind):
    """An adapter that PEFT has saved, of the same kind."""
    return save_adapter(tiny_llama, tmp_path / "start", **{f"use_{name}": True for name in kind})


def opened(model, pairs, strategy, layout="packed", recomputed=False, **settings):
    """Return a policy with an adapter before step 1, its reference, and the batches that both answer."""
    accelerator = Accelerator(cpu=True)
    policy = Policy.load(str(model), trained=Adapted(Lora(**{"rank": 4, "alpha": 32, **settings}), seed=5))
    policy.read(LAYOUTS[layout])
    policy.place(accelerator, trained=True, recomputed=recomputed)
    batches, indices = Batches(pairs, LAYOUTS[layout], 2000, torch.device("cpu")), np.arange(len(pairs))
    work = ReferenceWork(policy, policy, accelerator, indices, batches, silent, indices[:8])
    return policy, strategy.open(work), [batches(cut) for cut in batches.cut(indices.tolist())]


def answers(scorer, batches):
    with torch.no_grad():
        return torch.cat([scorer(batch) for batch in batches])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_before_step_1_policy_and_reference_and_base_are_the_same_to_the_bit(tiny_llama, pairs, kind, strategy, layout):
    policy, reference, batches = opened(tiny_llama, pairs, STRATEGIES[strategy], layout, **kind)
    base, _, _ = opened(tiny_llama, pairs, Frozen(), layout)
    found = answers(policy.scorer, batches)
    assert (found - answers(reference, batches)).abs().max() == 0.0
    with torch.no_grad():
        for layer in base.model.modules():
            if hasattr(layer, "lora_B"):
                layer.enable_adapters(False)
    assert (found - answers(base.scorer, batches)).abs().max() == 0.0
    stirred(policy)
    assert (answers(policy.scorer, batches) - answers(reference, batches)).abs().max() > 0.1
    assert (found - answers(reference, batches)).abs().max() == 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_reference_of_an_adapter_that_is_gone_on_from_is_base_and_adapter(tiny_llama, pairs, kind, strategy, start):
    policy, reference, batches = opened(tiny_llama, pairs, STRATEGIES[strategy], start=str(start), **kind)
    found = answers(policy.scorer, batches)
    assert (found - answers(reference, batches)).abs().max() == 0.0
    base = Policy.load(str(tiny_llama))
    base.read(LAYOUTS["packed"])
    assert (found - answers(base.scorer, batches)).abs().max() > 0.1
    stirred(policy)
    assert (found - answers(reference, batches)).abs().max() == 0.0
    if reference.beginning:
        held_out = [LAYOUTS["packed"].batch(range(8), [pairs[at] for at in range(8)])]
        assert torch.equal(answers(reference.beginning, held_out), answers(reference, held_out))


@pytest.mark.parametrize("recomputed", [False, True])
def test_layouts_train_the_same_adapter(tiny_llama, pairs, kind, recomputed):
    ways = {"trained": Adapted(Lora(rank=4, **kind))}
    how = {"ways": ways, "checkpointing": recomputed, "learning_rate": 1e-3, "micro_batch_tokens": 1000}
    runs = [train_in_process(tiny_llama, pairs, layout=layout, **how) for layout in ("padded", "packed")]
    plain = train_in_process(tiny_llama, pairs, ways=ways, learning_rate=1e-3)
    for metrics, state in runs:
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics[0]["rewards/margins"] == 0.0
        assert [row["loss"] for row in metrics] == pytest.approx([row["loss"] for row in plain[0]], abs=1e-5)
        assert metrics[-1]["loss"] < metrics[0]["loss"]
        for name, weights in state.items():
            # Adam divides by the gradient's size, so a gradient near zero may move either way by rounding.
            assert (weights - plain[1][name]).abs().mean() < 2e-5, name


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_synced_reference_moves_its_share_of_the_way_on_a_and_b(tiny_llama, pairs, alpha, kind):
    """θ_ref ← α·θ + (1−α)·θ_ref, for A and B by themselves, after the second step and not after the first."""
    policy, reference, _ = opened(tiny_llama, pairs, Synced(every_steps=2, alpha=alpha), **kind)
    before = {name: weights.clone() for name, weights in policy.weights.tensors().items()}
    assert {name.split(".")[-3] for name in before} <= {"lora_A", "lora_B", "self_attn", "mlp", "lora_magnitude_vector"}
    stirred(policy)
    reference.after_step(1)
    assert all(torch.equal(weights, before[name]) for name, weights in reference.moving.weights.tensors().items())
    reference.after_step(2)
    after = policy.weights.tensors()
    assert reference.moving.weights.tensors().keys() == before.keys()
    for name, weights in reference.moving.weights.tensors().items():
        torch.testing.assert_close(weights, alpha * after[name] + (1 - alpha) * before[name])
        if alpha == 1:
            assert torch.equal(weights, after[name])


def storages(*models):
    """Return the bytes of all weights of some models, those in the same memory once."""
    tensors = [weights.untyped_storage() for model in models for weights in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())


@pytest.mark.parametrize(("strategy", "adapters"), [("cached", 1), ("frozen", 1), ("synced", 2)])
def test_no_reference_holds_a_second_base(tiny_llama, pairs, strategy, adapters):
    policy, reference, _ = opened(tiny_llama, pairs, STRATEGIES[strategy])
    base = storages(Policy.load(str(tiny_llama)).model)
    adapter = sum(weights.nbytes for weights in policy.weights.tensors().values())
    models = [policy.model, policy._beginning or policy.model, *([reference.moving.model] if reference.moving else [])]
    assert storages(*models) == base + adapters * adapter


def test_a_frozen_reference_of_an_adapter_that_is_gone_on_from_holds_its_tensors_alone(tiny_llama, pairs, start, kind):
    policy, _, _ = opened(tiny_llama, pairs, Frozen(), start=str(start), **kind)
    adapter = sum(weights.nbytes for weights in policy.weights.tensors().values())
    assert storages(policy.model, policy._beginning) == storages(Policy.load(str(tiny_llama)).model) + 2 * adapter


@pytest.fixture
def watched(monkeypatch):
    """What learners hold at each step, after the gradients were added up and before they are gone."""
    seen, clip, steps = {"begun": []}, Policy.clip, Learner.steps

    def clipped(policy, norm):
        of = [weights.grad for weights in policy.model.parameters() if weights.grad is not None]
        seen["gradients"] = sum(gradient.nbytes for gradient in of)
        return clip(policy, norm)

    def begun(learner, *plan):
        seen["learner"] = learner
        for tell in seen["begun"]:
            tell()
        return steps(learner, *plan)

    monkeypatch.setattr(Policy, "clip", clipped)
    monkeypatch.setattr(Learner, "steps", begun)
    return seen


@pytest.mark.parametrize(("dtype", "settings"), [("float32", {}), ("bfloat16", {"dora": True})])
def test_a_frozen_weight_has_no_gradient_and_no_moment_and_stays(write_config, watched, tiny_llama, dtype, settings):
    adapter = {"type": "lora", "rank": 2, **settings}
    list(dpo_cli.train(write_config(adapter=adapter, model={"dtype": dtype}, training={"max_steps": 3})))
    learner = watched["learner"]
    policy = learner.policy
    trained = sum(weights.nbytes for weights in policy.weights.tensors().values())
    assert all(weights.dtype == torch.float32 for weights in policy.weights.tensors().values())
    assert watched["gradients"] == trained
    state = learner.optimizer.state_dict()["state"].values()
    assert sum(tensor.nbytes for moments in state for tensor in moments.values() if tensor.ndim) == 2 * trained
    held = {name: weights for name, weights in policy.model.state_dict().items() if "lora_" not in name}
    for name, weights in load_file(tiny_llama / "model.safetensors").items():
        now = held[name] if name in held else held[name.replace(".weight", ".base_layer.weight")]
        assert now.dtype == getattr(torch, dtype)
        assert torch.equal(now, weights.to(now.dtype)), name


class Float32Copies(TorchDispatchMode):
    """Notes every float32 tensor that is made in one of some shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.made = shapes, []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.shape in self.shapes:
                self.made.append((str(function), tuple(tensor.shape)))
        return found


def test_no_step_copies_a_base_in_bfloat16_to_float32(write_config, watched, tokenizer, tmp_path):
    """Its matrices have shapes that nothing else has. The proof before step 1 casts one layer after the other."""
    model = build_llama(tmp_path / "model", tokenizer, seed=0, head_dim=24)
    shapes = {torch.Size(shape) for shape in ((96, 32), (48, 32), (32, 96), (64, 32), (32, 64), (400, 32))}
    config = write_config(
        model={"name": str(model), "dtype": "bfloat16"},
        adapter={"type": "lora", "rank": 2},
        reference="frozen",
        training={"max_steps": 2},
    )
    with Float32Copies(shapes) as noted:
        watched["begun"].append(noted.made.clear)
        rows = [result.metrics for result in dpo_cli.train(config)]
    assert noted.made == []
    assert rows[0]["rewards/margins"] == 0.0
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[1]["loss"] != rows[0]["loss"]


@pytest.mark.program
def test_runs_of_other_ranks_seeds_and_all_weights_share_one_cache(forked_dpo, write_config, cache_folder, tmp_path):
    """The first of them computes all pairs, and the others none."""
    runs = {
        "first": {"adapter": {"rank": 2}, "training": {"seed": 1, "pairs_per_step": 20}},
        "second": {"adapter": {"rank": 8, "alpha": 7, "dora": True}, "training": {"seed": 2, "pairs_per_step": 20}},
        "third": {"adapter": None, "training": {"seed": 3, "pairs_per_step": 20}},
    }
    files = {}
    for name, settings in runs.items():
        config = write_config(name, data={"eval": None}, **settings)
        ended = forked_dpo("train", "--config", config, env={"DPO_CACHE_DIR": str(cache_folder.parent)})
        assert ended.returncode == 0, ended.stderr
        counts = re.findall(r"^reference log-prob.*: (.*?)(?: in .*)?$", ended.stderr, re.M)
        assert (counts[-1:] == ["40/40"]) is (name == "first"), counts
        files[name] = {path.name: path.stat().st_mtime_ns for path in cache_folder.rglob("*.arrow")}
    assert len(files["first"]) == 1
    assert files["first"] == files["second"] == files["third"]


def test_an_adapter_that_is_gone_on_from_has_another_cache_than_its_base(
    write_config, tiny_llama, tmp_path, cache_folder
):
    start = save_adapter(tiny_llama, tmp_path / "start")
    for name, settings in {"fresh": {}, "gone-on": {"start": str(start)}}.items():
        adapter = {"type": "lora", "rank": 4, "alpha": 32, **settings}
        list(dpo_cli.train(write_config(name, adapter=adapter, training={"max_steps": 1})))
    assert len(list(cache_folder.iterdir())) == 2


def test_another_model_is_the_reference_of_an_adapter(write_config, tokenizer, tmp_path, monkeypatch):
    """It is held in the precision of the run, as frozen weights are."""
    other, held = build_llama(tmp_path / "other", tokenizer, seed=4), []
    place = Policy.place
    monkeypatch.setattr(
        Policy, "place", lambda policy, *a, **how: held.append(policy.sizes().held) or place(policy, *a, **how)
    )
    losses, numbers = [], 44_192
    for strategy in ("cached", "frozen"):
        config = write_config(
            strategy,
            adapter={"type": "lora", "rank": 2},
            model={"dtype": "bfloat16"},
            reference={"type": strategy, "model": str(other)},
            training={"max_steps": 3, "layout": "padded"},
        )
        losses.append([result.metrics["loss"] for result in dpo_cli.train(config)])
    assert held.count(2 * numbers) == 2
    assert max(held) < 4 * numbers
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0][0] != pytest.approx(math.log(2), abs=0.03)


def test_a_checkpoint_holds_of_a_synced_reference_what_moves_alone(write_config):
    config = write_config(
        adapter={"type": "lora", "rank": 2},
        reference={"type": "synced", "every_steps": 1},
        training={"max_steps": 2},
    )
    list(dpo_cli.train(config))
    folder = Path(load_config(config).output_dir) / "checkpoints" / "step-000002"
    moved, adapter = load_file(folder / "reference.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert sorted(weights.shape for weights in moved.values()) == sorted(weights.shape for weights in adapter.values())
    assert all("lora_" in name for name in moved)
