"""What Accelerate wraps: a batch of pairs in, log-probabilities of the response tokens out.

The vocabulary projection happens inside this module's forward, so that the hooks that synchronise
gradients see everything the loss depends on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from dpo_cli.errors import UserError
from dpo_cli.modeling.attention.trees import reading
from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.logps import Head, token_logps
from dpo_cli.modeling.routing import expert_load, experts_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOOKED_FOR = "find_packed_sequence_indices"
"""What transformers looks for sequences with that begin anew within a row."""

BatchScorer = Callable[[PairBatch], Tensor]
"""Returns the log-probability of each response token of a batch, `[N]`, in nats, as a `Scorer` does."""


class Scorer(nn.Module):
    """A policy that answers with log-probabilities.

    Args:
        policy: A causal language model of transformers.
        collisions: Whether to answer as well how sure the policy is at each token, as WPO asks.

    Raises:
        UserError: The model has no vocabulary projection that could be found.
    """

    def __init__(self, policy: PreTrainedModel, *, collisions: bool = False) -> None:
        super().__init__()
        if not isinstance(policy.get_output_embeddings(), nn.Linear):
            name = type(policy).__name__
            raise UserError(f"{name} has no plain vocabulary projection", None, "choose another architecture")
        self.policy = policy
        self.collisions = collisions

    def forward(
        self,
        batch: PairBatch,
        *,
        with_load: bool = False,
        collisions: bool | None = None,
        instead: Callable[[PairBatch], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the log-probability of each response token of the batch, `[N]`, in nats.

        With `collisions`, by default the scorer's, `[2, N]`, as `token_logps` does; `with_load` the `expert_load` of
        the batch beside it. With `instead`, what that returns: weights that are sharded over processes are whole within
        this call alone.
        """
        if instead is not None:
            return instead(batch)
        collisions = self.collisions if collisions is None else collisions
        # Where experts were not asked about, the model is called as one that has none.
        asked = {"output_router_logits": True} if with_load else {}
        with reading(batch.tree), one_sequence_a_row():
            outputs = self.policy.base_model(**model_inputs(batch), **asked)
        states = outputs[0].flatten(0, 1)
        logps = token_logps(states, batch.predictions, batch.targets, self.head(), collisions=collisions)
        if not with_load:
            return logps
        return logps, expert_load(outputs.router_logits, experts_per_token(self.policy), batch.counts)

    def head(self) -> Head:
        """Return the projection on the vocabulary, with what the architecture does to its logits."""
        linear, config = self.policy.get_output_embeddings(), self.policy.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)

    def own_logps(self, batch: PairBatch) -> Tensor:
        """Return what `forward` should: the same log-probabilities, by the model's own logits, all of them."""
        found: Tensor = self(batch, instead=self._own_logps)
        return found

    def _own_logps(self, batch: PairBatch) -> Tensor:
        with reading(batch.tree), one_sequence_a_row():
            logits = self.policy(**model_inputs(batch)).logits
        logps = logits.flatten(0, 1)[batch.positions].float().log_softmax(-1)
        found: Tensor = logps.gather(-1, batch.targets[:, None]).squeeze(-1)
        return found

    @torch.no_grad()
    def largest_difference(self, batch: PairBatch) -> float:
        """Compare `forward` with the model's own logits, all of them; return the largest difference in nats.

        Architectures may treat their logits in ways that `head` does not know; this shows whether one does.
        """
        return float((self.own_logps(batch) - self(batch)).abs().max())

    @torch.no_grad()
    def looks_ahead(self, batch: PairBatch) -> float:
        """Return the most, in nats, that a token's log-probability changes when the tokens behind it are cut off.

        It is measured on the longest sequence of a padded batch. In a packed one no token sees those behind it.
        """
        if batch.attention_mask is None:
            return 0.0
        return float(self(batch, instead=self._ahead))

    def _ahead(self, batch: PairBatch) -> Tensor:
        assert batch.attention_mask is not None
        row = int(batch.attention_mask.sum(1).argmax())
        tokens = batch.input_ids[row : row + 1, : int(batch.attention_mask[row].sum())]
        half = max(tokens.shape[1] // 2, 1)
        whole, cut = (
            self.policy(input_ids=part, use_cache=False).logits[:, :half].float().log_softmax(-1)
            for part in (tokens, tokens[:, :half])
        )
        following = tokens[:, 1 : half + 1, None]
        found: Tensor = (whole - cut)[:, : following.shape[1]].gather(-1, following).abs().max()
        return found


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Keep transformers from looking for sequences that begin anew within a row, for which it waits for the device.

    Rows of the padded layout hold one sequence each, and a tree says itself what each token sees.
    """
    functions = vars(masking_utils)
    looked_for = functions[_LOOKED_FOR]
    functions[_LOOKED_FOR] = lambda position_ids: None
    try:
        yield
    finally:
        functions[_LOOKED_FOR] = looked_for


def model_inputs(batch: PairBatch) -> dict[str, Any]:
    """Return what a model of transformers is called with."""
    if batch.tree is None:
        # No token sees padding on the right, and a GPU's fastest attention takes no mask; given one, transformers would
        # wait for the device to look into it. On a CPU attention without a mask rounds otherwise.
        mask = batch.attention_mask if batch.input_ids.device.type == "cpu" else None
        return {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}
    return {"input_ids": batch.input_ids, "position_ids": batch.tree.depths[None], "use_cache": False}


def recompute_activations(policy: PreTrainedModel) -> None:
    """Switch on gradient checkpointing while dropout stays off.

    transformers recomputes a layer only where that layer is marked as training. So the mark is set on those
    layers alone, their children stay in evaluation mode, and their own dropout rates are set to zero.

    Raises:
        UserError: The architecture does not support it.
    """
    if not policy.supports_gradient_checkpointing:
        name = type(policy).__name__
        what = f"{name} does not support gradient checkpointing"
        raise UserError(what, "`training.gradient_checkpointing`", "set it to false")
    policy.activation_checkpointing_enable()
    # It has the embeddings ask for a gradient, which reentrant layers need: these are not, and beside a frozen base it
    # would be computed for nothing.
    policy.disable_input_require_grads()
    for module in policy.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
