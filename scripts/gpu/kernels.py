"""Attention and the vocabulary projection: exact, in how much memory, compiled how often, how fast."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dpo_cli.modeling.attention.kernels import Kernel, kernels_for
from dpo_cli.modeling.attention.trees import CannotPack, TokenTree
from dpo_cli.modeling.exactness import AttentionCase, attention_errors, logps_errors, precisions_on, random_tree
from dpo_cli.modeling.logps import Head, token_logps
from dpo_cli.modeling.responses import Predictions
from dpo_cli.modeling.sending import sent
from dpo_cli.modeling.tree import PrefixTree
from gpu.clock import Check

HEAD_SIZES, SOFTCAPS = (128, 64, 256, 96), (None, 20.0)


def attention_exactness(check: Check) -> None:
    """Hold every kernel against float64: precisions, head sizes, windows, soft caps; forward and all gradients."""
    tree = random_tree(2, 40, 30, 40) if check.dry else random_tree(4, 100, 150, 200)
    sizes, windows = ((64, 256), (None, 50)) if check.dry else (HEAD_SIZES, (None, 256))
    # The precision and the head size that runs have most, first.
    for dtype, size in itertools.product(reversed(precisions_on(check.device)), sizes):
        for kernel, window, softcap in itertools.product(_kernels(check), windows, SOFTCAPS):
            case = AttentionCase(dtype, size, window, softcap)
            started = time.perf_counter()
            facts = {"kernel": kernel.name, "case": str(case), "tokens": len(tree.tokens)}
            try:
                forward, *gradients = attention_errors(kernel, tree, case, check.device)
            except CannotPack as refusal:
                check.tell(**facts, refused=str(refusal))
                continue
            limit = 1e-5 if dtype == "float32" else 1e-2
            right = max(forward, *gradients) <= limit
            check.tell(**facts, forward=forward, gradients=gradients, right=right, seconds=_since(started))


def logps_exactness(check: Check) -> None:
    """Hold log-probabilities and their gradients against float64."""
    for dtype, softcap, chunk in itertools.product(precisions_on(check.device), (None, 5.0), (2**30, 2**16)):
        forward, *gradients = logps_errors(dtype, softcap, chunk, check.device)
        limit = 1e-5 if dtype == "float32" else 1e-2
        facts = {"dtype": dtype, "softcap": softcap, "chunk_bytes": chunk, "right": max(forward, *gradients) <= limit}
        check.tell(**facts, forward=forward, gradients=gradients)


def attention_memory(check: Check) -> None:
    """Attend over a long row, forward and backward; a T × T tensor would be many times what is allowed."""
    tree = random_tree(2, 40, 60, 90) if check.dry else random_tree(8, 500, 500, 700)
    heads, size = (4, 64) if check.dry else (32, 128)
    for kernel in _kernels(check):
        attend = _attending(check, kernel, tree, heads, size, torch.bfloat16, None, None)
        check.reset_peak()
        before = torch.cuda.memory_allocated() if check.on_cuda else 0
        attend()
        num_tokens = len(tree.tokens)
        peak = torch.cuda.max_memory_allocated() - before if check.on_cuda else None
        square, row = 2 * heads * num_tokens**2, 2 * heads * size * num_tokens
        facts = {"kernel": kernel.name, "tokens": num_tokens, "row_bytes": row, "square_bytes": square}
        check.tell(**facts, peak_bytes=peak, right=None if peak is None else peak < square / 4 + 16 * row)


def dynamo_entries(check: Check) -> None:
    """Attend in the order of a run's passes, for the layers of Llama and of Gemma; count what was compiled anew."""
    if "flex" not in [kernel.name for kernel in _kernels(check)]:
        return check.tell(not_here="FlexAttention is compiled on CUDA alone")
    from torch._dynamo.utils import counters

    flex = next(kernel for kernel in _kernels(check) if kernel.name == "flex")
    counters.clear()
    passes = [(1, 400, True), (2, 12, True), (1, 12, False), (8, 60, False), (6, 50, True), (20, 90, True)]
    for kind, softcap, windows in (("Llama", None, (None,)), ("Gemma 2", 50.0, (512, None))):
        for num_prompts, length, gradient in passes:
            tree = random_tree(num_prompts, 20, length, length)
            started = time.perf_counter()
            for window in windows:
                with torch.set_grad_enabled(gradient):
                    _attending(check, flex, tree, 8, 64, torch.bfloat16, window, softcap, gradient=gradient)()
            graphs = counters["stats"]["unique_graphs"]
            check.tell(kind=kind, tokens=len(tree.tokens), gradient=gradient, graphs=graphs, seconds=_since(started))
    return check.tell(graphs=counters["stats"]["unique_graphs"], right=counters["stats"]["unique_graphs"] <= 8)


