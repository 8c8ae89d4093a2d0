"""Write docs/layouts.md: what the layouts are, and what the program's own proof finds on tiny models."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path

from tiny_models import KINDS, build, example_pairs
from transformers.utils import logging as hf_logging

from dpo_cli.modeling.proof import NORM_TOLERANCE, TOKEN_TOLERANCE, Proof, prove

PAGE = Path(__file__).parent.parent / "docs" / "layouts.md"
HEAD = """# Layouts

A layout says how the pairs of a micro-batch stand in the model's input. It changes speed and memory, never the
result: losses, metrics and gradients are the same, up to the rounding of the precision that is computed in.
`training.layout` chooses one; `auto`, the default, takes `packed` wherever that is proved to be exact.

Some models with LongRoPE read short sequences otherwise when a long one is in the same forward pass, whatever the
layout. Where a run has sequences on both sides of their limit it is refused, with the `data.max_length` that mends it.

**padded**: every chosen and every rejected sequence is a row of its own, filled up on the right to the longest. The
prompt is computed twice, and the filling as well. Works with every causal language model.

**packed**: all sequences of a micro-batch are one row without filling, and what sequences begin with in common is
computed once:

- a prompt, which is the beginning of its chosen and of its rejected sequence;
- one prompt that several pairs of a micro-batch have;
- what different prompts begin with alike, such as a system message;
- what a chosen and a rejected response begin with alike, before they part.

The row is a prefix tree in depth-first order. Each token keeps the position that it has in its own sequence, and sees
the tokens before it in that sequence and no others, as far back as the layer's window goes. Beginnings of fewer than
four tokens are written again, since each branch costs attention a piece of its own.

The model computes the rest as ever. Its attention is replaced through the interface that transformers has for this: by
scaled-dot-product attention piece by piece, or by FlexAttention with the tree's rule on CUDA. No mask over the whole
row is built. Grouped key-value heads, sliding windows, soft caps and scaling factors are honoured; whatever else an
architecture asks of its attention (sinks, biases, chunks, masks of its own) is refused.

## The proof

Nothing about a model is taken on trust. Before step 1 the program computes pairs of the run under both layouts: the
longest and the two shortest, of which it compares the log-probability of every response token, and the two
shortest again, of which it compares the gradient's norm. It says what it found in one line:

    checked: packed gives what padded gives, up to 2e-06 nats a token; its gradient's norm by 2e-08

Where a difference is larger than rounding explains, or the model refuses, `auto` says why in one line and takes the
padded layout; `training.layout: packed` ends the run instead. A model that fell back is as it was before.
"""
TOLERANCES = """
| precision | log-probability of a token, nats | norm of the gradient |
|---|---|---|
"""
TABLE = """
## Architectures

What the proof finds on tiny random models whose weights are large, whose biases are not zero, and whose windows and
soft caps are small enough to matter: the tests switch windows, caps and factors off and see the answers move. On the
same models they hold every parameter's gradient of a DPO loss to 1e-5 of its norm. Differences are those of float32,
rounded up to powers of ten from 1e-5 on. An architecture that is not listed is proved in the same way by every run.

| architecture | layout | comes into play | nats a token | norm of the gradient | why not packed |
|---|---|---|---|---|---|
"""
TAIL = """
What takes no attention from outside has biases by distance in it (bloom, mpt), recurrent layers (mamba, qwen3_next) or
attention that transformers has no interface to (falcon, stablelm). The convolutions of lfm2 mix neighbours in the row,
whatever sequence they belong to; here the proof alone finds it out.

This page is written by `scripts/write_layouts_page.py`.
"""
_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SMALLEST = -5
"""The power of ten from which differences are told apart: smaller ones vary from machine to machine."""


def bound(difference: float) -> str:
    """Return the power of ten that a difference is not above."""
    if not math.isfinite(difference):
        return ""
    exponent = max(_SMALLEST, math.ceil(math.log10(difference))) if difference else _SMALLEST
    return f"≤ 1e{exponent}" if exponent < 0 else f"≤ {10**exponent}"


def row(name: str, proof: Proof) -> str:
    """Return an architecture's line of the table."""
    reason = proof.refusal or ("its answers differ" if proof.fails("no") else "")
    cells = (
        name,
        "padded" if reason else "packed",
        ", ".join(KINDS[name].features),
        bound(proof.difference),
        bound(proof.norm_difference),
        reason,
    )
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """Return the whole page; the proof runs on every model."""
    pairs = example_pairs()
    parts = [HEAD, TOLERANCES]
    for precision, name in _PRECISIONS.items():
        parts.append(f"| {name} | {TOKEN_TOLERANCE[precision]:g} | {NORM_TOLERANCE[precision]:.1%} |\n")
    parts.append(TABLE)
    parts += [row(name, prove(build(name), pairs, pairs, contextlib.nullcontext)) for name in KINDS]
    return "".join([*parts, TAIL])


def main() -> int:
    """Write the page."""
    hf_logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
