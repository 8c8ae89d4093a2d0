"""Write docs/layouts.md: what the layouts are, and what the program's own proof finds on tiny models."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from tiny_models import KINDS, build, example_pairs
from transformers.utils import logging as hf_logging

from dpo_cli.modeling.adapters.settings import ALL_LINEAR
from dpo_cli.modeling.adapters.targets import left_out, target_names
from dpo_cli.modeling.layouts import PACKED
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.proof import NOISE_FACTOR, NORM_TOLERANCE, Proof, prove
from dpo_cli.modeling.scorer import Scorer

PAGE = Path(__file__).parent.parent / "docs" / "layouts.md"
HEAD = """# Layouts

A layout arranges the pairs of a micro-batch in the model's input. It changes speed and memory, never the result:
losses, metrics and gradients are the same, up to rounding in the precision of the computation. `training.layout`
chooses one; the default, `auto`, uses `packed` wherever it is proved to be exact.

Some models with LongRoPE encode short sequences differently when a long one is in the same forward pass, whatever the
layout. A run with sequences on both sides of that limit is refused, with the `data.max_length` that avoids the problem.

**padded**: every chosen and every rejected sequence is a separate row, padded on the right to the longest. The prompt
is computed twice, and the padding too. Works with every causal language model.

**packed**: all sequences of a micro-batch are one row without padding, and common beginnings of sequences are computed
once:

- a prompt, which is the beginning of its chosen and of its rejected sequence;
- a prompt that several pairs of a micro-batch share;
- the common beginning of different prompts, such as a system message;
- the common beginning of a chosen and a rejected response.

The row is a prefix tree in depth-first order. Each token keeps its position in its own sequence, and attends to the
earlier tokens of that sequence only, within the layer's window. Common beginnings of fewer than four tokens are
repeated, since each branch costs a separate piece of attention.

Everything else in the model is unchanged. Its attention is replaced through the interface of transformers by a kernel,
which `training.attention` chooses:

| kernel | where | how |
|---|---|---|
| `pieces` | everywhere; `auto` on CPUs | scaled-dot-product attention, piece by piece between the branches |
| `flex` | CUDA; first with `auto` | FlexAttention, which skips blocks of 128 × 128 tokens in which nothing is seen |
| `varlen` | CUDA; next with `auto` | FlashAttention over the pieces, their keys gathered: 16 bits only, no soft caps |

No mask over the whole row is built. For `flex` the row is padded to a multiple of 128 tokens; padding is in no sequence
and never scored. Grouped key-value heads, sliding windows, soft caps and scaling factors are supported; other
properties of an architecture's attention (sinks, biases, chunks, special masks) are refused. [GPUs](gpu.md) says more
of kernels.

## The proof

Nothing about a model is assumed. Before step 1 the program computes the two shortest pairs of the run, each by itself,
with the model's own attention and logits, and again together in the packed layout. It compares the log-probability of
every response token, and the norm of the gradient of the weights next to the embedding, which comes through all layers.
Where layers look back a limited number of tokens, the shortest pair beyond that number is compared as well. The result
is one line:

    checked: packed gives the same as padded, up to 2e-06 nats per token; its gradient's norm by 2e-08

This is always computed in float32, also where the run computes in bfloat16 or float16: there rounding takes
log-probabilities as far from each other as many faults would. Weights that are held in fewer bits are cast to float32
layer by layer, forward and backward, so that it takes the memory of one layer and the vocabulary matrix; quantized
matrices multiply as what their few bits stand for.

In a lower precision the packed layout is then compared with the padded one again. What rounding explains is measured on
the same pairs: how far it takes the padded layout from float32, or from the padded layout in another batch, whichever
is further (root mean square over tokens; for gradients, the norm of the difference). The packed layout may be three
times as far from the padded one; about √2 times is to be expected, since both are rounded. On SmolLM2-135M rounding
explains about 0.04 nats per token:

    checked: packed gives the same as padded in float32, up to 3e-05 nats per token; its gradient's norm by 2e-07
    checked: in bfloat16 packed is 0.05 nats per token from padded, where rounding explains 0.04; gradients 6% and 8%

