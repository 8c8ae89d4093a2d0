"""What is written of a policy, how its weights are rounded for that, and who reads it: `Written` lists the forms."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM

from dpo_cli.config.exporting import Form, PeftFolder
from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.extras import import_bitsandbytes
from dpo_cli.modeling.folders import tokenizers
from dpo_cli.modeling.folders.completeness import load_complete, untied
from dpo_cli.modeling.folders.saving import logits_alone
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.pipeline.session import Session


@dataclass(frozen=True)
class Read:
    """What a reader has of a folder.

    Attributes:
        policy: The model, in float32.
        tokenizer: Its tokenizer.
        generation: What it says of generation.
    """

    policy: Policy
    tokenizer: Any
    generation: Any


@dataclass(frozen=True)
class AsModel:
    """A folder that transformers reads.

    Attributes:
        types: The types of its weights.
        largest_bytes: The most bytes of a file of weights; None: as `final/` has.
    """

    types: WeightTypes
    largest_bytes: int | None
    reader: ClassVar[str] = "transformers"

    def __str__(self) -> str:
        """Name what the weights are written in."""
        return str(self.types)

    @property
    def rounds(self) -> bool:
        """Whether weights may be others then."""
        return self.types.rounds

    def check(self, policy: Policy) -> None:
        """Refuse weights that are too large for their types.

        Raises:
            UserError: Some are.
        """
        if (largest := policy.largest()) > self.types.most:
            what = f"{self.types} cannot hold all weights: the largest is {largest:.3g}"
            raise UserError(what, "--dtype", "choose `--dtype float32` or `bfloat16`", status=FAILED)

    def round(self, policy: Policy) -> None:
        """Round weights in memory as they are written."""
        policy.round_to(self.types)

    def write(self, policy: Policy, tokenizer: Any, folder: Path) -> None:
        """Write the policy into a folder that exists.

        Raises:
            UserError: The disk did not keep it.
        """
        policy.write(folder, tokenizer, types=self.types, largest_bytes=self.largest_bytes)
        policy.check_written(folder, self.types)

    def read(self, session: Session, folder: Path) -> Read:
        """Read a folder as transformers does.

        Raises:
            UserError: Weights are missing or left over; or settings tie weights that differ.
        """
        trust = session.config.model.trust
        how: dict[str, Any] = {"attn_implementation": trust.attention} if trust.attention else {}
        model = load_complete(AutoModelForCausalLM, str(folder), trust_remote_code=trust.remote_code, **how)
        if others := untied(model):
            what = f"config.json ties {', '.join(others)} to other weights, but the values differ"
            raise UserError(what, str(folder), "report this as a bug of the program", status=FAILED)
        logits_alone(model)
        policy = Policy(model.to(session.accelerator.device))
        return Read(policy, tokenizers.load_tokenizer(str(folder), trust), model.generation_config)


@dataclass(frozen=True)
class AsAdapter:
    """An adapter in a folder that PEFT reads beside its base.

    Attributes:
        base: The name of the base.
    """

    base: str
    reader: ClassVar[str] = "PEFT"
    rounds: ClassVar[bool] = False

    def __str__(self) -> str:
        """Name what the weights are written in."""
        return "float32"

    def check(self, policy: Policy) -> None:
        """Refuse nothing: float32 holds what is held in it."""

    def round(self, policy: Policy) -> None:
        """Leave the weights as they are."""

    def write(self, policy: Policy, tokenizer: Any, folder: Path) -> None:
        """Write the policy's adapter into a folder that exists.

        Raises:
            UserError: The disk did not keep it.
        """
        policy.write(folder, tokenizer)
        policy.check_written(folder)

    def read(self, session: Session, folder: Path) -> Read:
        """Load the base, and let PEFT put the adapter into it.

        Raises:
            UserError: The base cannot be loaded any more.
        """
        trust, device = session.config.model.trust, session.accelerator.device
        policy = Policy.load(self.base, trust, device, held=session.held)
        import_bitsandbytes()
        from peft import PeftModel

        with warnings.catch_warnings():
            # PEFT asks transformers in a way that is deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            PeftModel.from_pretrained(policy.model, str(folder))
        tokenizer = tokenizers.load_tokenizer(str(folder), trust)
        return Read(policy, tokenizer, tokenizers.generation_config(str(folder), trust))


Written = AsModel | AsAdapter
"""The closed union of all forms, as they are written and read."""


def written_as(form: Form, policy: Policy, base: str) -> Written:
    """Return how a form is written.

    Args:
        form: What is asked for.
        policy: What is exported.
        base: The name of the model that it came from.
    """
    if isinstance(form, PeftFolder):
        return AsAdapter(base)
    types = WeightTypes({}, PRECISIONS[form.dtype].dtype) if form.dtype else policy.came_in
    return AsModel(types, form.largest_bytes)
