"""Adapters on tiny models of every architecture: which layers they are put beside, and what PEFT reads of them."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from peft import PeftModel
from tiny_models import KINDS, build, example_pairs
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.adapters.targets import target_names
from dpo_cli.modeling.digests import weights_digest
from dpo_cli.modeling.held import held_as
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.losses.base import StepInfo
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.scoring import score_pairs
from tests.marks import slow_unless
from tests.modeling.test_architectures import FALLING_BACK, PACKED, choose, packed

# transformers warns of its own name, which PEFT reads.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAIRS = example_pairs()
FACTS = StepInfo(len(PAIRS), sum(len(pair.chosen) for pair in PAIRS))
ADAPTERS = {"lora": Lora(rank=4), "rslora": Lora(rank=4, rslora=True), "dora": Lora(rank=4, dora=True)}
LEFT_OUT = {"router", "gate", "experts", "conv1d", "conv", "dt_proj", "out_proj"}
"""What may have no adapter: choices of experts, experts in one tensor, convolutions, and what is not called."""
TAKEN_FOR_EXPERTS = {"gate_proj", "up_proj", "down_proj"}
"""What PEFT puts beside the experts of these types instead, wherever the names are."""


def scored(model, layout="padded"):
    with torch.no_grad():
        return Scorer(model)(LAYOUTS[layout].batch(range(len(PAIRS)), PAIRS))


def step(model, layout, reference):
    """Return the losses of the pairs and the gradient of everything that trains."""
    batch = LAYOUTS[layout].batch(range(len(PAIRS)), PAIRS)
    pairs, _ = score_pairs(Scorer(model), Objective.of(DPO()), lambda _: reference, batch, FACTS)
    model.zero_grad(set_to_none=True)
    pairs.losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return pairs.losses.detach(), gradients


def adapted(kind, adapter=ADAPTERS["lora"], *, moved=False, **changes):
    """Build a model with an adapter, whose B is not 0 where it is to have moved."""
    model = build(kind, **changes)
    added = Adapted(adapter, seed=0).choose(model)
    if moved:
        generator = torch.Generator().manual_seed(2)
        for weights in added.moved().values():
            weights.data += 0.1 * torch.randn(weights.shape, generator=generator)
    return added, model


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "lora", ["lora", "dora"]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_every_b_has_a_gradient(kind, name):
    reference = scored(build(kind))
    _, model = adapted(kind, ADAPTERS[name])
    losses, gradients = step(model, "padded", reference)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-6)
    assert torch.equal(scored(model), reference)
    assert gradients
    for weights, gradient in gradients.items():
        assert "lora_" in weights
        # A's gradient is B's transpose times something, and B is 0.
        assert torch.isfinite(gradient).all(), weights
        assert (float(gradient.abs().max()) > 0) == ("lora_A" not in weights), weights


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "lora", ["lora", "dora"]))
@pytest.mark.parametrize("kind", PACKED)
def test_packed_is_padded_with_an_adapter_that_has_moved(kind, name):
    reference = scored(build(kind))
    model = adapted(kind, ADAPTERS[name], moved=True)[1]
    losses, gradients = step(model, "padded", reference)
    assert (scored(model) - reference).abs().max() > 0.05
    packed_losses, packed_gradients = step(packed(model), "packed", reference)
    torch.testing.assert_close(packed_losses, losses, rtol=1e-5, atol=1e-5)
    for weights, gradient in gradients.items():
        assert (packed_gradients[weights] - gradient).norm() <= 1e-5 * gradient.norm(), weights


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", *FALLING_BACK])
def test_the_layout_is_proved_or_refused_as_without_an_adapter(kind):
    model = adapted(kind, moved=True)[1]
    before = scored(model)
    chosen, said, warned = choose(model, "auto")
    assert chosen.name == ("padded" if kind in FALLING_BACK else "packed")
    assert FALLING_BACK.get(kind, "packed gives the same as padded") in "".join([*said, *warned])
    assert all(weights.grad is None for weights in model.parameters())
    if kind in FALLING_BACK:
        assert torch.equal(scored(model), before)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "lora", ["lora", "dora"]))
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_written_adapter_and_answers_alike(kind, name, tmp_path, tokenizer):
    ours, model = adapted(kind, ADAPTERS[name], moved=True)
    expected = scored(model)
    ours.write(tmp_path, tokenizer)
    theirs = PeftModel.from_pretrained(build(kind), tmp_path)
    torch.testing.assert_close(scored(theirs.get_base_model()), expected, rtol=0, atol=1e-5)
    # Merged, no layer of PEFT is left.
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(scored(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_that_is_not_an_embedding_has_an_adapter_or_a_reason(kind):
    model = build(kind)
    covered = {f"{name}.weight" for name in target_names(model, "all-linear")}
    assert covered
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or id(module) in ends:
            assert f"{name}.weight" not in covered
        elif isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in covered:
            taken = TAKEN_FOR_EXPERTS if kind in ("deepseek_v3", "afmoe", "qwen3_next") else set()
            assert (LEFT_OUT | taken) & set(name.split(".")), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_no_precision_of_the_base_lets_a_fresh_adapter_change_anything(name, kind, dtype):
    """DoRA's magnitudes are norms: rounded to bfloat16, they would scale every row."""
    model = build(kind).to(dtype)
    autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype is torch.bfloat16)
    with autocast():
        expected = scored(model)
    Adapted(ADAPTERS[name]).choose(model)
    with autocast():
        assert torch.equal(scored(model), expected)
    assert all(weights.dtype == torch.float32 for weights in model.parameters() if weights.requires_grad)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "falcon"])
def test_over_layers_of_4_bits_an_adapter_trains_and_packed_is_padded(kind):
    """Falcon's linear layers are of a class of its own, which is refused."""
    model = held_as("nf4", "float32").take_over(build(kind), "cpu")
    base = weights_digest(model)
    reference = scored(model)
    ours = Adapted(ADAPTERS["lora"]).choose(model)
    assert torch.equal(scored(model), reference)
    with ours.at_beginning():
        assert torch.equal(scored(model), reference)
    for weights in ours.moved().values():
        weights.data += 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    losses, gradients = step(model, "padded", reference)
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert ours.digests() == {"model": base}
    if kind in PACKED:
        packed_losses, packed_gradients = step(packed(model), "packed", reference)
        torch.testing.assert_close(packed_losses, losses, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
