"""What a step of an adapter computes and allocates: nothing for the gradients of weights that stay as they are."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.held import FLOAT32, Bfloat16
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from tests.builders import prepare_pairs, stirred

RANK = 3


@pytest.fixture
def pairs(tmp_path, pairs_file, tokenizer):
    found = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    return [found[i] for i in range(4)]


def opened(model, held=FLOAT32, *, recomputed=False):
    policy = Policy.load(str(model), held=held, trained=Adapted(Lora(rank=RANK, alpha=6)))
    policy.place(Accelerator(cpu=True), trained=True, recomputed=recomputed)
    stirred(policy)
    return policy


def linear_shapes(model):
    """Name each linear layer of the base with its inputs and outputs."""
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".lora_" not in name and name != "lm_head"
    }


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_multiplies_what_the_adapter_needs_and_no_more(tiny_llama, pairs, layout, recomputed):
    """For T tokens, R rows that are scored, a linear layer of I inputs and O outputs and rank r, in multiplications.

    Forward: T·I·O, T·r·(I + O) of the adapter, R·V·H of the head. Backward: T·I·O for the gradient of the inputs,
    2·T·r·(I + O) for those of A, B and their inputs, R·V·H for that of the hidden states. The first layer's queries,
    keys and values read the embeddings, whose gradient nobody needs: T·I·O and T·I·r less for each.

    Where activations are computed again, that is one more forward pass of the layers.
    """
    policy = opened(tiny_llama, recomputed=recomputed)
    LAYOUTS[layout].prepare(policy.model)
    batch = LAYOUTS[layout].batch(range(4), pairs)
    tokens, rows = batch.input_ids.numel(), len(batch.positions.unique())
    head = rows * policy.model.get_output_embeddings().weight.numel()
    shapes = linear_shapes(policy.model)
    body = sum(tokens * i * o for i, o in shapes.values())
    adapter = sum(tokens * RANK * (i + o) for i, o in shapes.values())
    first = [shape for name, shape in shapes.items() if ".layers.0." in name and name.split(".")[-2][0] in "qkv"]
    spared = sum(tokens * i * (o + RANK) for i, o in first)
    assert len(first) == 3
    with FlopCounterMode(display=False) as counter:
        policy.scorer(batch).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    multiplied = sum(flops for kernel, flops in counts.items() if kernel in (torch.ops.aten.mm, torch.ops.aten.addmm))
    again = recomputed * (body + adapter)
    assert multiplied == 2 * (2 * body + 3 * adapter + 2 * head - spared + again)


class Allocations(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return in memory that is not the model's."""

    def __init__(self, model):
        super().__init__()
        self.known = {weights.untyped_storage().data_ptr() for weights in model.parameters()}
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        for tensor in returned if isinstance(returned, (tuple, list)) else [returned]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(tensor.shape))
        return returned


@pytest.mark.parametrize("held", [FLOAT32, Bfloat16()], ids=lambda held: held.dtype)
def test_a_step_allocates_nothing_of_the_size_of_a_weight_of_the_base(tiny_llama, pairs, held):
    """Neither a gradient nor a copy in another dtype, of the head least of all."""
    policy = opened(tiny_llama, held)
    batch = LAYOUTS["packed"].batch(range(4), pairs)
    LAYOUTS["packed"].prepare(policy.model)
    weights = [weight for weight in policy.model.parameters() if weight.ndim == 2 and not weight.requires_grad]
    shapes = {shape for weight in weights for shape in (tuple(weight.shape), tuple(weight.shape[::-1]))}
    assert not shapes & {(batch.input_ids.numel(), weight.shape[0]) for weight in weights}
    lower = torch.autocast("cpu", torch.bfloat16, enabled=held is not FLOAT32)
    with Allocations(policy.model) as allocated:
        with lower:
            logps = policy.scorer(batch)
        logps.sum().backward()
    assert not allocated.shapes & shapes
    assert all(weight.grad is None for weight in weights)
    assert all(weight.grad is not None for weight in policy.model.parameters() if weight.requires_grad)


def test_what_the_adapter_adds_is_written_nowhere_but_where_the_base_s_product_is(tiny_llama):
    """Neither B's product, nor its multiple, nor a second gradient of the inputs is a tensor of its own."""
    policy = opened(tiny_llama)
    layer = policy.model.get_submodule("model.layers.1.mlp.gate_proj")
    x = torch.randn(1, 7, layer.in_features, requires_grad=True)
    # The loss is no part of it.
    ones = torch.ones(1, 7, layer.out_features)
    with Operations() as operations:
        layer(x).backward(ones)
    large = [name for name, size in operations.returned if size in (7 * layer.in_features, 7 * layer.out_features)]
    assert not [name for name in large if "mul." in name or "add." in name or "add_." in name or "mul_." in name]
    assert any("mm" in name for name in large)


class Operations(TorchDispatchMode):
    """Notes the names of all operations that compute, and how many numbers each returns."""

    def __init__(self):
        super().__init__()
        self.returned = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        if isinstance(answer, torch.Tensor):
            self.returned.append((str(func), answer.numel()))
        return answer
