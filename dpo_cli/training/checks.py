"""What is proved before step 1, on the run's own pairs: a line for each, an error where it does not hold."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from dpo_cli.data.checkup.endings import TAIL, closing_token, way_out, without_end
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.tokens.token_checks import RESPONSES_CUT
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import read_adapter
from dpo_cli.modeling.adapters.fit import adapter_weights
from dpo_cli.modeling.folders.model_files import most_tokens
from dpo_cli.modeling.folders.model_names import same_model
from dpo_cli.modeling.held import Dtype
from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.precision import Precision, precision_of
from dpo_cli.modeling.proof import NOISE_FACTOR, asking, distance
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.modeling.upcast import in_float32
from dpo_cli.preference.losses.base import StepInfo
from dpo_cli.system.storage import DamagedFolder
from dpo_cli.system.text import several
from dpo_cli.training.checkpoints import beginning_of, held_at_beginning

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dpo_cli.modeling.batch import PairBatch
    from dpo_cli.modeling.policy import Policy
    from dpo_cli.modeling.scorer import BatchScorer
    from dpo_cli.preference.objective import Objective


def check_fits(pairs: PreparedPairs, policy: Policy, where: str) -> None:
    """Refuse pairs for whose tokens or lengths a model has no embedding, before it is asked.

    Raises:
        UserError: The tokenizer is another model's, a pair is longer than the model reads, or the model would read a
            pair otherwise beside a longer one.
    """
    largest, vocabulary, config = pairs.largest_token(), policy.vocabulary, policy.model.config
    if largest >= vocabulary:
        what = f"the data has token {largest}, but the model's vocabulary ends at {vocabulary - 1}"
        raise UserError(what, where, "use the tokenizer of this model")
    positions = most_tokens(config)
    longest = int(pairs.sizes.longest.max())
    if positions and longest > positions:
        what = f"the longest pair has {longest} tokens, but the model has positions for {positions}"
        raise UserError(what, where, f"set `data.max_length: {positions}`, or choose a model with a longer context")
    shortest = int(pairs.sizes.shortest.min())
    for limit in _longrope_limits(config.get_text_config()):
        # transformers turns all positions of a forward pass by its longest sequence.
        if shortest <= limit < longest:
            what = (
                f"sequences have {shortest} to {longest} tokens; a model with LongRoPE reads those of up to {limit} "
                "tokens otherwise beside longer ones, so that results would depend on how pairs are put together"
            )
            raise UserError(what, where, f"set `data.max_length: {limit}`, or leave all shorter pairs out")


def check_base(policy: Policy, start: Path, name: str, where: str = "`adapter.start`") -> Iterator[str]:
    """Compare a base with that of an adapter that is put beside it; yield what of it remains unknown.

    Args:
        policy: What is trained, or the base alone.
        start: The folder of that adapter.
        name: How the base is named here.
        where: What names the adapter: a setting or an option.

    Raises:
        UserError: It is another base: held in the same way, or in float32 here, it had other weights or settings.
    """
    if digest := _digest_of_base(start):
        held = held_at_beginning(start) or "an unknown way"
        if policy.weights.is_beside(digest):
            return
        # From float32, what it was rounded to has been compared as well.
        if held == policy.held_as or (policy.held_as == "float32" and held in get_args(Dtype)):
            what = f"the adapter `{start}` belongs to another base: `{name}` has other weights or settings"
            hint = "name the model that it was trained beside, or an adapter that was trained beside this one"
            raise UserError(what, where, hint)
        yield (
            f"the adapter `{start}` was trained beside a base held in {held}, which is held in {policy.held_as} here: "
            "whether it is the same is not known"
        )
    else:
        yield from _named_otherwise(start, name)


def check_base_by_name(start: Path, name: str) -> Iterator[str]:
    """Check of an adapter that training is to go on from what needs no weights of its base; yield what remains.

    Args:
        start: The folder of that adapter.
        name: How the base is named here.

    Raises:
        UserError: The adapter is not finite.
    """
    adapter_weights(read_adapter(start))
    if _digest_of_base(start):
        yield (
            f"not checked without weights: whether `{name}` has those that the adapter `{start}` was trained beside; "
            "a run compares them before step 1"
        )
    else:
        yield from _named_otherwise(start, name)


def _digest_of_base(adapter: Path) -> str | None:
    """Return the digest of the base that an adapter was trained beside, where a run has noted it."""
    with contextlib.suppress(DamagedFolder):
        return beginning_of(adapter).get("model")
    return None


def _named_otherwise(adapter: Path, name: str) -> Iterator[str]:
    """Say so where an adapter names its base otherwise than it is named here."""
    if (named := read_adapter(adapter).base) and not same_model(named, name):
        yield f"the adapter `{adapter}` names its base `{named}`: whether `{name}` is the same is not known"


def _longrope_limits(config: Any) -> Iterator[int]:
    """Yield the lengths beyond which positions are scaled for long texts, where they are: of all layers, or by kind."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind in [parameters] if "rope_type" in parameters else parameters.values():
        if kind["rope_type"] == "longrope":
            yield kind["original_max_position_embeddings"]