def attention_speed(check: Check) -> None:
    """Time attention of an 8B model's layer, forward and backward, and laying its tree out."""
    tree = random_tree(2, 20, 30, 30) if check.dry else random_tree(16, 100, 200, 300)
    heads, size = (4, 64) if check.dry else (32, 128)
    for kernel in _kernels(check):
        attend = _attending(check, kernel, tree, heads, size, torch.bfloat16, None, None)
        facts = {"kernel": kernel.name, "tokens": len(tree.tokens), "heads": heads, "head_size": size}
        laid_out = check.milliseconds(lambda kernel=kernel: TokenTree.of(tree, kernel).to(check.device))
        check.tell(**facts, milliseconds=check.milliseconds(attend), lay_out_milliseconds=laid_out)


def head_speed(check: Check) -> None:
    """Time the vocabulary projection of an 8B model, forward and backward, by chunk and by how its weight is held."""
    rows, words, width = (64, 500, 32) if check.dry else (6400, 128_256, 4096)
    states = torch.randn(rows, width, device=check.device, dtype=torch.bfloat16, requires_grad=True)
    predictions = sent(Predictions.of(np.arange(rows)), check.device)
    targets = torch.randint(0, words, (rows,), device=check.device)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.randn(words, width, device=check.device, dtype=dtype) * 0.02)
        for chunk in (2**28, 2**30, 2**31):

            def work(weight: torch.nn.Parameter = weight, chunk: int = chunk) -> None:
                with torch.autocast(check.device.type, dtype=torch.bfloat16):
                    token_logps(states, predictions, targets, Head(weight), chunk).sum().backward()
                states.grad = weight.grad = None

            check.reset_peak()
            facts = {"weight": str(dtype), "chunk_bytes": chunk, "flops": 8 * rows * words * width}
            check.tell(**facts, milliseconds=check.milliseconds(work, 2), peak_gib=check.peak_gib())
        del weight


def _kernels(check: Check) -> Iterator[Kernel]:
    """Yield the kernels that a run would try here, and pieces, which run everywhere."""
    names = {kernel.name: kernel for asked in ("auto", "pieces") for kernel in kernels_for(asked, check.device.type)}
    yield from names.values()


def _attending(
    check: Check,
    kernel: Kernel,
    tree: PrefixTree,
    num_heads: int,
    head_size: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    *,
    gradient: bool = True,
) -> Callable[[], None]:
    """Return a function that attends over a tree once, and back with a gradient; a quarter of the heads are of keys."""
    row = TokenTree.of(tree, kernel, [window]).to(check.device)

    def drawn(heads: int) -> Tensor:
        made = torch.randn(1, len(row.depths), heads, head_size, device=check.device, dtype=dtype).transpose(1, 2)
        return made.requires_grad_(gradient)

    key_heads = max(1, num_heads // 4)
    q, k, v = drawn(num_heads), drawn(key_heads), drawn(key_heads)

    def attend() -> None:
        found = row.mask(window).attend(q, k, v, head_size**-0.5, softcap)
        if gradient:
            torch.autograd.grad(found, (q, k, v), torch.ones_like(found))

    return attend


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
