"""FlexAttention over a tree: the same as pieces, forward and backward, and compiled a few times in a whole run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.attention import flex_attention as theirs

from dpo_cli.errors import UserError
from dpo_cli.modeling.attention import flex
from dpo_cli.modeling.attention.flex import compiled_flex, flex_for
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.attention.trees import tree_attention
from tests.modeling.attention.rows import drawn, token_tree

ROW = [[1] * 90 + [2] * 60, [1] * 90 + [3] * 70, [1] * 20 + [4] * 50, [5] * 30]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    """Let FlexAttention run here with gradients, which its own check refuses, and compile it without a compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled_flex", lambda dtype: compiled_flex(dtype, "eager"))
    yield
    torch._dynamo.reset()


def attended(lists, kernel, window, inputs, **asked):
    """Return what a kernel answers on a row, its padding left out, and the gradients of the inputs."""
    tree = token_tree(lists, KERNELS[kernel], (window,))
    added = len(tree.depths) - inputs[0].shape[2]
    rows = [torch.nn.functional.pad(tensor, (0, 0, 0, added)) for tensor in inputs]
    found, _ = tree_attention(torch.nn.Module(), *rows, tree.mask(window), **asked)
    found = found[:, : found.shape[1] - added]
    upstream = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(found.shape)
    return found, torch.autograd.grad(found, inputs, upstream)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("window", "softcap", "scaling", "key_heads"), [(None, None, None, 4), (5, None, 0.7, 2), (5, 1.5, None, 1)]
)
def test_flex_attention_gives_what_pieces_give_and_the_same_gradients(window, softcap, scaling, key_heads):
    size = len(token_tree(ROW).depths)
    inputs = drawn(size, key_heads)
    asked = {"scaling": scaling, "softcap": softcap}
    (found, gradients), (expected, theirs) = (
        attended(ROW, kernel, window, inputs, **asked) for kernel in ("flex", "pieces")
    )
    # Capped scores of pieces go through softmax in float32.
    near = {"rtol": 1e-9, "atol": 1e-11} if softcap is None else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **near)
    for ours, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, other, **near)
    assert found.dtype == torch.float64


def test_under_autocast_the_values_decide_the_precision():
    """A model's rotation hands over float32 queries and keys beside bfloat16 values."""
    inputs = [tensor.detach().float() for tensor in drawn(256, 2)]
    tree = token_tree([[1] * 256], KERNELS["flex"])
    mixed, _ = tree_attention(torch.nn.Module(), *inputs[:2], inputs[2].bfloat16(), tree.mask(None))
    expected, _ = tree_attention(torch.nn.Module(), *inputs, tree.mask(None))
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0.1, atol=0.1)


RUN = [
    ("proof", (1, 12, 20), False),
    ("proof", (2, 12, 20), True),
    ("proof beyond the window", (1, 300, 250), False),
    ("check", (1, 12, 20), False),
    ("reference", (4, 60, 70), False),
    ("reference", (3, 90, 70), False),
    ("step", (3, 50, 60), True),
    ("step", (1, 12, 20), True),
    ("step", (2, 77, 60), True),
    ("evaluation", (4, 60, 70), False),
    ("step", (1, 100, 290), True),
    ("evaluation", (1, 20, 30), False),
]
"""The passes of a run in their order: pairs, tokens of a prompt and of a response, whether gradients are taken."""

LLAMA = [(None, None)]
GEMMA = [(300, 50.0), (None, 50.0)]
SEVERAL = [(128, None), (4096, None), (None, None)]


def entries():
    """Return how often FlexAttention was compiled in the dtype in which it was most often."""
    return max(len(_debug_get_cache_entry_list(flex_for(d).__code__)) for d in (torch.float32, torch.bfloat16))


def passes(precision):
    """Yield the passes of a run: in a lower precision, those of the proof are taken in float32 before."""
    if precision != torch.float32:
        yield from ((shape, grad, torch.float32) for what, shape, grad in RUN if what.startswith("proof"))
    yield from ((shape, grad, precision) for _, shape, grad in RUN)


def one_pass(number, shape, layers, *, grad, dtype):
    """Attend as the layers of a model do, to a row of pairs that differ in every token."""
    pairs, prompt, response = shape
    random = np.random.default_rng(number)
    lists = []
    for _ in range(pairs):
        beginning = random.integers(1, 10**6, prompt).tolist()
        lists += [beginning + random.integers(1, 10**6, response).tolist() for _ in range(2)]
    tree = token_tree(lists, KERNELS["flex"], [window for window, _ in layers])
    size = len(tree.depths)
    for window, softcap in layers:
        heads = [torch.randn(1, size, count, 16, dtype=dtype).transpose(1, 2) for count in (4, 2, 2)]
        for one in heads:
            one.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            found, _ = tree_attention(torch.nn.Module(), *heads, tree.mask(window), scaling=0.1, softcap=softcap)
        if grad:
            found.sum().backward()


@pytest.mark.parametrize(
    "layers", [LLAMA, GEMMA, pytest.param(SEVERAL, marks=pytest.mark.slow)], ids=["llama", "gemma", "several windows"]
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_over_a_whole_run_it_is_compiled_at_most_eight_times(layers, precision):
    assert torch._dynamo.config.recompile_limit == 8
    for number, (shape, grad, dtype) in enumerate(passes(precision)):
        one_pass(number, shape, layers, grad=grad, dtype=dtype)
    assert 1 <= entries() <= 8
    before = entries()
    for number, shape in enumerate([(1, 500, 20), (4, 33, 44), (1, 15, 333)]):
        for grad in (False, True):
            one_pass(number, shape, layers, grad=grad, dtype=precision)
    assert entries() == before


def test_what_is_compiled_too_often_is_an_error_that_names_the_cause():
    """Each number of heads is another kernel, as no model has them."""
    tree = token_tree([[1] * 256], KERNELS["flex"])
    with pytest.raises(UserError, match=r"torch compiled FlexAttention 8 times") as caught:
        for heads in range(1, 11):
            inputs = [torch.randn(1, heads, 256, 16) for _ in range(3)]
            tree_attention(torch.nn.Module(), *inputs, tree.mask(None))
    assert "size mismatch at index 1" in caught.value.where
    assert entries() == 8