def check_columns(pairs: PreparedPairs, objective: Objective) -> str:
    """Compare what the data says of its pairs with what the objective makes of it; return a warning, or nothing.

    Raises:
        UserError: Pairs have weights, and a loss does not know pairs; or all weights are 0.
    """
    weighted, with_margin = int((pairs.weights != 1).sum()), int((pairs.margins != 0).sum())
    if weighted and objective.refuses_weights:
        have = several(weighted, "pair has", "pairs have")
        what = f"{have} a weight, but {objective.refuses_weights} compares responses of different pairs"
        raise UserError(what, "`loss`", "take the column `weight` out of the data, or choose another loss")
    if not (pairs.weights > 0).any():
        what = f"every pair of {len(pairs):,} has weight 0, so that there is nothing to learn"
        raise UserError(what, "the column `weight`", "give weights above 0 (the smallest 32-bit number is about 1e-45)")
    if with_margin and not objective.uses_margins:
        have = several(with_margin, "pair has a margin", "pairs have a margin")
        return "; ".join(filter(None, (f"{have}, which the loss `{objective}` ignores", objective.use_of_margins)))
    if objective.uses_margins and not with_margin:
        return "no pair has a margin, so that `margin_scale` has no effect"
    return ""


def check_ends(pairs: PreparedPairs, tokenizer: Any, end_tokens: frozenset[int]) -> str:
    """Compare how responses end with where generation ends; return a warning, or nothing."""
    lacking = without_end(pairs, end_tokens)
    if not lacking.any() or not (closing := closing_token(pairs, lacking, tokenizer)):
        return ""
    what = f"{several(int(lacking.sum()), 'pair ends', 'pairs end')} with `{closing}`, which does not stop generation"
    return f"{what}: {way_out(closing, tokenizer)}"


def check_tokens(pairs: PreparedPairs, tokenizer: Any, end_tokens: frozenset[int]) -> Iterator[str]:
    """Prove of every pair what its tokens must fulfil.

    Args:
        pairs: All pairs of the run.
        tokenizer: What they were tokenized with.
        end_tokens: The ids that may end a response.

    Yields:
        A line for each thing that holds.

    Raises:
        UserError: One does not hold; it names a pair.
    """
    heads = pairs.heads("prompt", 2)
    _require(
        pairs,
        (heads != tokenizer.bos_token_id).any(axis=1) if tokenizer.bos_token_id is not None else None,
        "the prompt starts with two BOS tokens",
        "the chat template writes one that the text has already",
    )
    yield "at most one BOS in every prompt"
    ends = end_tokens | (set(tokenizer.all_special_ids) - {tokenizer.bos_token_id})
    cut = pairs.flags & RESPONSES_CUT.flag > 0
    for name in ("chosen", "rejected"):
        num_ends = _ends(pairs.tails(name, TAIL), tokenizer, ends)
        _require_ends(pairs, (num_ends >= 1) | cut, name, tokenizer)
        hint = "the chat template writes one that the turn has already"
        # Of several turns, each ends.
        once = (num_ends <= 1) & ((pairs.counts(name, end_tokens) <= 1) | pairs.has_gaps(name))
        _require(pairs, once, f"the {name} response ends twice", hint)
    truncated = several(int(cut.sum()), "pair was", "pairs were")
    yield f"every response ends, once{f' ({truncated} truncated and may not end)' if cut.any() else ''}"
    joined = pairs.manifest["statistics"]["joined_at_boundary"]
    apart = f" ({joined} tokenized separately, where the tokenizer would have merged)" if joined else ""
    yield f"the prompt's tokens are a true prefix of both sequences in every pair{apart}"


def check_logps(scorer: Scorer, shortest: PairBatch, accelerator: Accelerator) -> str:
    """Prove that log-probabilities are those of the model's own logits, and of what stands before each token alone.

    Both are shown in float32; in a lower precision they have to be finite as well. Return a line that says so.

    Args:
        scorer: The policy's.
        shortest: One short pair: of this one, all logits are made.
        accelerator: Knows the precision.

    Raises:
        UserError: They are not, or not finite.
    """
    precision = precision_of(accelerator.mixed_precision)
    with asking(scorer.policy), torch.no_grad():
        with in_float32(scorer.policy):
            difference, ahead = scorer.largest_difference(shortest), scorer.looks_ahead(shortest)
        with accelerator.autocast():
            finite = bool(torch.isfinite(scorer(shortest)).all())
    if not math.isfinite(difference) or not finite:
        what = "the model's log-probabilities are not finite before step 1"
        hint = "its weights are damaged, or its precision is too low: download it again, or set `model.dtype: float32`"
        raise UserError(what, type(scorer.policy).__name__, hint)
    if not ahead <= precision.exactness:
        what = f"a token's log-probability changes by {ahead:.2g} nats with later tokens: the model attends to them"
        hint = "it is not a causal language model, or its config.json does not say so (`is_decoder: true`)"
        raise UserError(what, type(scorer.policy).__name__, hint)
    if not difference <= precision.exactness:
        what = f"log-probabilities differ from the model's own by {difference:.2g} nats per token"
        raise UserError(
            what, type(scorer.policy).__name__, "choose another architecture: this one treats its logits in its own way"
        )
    return own_logps_line(difference, precision)


