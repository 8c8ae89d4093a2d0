"""How pairs go through the model, settled before step 1: their layout, and the tokens of one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_cli.config import Config
from dpo_cli.errors import UserError
from dpo_cli.reporting.console import Console

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from dpo_cli.data.prepared import PreparedPairs
    from dpo_cli.modeling.batch import Batches, Layout


def choose_layout(
    config: Config,
    models: Sequence[PreTrainedModel],
    pairs: PreparedPairs,
    first: Sequence[int],
    accelerator: Accelerator,
    console: Console,
    *,
    trained: bool,
) -> Layout:
    """Prove the packed layout on pairs of the run, and take the padded one where that fails.

    The longest and the shortest of the first pairs are compared token by token; the gradient on the shortest.

    Args:
        config: Asks for a layout, or leaves the choice.
        models: All models that will read the pairs; they are left prepared for the layout.
        pairs: The pairs of the run.
        first: Indices of some of them: those of step 1, say.
        accelerator: Knows precision and ranks.
        console: Is told what was found.
        trained: Whether gradients matter.

    Raises:
        UserError: The packed layout was asked for by name and is not exact.
    """
    from accelerate.utils import gather_object

    from dpo_cli.modeling.batch import LAYOUTS
    from dpo_cli.modeling.proof import prove

    wanted = config.training.layout
    if wanted == "padded":
        return LAYOUTS[wanted]
    by_length = sorted(first, key=lambda index: (int(pairs.sizes.longest[index]), index))
    seen = [pairs[index] for index in dict.fromkeys([by_length[-1], *by_length[:2]])]
    learnt = [pairs[index] for index in by_length[:2]] if trained else []
    before = [model.config._attn_implementation for model in models]
    found = ""
    for model in models:
        proof = prove(model, seen, learnt, accelerator.autocast)
        # All ranks take the same layout, so the one that fails decides.
        found = next(filter(None, gather_object([proof.fails(accelerator.mixed_precision)])), "")
        if found:
            found = f"{type(model).__name__}: {found}"
            break
        nats, share = f"{proof.difference:.1g} nats a token", f"; its gradient's norm by {proof.norm_difference:.1g}"
        console.notice(f"checked: packed is padded, up to {nats}{share if learnt else ''}")
    if not found:
        return LAYOUTS["packed"]
    for model, attention in zip(models, before, strict=True):
        model.set_attn_implementation(attention)
    if wanted == "packed":
        hint = "set `training.layout: auto` or `padded`"
        raise UserError(f"the packed layout is not exact with this model ({found})", "`training.layout: packed`", hint)
    console.warning(f"using the padded layout, since the packed one is not exact with this model ({found})")
    return LAYOUTS["padded"]


_ENOUGH_TOKENS = {"cpu": 1024}
_ENOUGH_TOKENS_ELSEWHERE = 16384


def micro_batch_tokens(config: Config, accelerator: Accelerator) -> int:
    """Return the token budget of a forward pass."""
    chosen = config.training.micro_batch_tokens
    if chosen != "auto":
        return chosen
    return _ENOUGH_TOKENS.get(accelerator.device.type, _ENOUGH_TOKENS_ELSEWHERE)


def without_gradient(batches: Batches) -> Batches:
    """Return the same with twice the tokens, for passes that keep no activations."""
    return dataclasses.replace(batches, micro_batch_tokens=2 * batches.micro_batch_tokens)
