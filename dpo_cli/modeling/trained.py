"""Which weights train: `Trained` at the end lists the ways.

A way says which weights an optimizer moves; what it returns of a model says how that answers as before step 1, and how
what trains is saved and read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.modeling.adapters.adapted import Adapted, AdapterWeights
from dpo_cli.modeling.digests import weights_digest
from dpo_cli.modeling.folders.loading import load_weights
from dpo_cli.modeling.folders.saved_weights import SavedWeights, saved_state
from dpo_cli.modeling.folders.saving import prove_saving, write_model
from dpo_cli.modeling.split import state_of
from dpo_cli.modeling.weights import MovedWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.modeling.folders.weight_types import WeightTypes


class WholeWeights(MovedWeights):
    """All weights of a model, which train and are saved; those that text does not reach stay as they are."""

    described = ""
    """What trains, in a few words: nothing where no adapter does."""

    def moved(self) -> dict[str, Parameter]:
        """Return by name what training moves, tied weights once, whether it takes gradients now or not."""
        return dict(self.model.named_parameters())

    def digests(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        """Return a digest of each part of what answers now, by what it is called, as if held in a dtype."""
        return {"model": weights_digest(self.model, dtype=dtype)}

    def own_name(self) -> Callable[[str], str | None]:
        """Return a function from the name of a weight to its name in the model by itself; None: it was added."""
        return str

    def settle(self) -> None:
        """Settle what follows from the model's own weights, which came into it after what trains was chosen."""

    def beginning_bytes(self) -> int:
        """Return what it takes in memory to answer as before step 1: a copy of every weight that trains."""
        return sum(parameter.nbytes for parameter in self.trained())

    def keep_beginning(self) -> bool:
        """Keep what it takes to answer as now inside `at_beginning`; tell whether that is a copy of the whole model."""
        return True

    def at_beginning(self) -> AbstractContextManager[None]:
        """Return the context in which what trains has no effect on this model; here it has, and a copy answers."""
        return contextlib.nullcontext()

    def training_pass(self) -> AbstractContextManager[None]:
        """Return the context of a pass with gradient: here it is as one without."""
        return contextlib.nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the model, by name, tied weights under each of their names; no copies."""
        return state_of(self.model)

    def sharded_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what each process saves its rows of, tied weights once, and what is gathered: nothing."""
        return saved_state(self.model), {}

    def write(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        state: Mapping[str, Tensor] | None = None,
        types: WeightTypes | None = None,
        largest_bytes: int | None = None,
    ) -> None:
        """Write the model and its tokenizer as a Hugging Face folder.

        Args:
            folder: A folder that exists.
            tokenizer: Written beside the weights.
            state: What `state` returned, where the weights may have changed since.
            types: What weights are rounded to; None: they are written as they are.
            largest_bytes: The most bytes of a file of weights; None: as transformers has it.
        """
        write_model(folder, self.model, tokenizer, SavedWeights(self.model, state, types, largest_bytes))

    def attend_writing(self, state: Mapping[str, Tensor], types: WeightTypes | None = None) -> None:
        """Take part while the main process calls `write`, or `check_written`, where weights are sharded."""
        SavedWeights(self.model, state, types).attend()

    def check_written(
        self, folder: Path, state: Mapping[str, Tensor] | None = None, types: WeightTypes | None = None
    ) -> None:
        """Compare the weights in a folder, tensor by tensor, with those that `write` was given.

        Raises:
            UserError: The disk did not keep them.
        """
        SavedWeights(self.model, state, types).check(folder)

    def restore(self, folder: Path) -> None:
        """Replace the weights by those that `write` wrote into a folder.

        Raises:
            UserError: They are another model's.
        """
        load_weights(self.model, folder)

    def prove_saving(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Prove, before hours go into it, that the model can be saved and read again; return a line that says so.

        Raises:
            UserError: Something fails.
        """
        return prove_saving(self.model, tokenizer)


@dataclass(frozen=True)
class Whole:
    """Train every weight that text reaches."""

    def choose(self, model: PreTrainedModel) -> WholeWeights:
        """Mark what trains: in a model that reads more than text, the gradient knows nothing of the rest."""
        if model.config.get_text_config() is not model.config:
            parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
            reached = {id(parameter) for part in parts for parameter in part.parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in reached)
        return WholeWeights(model)

    def fresh(self) -> Whole:
        """Return the same where no weights are to go on from."""
        return self


Trained = Whole | Adapted
"""The closed union of all ways to choose what trains."""

TrainedWeights = WholeWeights | AdapterWeights
"""What they return of a model."""