def own_logps_line(difference: float, precision: Precision) -> str:
    """Say that log-probabilities are those of the model's own logits, up to a difference in nats per token."""
    where = ", in float32" if precision.is_lower else ""
    return f"log-probabilities are the model's own (largest difference {difference:.1g} nats per token{where})"


def check_reference(
    policy: Policy, objective: Objective, reference: BatchScorer, batch: PairBatch, accelerator: Accelerator
) -> str:
    """Prove that the policy equals its reference before step 1; return a line that says so.

    In a lower precision than float32 they differ by rounding where the reference's answers come from other
    micro-batches: by up to `NOISE_FACTOR` times as much as rounding takes the policy from float32.

    Args:
        policy: The policy, placed.
        objective: What the line tells the loss of.
        reference: The reference, which is the policy before step 1.
        batch: Some pairs of the run.
        accelerator: Knows the precision.

    Raises:
        UserError: They differ in a token's log-probability.
    """
    precision = precision_of(accelerator.mixed_precision)
    with torch.no_grad():
        own = SequenceLogps.of(policy.scorer(batch), batch.responses)
        answers = SequenceLogps(reference(batch), batch.responses)
    difference, noise = float((own.tokens - answers.tokens).abs().max()), 0.0
    equal = difference <= precision.exactness
    if precision.is_lower and not all(gather_object([equal])):
        with torch.no_grad(), in_float32(policy.model):
            noise = distance(own.tokens, policy.bare(batch))
        equal = equal or distance(own.tokens, answers.tokens) <= NOISE_FACTOR * max(noise, precision.exactness)
    if not equal:
        what = (
            f"the policy is not its reference before step 1: a token's log-probability differs by {difference:.2g} nats"
        )
        raise UserError(what, f"{len(batch.pairs)} of the run's pairs", "report this as a bug of the program")
    step = StepInfo(len(batch.pairs), sum(batch.lengths[: len(batch.pairs)]), batch.margins)
    loss, exact = (float(objective(own, others, step).losses.mean()) for others in (answers, own))
    counted = objective.uses_margins and bool(batch.margins.any())
    about = f" with {'its margin' if len(batch.pairs) == 1 else 'their margins'} in the data" if counted else ""
    if not noise:
        return f"the policy equals its reference: the loss is {loss:.6f}{about}"
    return (
        f"the policy equals its reference up to rounding in {precision.name}, by which tokens differ up to "
        f"{difference:.2g} nats: the loss is {loss:.6f}{about}, without rounding {exact:.6f}"
    )


def _require_ends(pairs: PreparedPairs, ends: NDArray[np.bool_], name: str, tokenizer: Any) -> None:
    """Raise for the first pair of which a response does not end."""
    closing = "" if ends.all() else closing_token(pairs, ~ends, tokenizer)
    what = f"the {name} response has no end token"
    if closing:
        what += (
            f", since the template ends it with `{closing}` and the tokenizer ends texts with `{tokenizer.eos_token}`"
        )
    _require(pairs, ends, what, way_out(closing, tokenizer))


def _require(pairs: PreparedPairs, holds: NDArray[np.bool_] | None, what: str, hint: str) -> None:
    """Raise for the first pair of which something does not hold."""
    if holds is None or holds.all():
        return
    first = int(np.argmin(holds))
    raise UserError(f"{what} (in {int((~holds).sum())} of {several(len(pairs), 'pair')})", pairs[first].origin, hint)


def _ends(tails: NDArray[np.int32], tokenizer: Any, end_tokens: frozenset[int] | set[int]) -> NDArray[np.int64]:
    """Count the end tokens that close each response, white space between and behind them left aside.

    `tails` is `[pairs, k]`: each response's last tokens, −1 where it is shorter.
    """
    found, inverse = np.unique(tails, axis=0, return_inverse=True)
    blank = {int(t) for t in np.unique(tails) if t >= 0 and not tokenizer.decode([int(t)]).strip()}
    counts = np.zeros(len(found), np.int64)
    for row, tail in enumerate(found):
        for token in reversed(tail.tolist()):
            if token in end_tokens:
                counts[row] += 1
            elif token not in blank:
                break
    return counts[inverse.reshape(-1)]