If a difference is larger, or the model is refused, `auto` says why in one line. It proves the next kernel, where there
is one, and otherwise uses the padded layout, and the model gets its own attention back. `training.layout: packed`, or
a kernel that was asked for by name, stops the run instead. A kernel that computes in 16 bits alone is compared in the
run's precision alone. `scripts/check_proof.py` plants faults in the packed attention of the real model and counts what
the proof finds.
"""
TOLERANCES = """
| precision of the run | a token's log-probability, float32 | gradient's norm, float32 | in lower precision |
|---|---|---|---|
"""
TABLE = """
## Architectures

The results of the proof on tiny random models with large weights, biases other than zero, and windows and soft caps
small enough to matter: the tests switch off windows, caps and factors and check that the outputs change. On the same
models they require every parameter's gradient of a DPO loss to agree within 1e-5 of its norm. Differences are those of
float32, rounded up to powers of ten from 1e-5 on. An architecture that is not listed is proved in the same way by
every run.

An adapter on `all-linear` is beside every layer of an architecture that multiplies by a matrix, embeddings and
vocabulary projection aside, but for those of the last column.

| architecture | layout | features | nats per token | norm of the gradient | why not packed | without an adapter |
|---|---|---|---|---|---|---|
"""
TAIL = """
Attention cannot be replaced if it has biases by distance (bloom, mpt), if there are recurrent layers (mamba,
qwen3_next), or if transformers has no interface to it (falcon, stablelm). The convolutions of lfm2 mix neighbours in
the row, whatever sequence they belong to; only the proof detects that.

Experts are one tensor of three dimensions, which has no adapter; routers choose among them and are left as they are.
Where PEFT takes the names `gate_proj`, `up_proj` and `down_proj` for those of experts, as in older models
(deepseek_v3, afmoe, qwen3_next), layers of these names cannot have one either: what is saved would be read as another
adapter. Of the mixers of mamba some weights are used without calling their layers, where an adapter would have no
effect. The header of a run says what its adapter leaves out.

This page is written by `scripts/write_layouts_page.py`.
"""
_SMALLEST = -5
"""The power of ten from which differences are told apart: smaller ones vary from machine to machine."""


def bound(difference: float) -> str:
    """Return the power of ten that a difference is not above."""
    if not math.isfinite(difference):
        return ""
    exponent = max(_SMALLEST, math.ceil(math.log10(difference))) if difference else _SMALLEST
    return f"≤ 1e{exponent}" if exponent < 0 else f"≤ {10**exponent}"


def row(name: str, proof: Proof, without: list[str]) -> str:
    """Return an architecture's line of the table."""
    reason = proof.refusal or ("its outputs differ" if proof.fails(PRECISIONS["float32"]) else "")
    cells = (
        name,
        "padded" if reason else "packed",
        ", ".join(KINDS[name].features),
        bound(proof.difference),
        bound(proof.norm_difference),
        reason,
        ", ".join(f"`{layer}`" for layer in without),
    )
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """Return the whole page; the proof runs on every model."""
    pairs = example_pairs()
    parts = [HEAD, TOLERANCES]
    for precision in PRECISIONS.values():
        lower = f"{NOISE_FACTOR} × what rounding explains" if precision.is_lower else ""
        parts.append(f"| {precision.name} | {precision.exactness:g} nats | {NORM_TOLERANCE:.1%} | {lower} |\n")
    parts.append(TABLE)
    for name in KINDS:
        model = build(name)
        without = left_out(model, target_names(model, ALL_LINEAR))
        parts.append(row(name, prove(Scorer(model), PACKED, pairs, PRECISIONS["float32"]), without))
    return "".join([*parts, TAIL])


def main() -> int:
    """Write the page."""
    hf_logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
