"""Which weights train: `Trained` at the end lists the ways.

A way says which weights an optimizer moves, how the policy answers as before step 1, and what a checkpoint holds of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.digests import weights_digest
from dpo_cli.modeling.folders.loading import load_weights
from dpo_cli.modeling.folders.saved_weights import SavedWeights, saved_state
from dpo_cli.modeling.folders.saving import prove_saving, write_model
from dpo_cli.modeling.split import state_of
from dpo_cli.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.modeling.folders.weight_types import WeightTypes


class Whole(Settings):
    """Train every weight that text reaches."""

    type: Literal["whole"] = "whole"
    """Which weights train."""

    def choose(self, model: PreTrainedModel) -> None:
        """Mark what trains: in a model that reads more than text, the gradient knows nothing of the rest."""
        if model.config.get_text_config() is not model.config:
            parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
            reached = {id(parameter) for part in parts for parameter in part.parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in reached)

    def described(self, model: PreTrainedModel) -> str:
        """Say what trains, in a few words; nothing where no adapter does."""
        return ""

    def fresh(self) -> Self:
        """Return the same where no weights are to go on from."""
        return self

    def weights(self, model: PreTrainedModel) -> list[Parameter]:
        """Return the weights that train."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def moved(self, model: PreTrainedModel) -> dict[str, Parameter]:
        """Return by name what training moves, whether it takes gradients now or not."""
        return dict(model.named_parameters())

    def fingerprints(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, str]:
        """Return a digest of each part of what answers before step 1, by what it is called, as if held in a dtype."""
        return {"model": weights_digest(model, dtype=dtype)}

    def beginning_bytes(self, model: PreTrainedModel) -> int:
        """Return what it takes in memory to answer as before step 1: a copy of every weight that trains."""
        return sum(parameter.nbytes for parameter in self.weights(model))

    def own_names(self, model: PreTrainedModel) -> Callable[[str], str | None]:
        """Return a function from the name of a weight to its name in the model by itself; None: it was added."""
        return str

    def keep_beginning(self, model: PreTrainedModel) -> bool:
        """Keep what it takes to answer as now inside `at_beginning`; tell whether that is a copy of the whole model."""
        return True

    def settle(self, model: PreTrainedModel) -> None:
        """Settle what follows from the model's own weights, which came into it after what trains was chosen."""

    def at_beginning(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Return the context in which what trains has no effect on this model; here it has, and a copy answers."""
        return contextlib.nullcontext()

    def training_pass(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Return the context of a pass with gradient: here it is as one without."""
        return contextlib.nullcontext()

    def prove_saving(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
        """Prove that what trains can be saved and read again; return a line that says so.

        Raises:
            UserError: Something fails.
        """
        return prove_saving(model, tokenizer)

    def state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the model, by name, tied weights under each of their names."""
        return state_of(model)

    def sharded_state(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what each process saves its rows of, tied weights once, and what is gathered: nothing."""
        return saved_state(model), {}

    def attend_writing(
        self, model: PreTrainedModel, state: Mapping[str, Tensor], types: WeightTypes | None = None
    ) -> None:
        """Take part while another process writes what is sharded, or compares it with what was written."""
        SavedWeights(model, state, types).attend()

    def write(
        self,
        model: PreTrainedModel,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        state: Mapping[str, Tensor],
        types: WeightTypes | None = None,
        largest_bytes: int | None = None,
    ) -> None:
        """Write what `state` returned, and all that it takes to load it, into a folder; rounded to types, if any."""
        write_model(folder, model, tokenizer, SavedWeights(model, state, types, largest_bytes))

    def check_written(
        self, model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor], types: WeightTypes | None = None
    ) -> None:
        """Compare what was written with what is in memory, rounded to types, if any.

        Raises:
            UserError: The disk did not keep it.
        """
        SavedWeights(model, state, types).check(folder)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        """Replace the weights by those in a folder.

        Raises:
            UserError: They are another model's.
        """
        load_weights(model, folder)


Trained = Whole | Adapted
"""The closed union of all ways to choose what trains, told apart by `type`."""
