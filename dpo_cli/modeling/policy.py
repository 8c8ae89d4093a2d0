"""The policy: a model that answers with log-probabilities, now and as before step 1, wherever its weights are.

What else is asked of the weights that training moves, is asked of its `weights`: their values, and how they are saved
and read again. A reference that is a model of its own is a policy as well.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dpo_cli.modeling.adapters.adapted import merge_layers
from dpo_cli.modeling.compiled import are_compiled
from dpo_cli.modeling.copies import copied
from dpo_cli.modeling.folders.identities import identity_of, known_identity, remember_identity
from dpo_cli.modeling.folders.loading import empty_policy, load_onto_shards, load_policy, weights_of
from dpo_cli.modeling.folders.model_files import NO_TRUST, Trust
from dpo_cli.modeling.folders.model_names import whole_model
from dpo_cli.modeling.folders.saving import origin_of
from dpo_cli.modeling.held import FLOAT32, Held
from dpo_cli.modeling.placement import Placement, Sharded, placement_for
from dpo_cli.modeling.scorer import Scorer, recompute_activations
from dpo_cli.modeling.sharded_sizes import Sharding, present_share, sizes_of_rank, whole_weights
from dpo_cli.modeling.shards import local, share_rows, unspread
from dpo_cli.modeling.sizes import NOTHING_GATHERED, Sizes
from dpo_cli.modeling.split import drop_low_bits
from dpo_cli.modeling.trained import Trained, TrainedWeights, Whole, WholeWeights

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from dpo_cli.modeling.layouts import Layout


class Policy:
    """A causal language model, as its weights are held, and placed among the processes of a run.

    Args:
        model: The model.
        trained: Which weights train.
        held: How they are held.

    Attributes:
        weights: Those that training moves.
    """

    def __init__(self, model: PreTrainedModel, trained: Trained | None = None, held: Held = FLOAT32) -> None:
        self._trained, self._held = trained or Whole(), held
        self._own_attention: str = model.config._attn_implementation
        self._placement: Placement | None = None
        self._layout: Layout | None = None
        self._bare: Scorer | None = None
        self._scorer: nn.Module | None = None
        self._beginning: nn.Module | None = None
        self._blueprint: PreTrainedModel | None = None
        self.weights: TrainedWeights = self._trained.choose(model)

    @property
    def model(self) -> PreTrainedModel:
        """The model; code outside this room reads its settings and calls it, and leaves its weights alone."""
        return self.weights.model

    @classmethod
    def load(
        cls,
        name: str,
        trust: Trust = NO_TRUST,
        device: torch.device | str = "cpu",
        trained: Trained | None = None,
        held: Held = FLOAT32,
        placement: Placement | None = None,
    ) -> Policy:
        """Load a model and all of its weights; where a placement shards them, those that this process is going to have.

        Raises:
            UserError: It cannot be loaded, as `load_policy` says.
        """
        if not isinstance(placement, Sharded):
            return cls(load_policy(name, trust, held, device), trained, held)

        made: list[Policy] = []

        def lay_out(model: PreTrainedModel) -> Callable[[str], str | None]:
            made.append(cls(model, trained, held))
            made[0]._shard(placement)
            return made[0].weights.own_name()

        load_onto_shards(name, trust, held.on_shards(), lay_out)
        made[0].weights.settle()
        return made[0]

    def _shard(self, placement: Sharded) -> None:
        """Shard the weights over processes; of those that are placeholders, the values are left open."""
        self._blueprint = unspread(self.model)
        self._placement, self._bare = placement, Scorer(self.model)
        placement.shard(self._bare, self._held.gathered_as())

    @classmethod
    def empty(cls, name: str, trust: Trust = NO_TRUST, trained: Trained | None = None, held: Held = FLOAT32) -> Policy:
        """Build a model without its weights: it has sizes and settings, and answers nothing."""
        return cls(empty_policy(name, trust, held), trained, held)

    def sketched(self, config: PreTrainedConfig) -> Policy:
        """Return a policy without weights of which the same trains, held in the same way, under other settings."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **self._held.built_as()).eval()
            model.tie_weights()
        return Policy(model, self._trained, self._held)

    def untrained(self, config: PreTrainedConfig, device: torch.device) -> Policy:
        """Return a policy with random weights of which the same trains, held in the same way, under other settings."""
        model = AutoModelForCausalLM.from_config(config, **self._held.built_as()).eval()
        return Policy(self._held.take_over(model, device), self._trained.fresh(), self._held)

    def __str__(self) -> str:
        """Name the architecture."""
        return type(self.model).__name__

    @property
    def held_as(self) -> str:
        """How the weights are held: the digests of a model that is held otherwise are others."""
        dtype = self._held.dtype
        return dtype if self._held.type == dtype else f"{self._held.type} ({dtype})"

    @property
    def identity(self) -> str:
        """A digest of what answers before step 1, which it has to be asked for before."""
        return identity_of(self.weights.fingerprints.values(), self._held)

    def remember_identity(self, trust: Trust) -> None:
        """Keep the identity beside the stamps of the files, so that `known_identity` has it without the weights."""
        origin = origin_of(self.model)
        if origin.read_from is not None:
            remember_identity(origin.read_from, origin.stamp, self._held, trust, self.identity)

    def known_identity(self, name: str, trust: Trust) -> str | None:
        """Return the identity that the model would have if its weights, left out here, were loaded; or None."""
        if whole_model(name) != name:
            return None
        return known_identity(weights_of(name, self.model.name_or_path), self._held, trust)

    @property
    def bare(self) -> Scorer:
        """What answers in the precision of the weights and is proved, whatever the run computes in."""
        if self._bare is None:
            self._bare = Scorer(self.model)
        return self._bare

    @property
    def scorer(self) -> nn.Module:
        """What answers with the log-probabilities of a batch of pairs: a `Scorer`, as `place` wrapped it."""
        return self._scorer or self.bare

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def sizes(self, shards: Sharding | None = None) -> Sizes:
        """Return what the weights come to, whether they are in memory or not.

        Args:
            shards: How they are sharded, for what one process has of them; None: not at all.
        """
        held, moved = self._held.bytes_of(self.model), self.weights.moved().values()
        numbers, beginning = self._held.numbers_of(self.model), self.weights.beginning_bytes()
        if shards is not None:
            weights = whole_weights(self.model, self._held)
            return sizes_of_rank(weights, moved, self._held, shards, numbers, beginning=beginning > 0)
        trained = self.weights.trained()
        return Sizes(
            numbers=numbers,
            held=held,
            present=int(held * present_share(self.model)),
            num_trained=sum(parameter.numel() for parameter in trained),
            trained=self._held.gradient_bytes(trained),
            saved=self._held.saved_bytes(moved),
            gathered=NOTHING_GATHERED,
            beginning=beginning,
        )

    def read(self, layout: Layout) -> None:
        """Prepare the model for pairs of a layout, whatever it read before.

        Raises:
            CannotPack: Its architecture cannot read it.
        """
        if self.model.config._attn_implementation != self._own_attention:
            self.model.set_attn_implementation(self._own_attention)
        layout.prepare(self.model)
        self._layout = layout

    @property
    def passes_through(self) -> dict[str, Any]:
        """How a pass is computed, which decides how numbers are rounded: in which layout, layers and shards."""
        layers = {"layers": "compiled" if are_compiled(self.model) else "not compiled"}
        return layers | ({"layout": self._layout.described} if self._layout else {}) | self.sharded

    @property
    def sharded(self) -> dict[str, int]:
        """Among how many processes the weights are sharded, if they are, which decides how sums are rounded."""
        meshes = (one.device_mesh for one in self.model.parameters() if isinstance(one, DTensor))
        mesh = next(meshes, None)
        return {} if mesh is None else {"shards": mesh.shape[-1]}

    @contextlib.contextmanager
    def reading_plainly(self) -> Iterator[PreTrainedModel]:
        """Yield the model with its own attention, for `generate` and the padded layout, whatever layout it reads."""
        attention = self.model.config._attn_implementation
        if attention == self._own_attention:
            yield self.model
            return
        self.model.set_attn_implementation(self._own_attention)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(attention)

    def place(
        self, accelerator: Accelerator, *, trained: bool, collisions: bool = False, recomputed: bool = False
    ) -> None:
        """Bring the policy to where the run computes, with whatever processes the run has.

        Args:
            accelerator: Knows them, device and precision.
            trained: Whether it takes gradients.
            collisions: As in `Scorer`.
            recomputed: Whether activations are computed again in the backward pass.

        Raises:
            UserError: The architecture cannot recompute activations, or has no plain vocabulary projection.
        """
        if recomputed:
            recompute_activations(self.model)
        if self._placement is None or not self._placement.is_sharded:
            self._placement, self._bare = placement_for(accelerator), None
        # What weights are sharded for is the scorer that they were sharded under.
        answers = self.bare if self._placement.is_sharded else Scorer(self.model)
        answers.collisions = collisions
        self._scorer = self._placement.wrap(answers, trained=trained)

    @property
    def placement(self) -> Placement:
        """Where the weights are; `place` has to have been called."""
        assert self._placement is not None, "the policy was not placed"
        return self._placement

    def keep_beginning(self) -> None:
        """Keep what it takes to answer as now, for `at_beginning`; to be called before step 1."""
        apart = self.weights.keep_beginning()
        self._beginning = self.placement.wrap(self.frozen_copy().bare, trained=False) if apart else self.scorer

    @contextlib.contextmanager
    def at_beginning(self) -> Iterator[None]:
        """Let the policy answer as it did when `keep_beginning` was called."""
        assert self._beginning is not None, "the beginning was not kept"
        scorer, self._scorer = self._scorer, self._beginning
        try:
            with self.weights.at_beginning():
                yield
        finally:
            self._scorer = scorer

    def frozen_copy(self) -> Policy:
        """Return a policy of its own with the same weights, none of which trains."""
        if not isinstance(self._placement, Sharded):
            return self._beside(copied(self.model))
        assert self._blueprint is not None
        other = self._beside(unspread(self._blueprint))
        other._shard(self._placement)
        other.model.requires_grad_(False)
        other._take_rows_of(self)
        if self._layout:
            other.read(self._layout)
        return other

    def with_adapter(self, trained: Trained) -> Policy:
        """Return a policy with the weights of this one, in the same memory, and an adapter beside them.

        Args:
            trained: Puts the adapter into the model. This one goes on without it, and none of its weights trains.

        Raises:
            UserError: The adapter does not fit.
        """
        assert self.model.config._attn_implementation == self._own_attention, "it reads a layout already"
        if not isinstance(self._placement, Sharded):
            return Policy(copied(self.frozen().model), trained, self._held)
        assert self._blueprint is not None
        self.frozen()
        other = Policy(unspread(self._blueprint), trained, self._held)
        other._shard(self._placement)
        other._take_rows_of(self, other.weights.own_name())
        other.weights.settle()
        return other

    def _take_rows_of(self, other: Policy, own_name: Callable[[str], str | None] = str) -> None:
        """Take over what this process has of another policy's weights, which are sharded alike.

        Those that train in neither are then in the same memory.

        Args:
            other: The other policy.
            own_name: Returns the name that one of our weights has there; None: it was added here.
        """
        theirs, shared = dict(other.model.named_parameters()), {}
        for name, parameter in self.model.named_parameters():
            if (own := own_name(name)) is None:
                continue
            if parameter.requires_grad or theirs[own].requires_grad:
                local(parameter).copy_(local(theirs[own]))
            else:
                shared[id(parameter)] = theirs[own]
        share_rows(self.model, shared)

    def _beside(self, model: PreTrainedModel) -> Policy:
        """Return a policy over a copy of this one's model, in which what trains was chosen already."""
        other = copy.copy(self)
        other.weights = self.weights.of(model)
        other._placement = other._scorer = other._bare = other._beginning = None
        return other

    def frozen(self) -> Policy:
        """Let no weight of this policy train, and return it: it is a reference."""
        self.model.requires_grad_(False)
        drop_low_bits(self.model)
        return self

    def merge(self) -> None:
        """Make the adapter part of the weights that it is beside; nothing is left of it, and nothing trains."""
        merge_layers(self.model)
        self._trained, self.weights = Whole(), WholeWeights(self.model)

    @contextlib.contextmanager
    def adding_up(self, *, last: bool) -> Iterator[None]:
        """Open the context of a pass whose gradients add to the step's; the last exchanges them."""
        with self.weights.training_pass(), self.placement.adding_up(self.scorer, last=last):
            yield

    def begin_step(self) -> None:
        """Begin a step that may be broken off."""
        self.placement.begin_step()

    def rejoin(self) -> None:
        """Exchange gradients as the step's last pass does, of which this process has broken off its passes somewhere.

        What they are of is to be forgotten, on all processes.
        """
        self.placement.rejoin(self.scorer)

    def clip(self, norm: float | None) -> Tensor:
        """Clip the step's gradients to a norm, or to none; return the norm before, for which the host does not wait."""
        return self.placement.clip(self.weights.trained(), norm)
