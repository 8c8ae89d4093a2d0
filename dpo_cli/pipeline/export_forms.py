"""What is written of a policy, how its weights are rounded for that, and who reads it: `Written` lists the forms."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM

from dpo_cli.config.export_forms import GgufFolder, PeftFolder
from dpo_cli.config.exporting import Export
from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.extras import import_bitsandbytes
from dpo_cli.modeling.folders import tokenizers
from dpo_cli.modeling.folders.completeness import load_complete, untied
from dpo_cli.modeling.folders.refusals import explained
from dpo_cli.modeling.folders.saved_weights import round_as_saved
from dpo_cli.modeling.folders.saving import logits_alone, origin_of, write_licence
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.gguf.architectures import gguf_problem
from dpo_cli.modeling.gguf.conversion import dequantized, write_settings
from dpo_cli.modeling.gguf.modelfile import modelfile
from dpo_cli.modeling.gguf.tensors import round_as_in_file
from dpo_cli.modeling.gguf.types import GgufType
from dpo_cli.modeling.gguf.vocabulary import Inexpressible, Vocabulary
from dpo_cli.modeling.gguf.writing import write_gguf
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.pipeline.session import Session

_LONGEST_NAME = 50


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
        if (largest := policy.weights.largest()) > self.types.most:
            what = f"{self.types} cannot hold all weights: the largest is {largest:.3g}"
            raise UserError(what, "--dtype", "choose `--dtype float32` or `bfloat16`", status=FAILED)

    def round(self, policy: Policy) -> bool:
        """Round weights in memory as they are written; tell whether one is another then."""
        return round_as_saved(policy.model, self.types)

    def write(self, policy: Policy, tokenizer: Any, folder: Path) -> None:
        """Write the policy into a folder that exists.

        Raises:
            UserError: The disk did not keep it.
        """
        policy.weights.write(folder, tokenizer, types=self.types, largest_bytes=self.largest_bytes)
        policy.weights.check_written(folder, types=self.types)

    def read(self, session: Session, folder: Path) -> Read:
        """Read a folder as transformers does.

        Raises:
            UserError: Weights are missing or left over; or settings tie weights that differ.
        """
        trust = session.config.model.trust
        how: dict[str, Any] = {"attn_implementation": trust.attention} if trust.attention else {}
        with explained(str(folder), "model"):
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

    def round(self, policy: Policy) -> bool:
        """Leave the weights as they are."""
        return False

    def write(self, policy: Policy, tokenizer: Any, folder: Path) -> None:
        """Write the policy's adapter into a folder that exists.

        Raises:
            UserError: The disk did not keep it.
        """
        policy.weights.write(folder, tokenizer)
        policy.weights.check_written(folder)

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


@dataclass(frozen=True)
class AsGguf:
    """A folder with a GGUF file, and a Modelfile for Ollama beside it.

    Attributes:
        kind: The type of its weights.
        name: What the model is called.
        stops: The tokens that end a text.
        vocabulary: What the file has about the tokenizer.
    """

    kind: GgufType
    name: str
    stops: frozenset[int]
    vocabulary: Vocabulary
    reader: ClassVar[str] = "dpo"

    def __str__(self) -> str:
        """Name what the weights are written in."""
        return self.kind

    @property
    def rounds(self) -> bool:
        """Whether weights may be others then."""
        return self.kind != "f32"

    def check(self, policy: Policy) -> None:
        """Refuse nothing: a weight that is too large is refused where it is rounded."""

    def round(self, policy: Policy) -> bool:
        """Round weights in memory as they are written; tell whether one is another then."""
        return round_as_in_file(policy.model, self.kind)

    def write(self, policy: Policy, tokenizer: Any, folder: Path) -> None:
        """Write the policy into a folder that exists.

        Raises:
            UserError: The disk did not keep it.
        """
        file = self.file(folder)
        write_gguf(policy.model, file, self.kind, self.vocabulary.name_for(self.name), self.vocabulary.add_to)
        ollama = modelfile(file.name, tokenizer, self.stops, policy.model.generation_config)
        (folder / "Modelfile").write_text(ollama, encoding="utf-8")
        write_licence(folder, policy.model)

    def read(self, session: Session, folder: Path) -> Read:
        """Read the file as a model that is named in a configuration is read, but leave nothing of it in the cache.

        Raises:
            UserError: It cannot be read.
        """
        file = self.file(folder)
        with tempfile.TemporaryDirectory() as scratch:
            settings = Path(scratch) / "settings"
            write_settings(file, settings)
            policy = Policy(dequantized(file, settings).to(session.accelerator.device))
            named = str(settings)
            return Read(policy, tokenizers.load_tokenizer(named), tokenizers.generation_config(named))

    def file(self, folder: Path) -> Path:
        """Return the file in a folder."""
        # Neither an option of a command, nor hidden, nor too long for a file system.
        name = re.sub(r"[^\w.-]+", "-", self.name).strip(".-")[:_LONGEST_NAME] or "model"
        return folder / f"{name}-{self.kind.upper()}.gguf"


Written = AsModel | AsAdapter | AsGguf
"""The closed union of all forms, as they are written and read."""


def written_as(wanted: Export, policy: Policy, tokenizer: Any, stops: Collection[int]) -> Written:
    """Return how something is written, before anything is scored.

    Args:
        wanted: What is asked for.
        policy: What is exported.
        tokenizer: Its tokenizer.
        stops: The tokens that end its texts.

    Raises:
        UserError: The form has no words for it.
    """
    form = wanted.form
    if isinstance(form, PeftFolder):
        return AsAdapter(wanted.source.config.model.name)
    if isinstance(form, GgufFolder):
        return AsGguf(form.kind, wanted.source.name, frozenset(stops), _vocabulary(policy, tokenizer, stops))
    types = WeightTypes({}, PRECISIONS[form.dtype].dtype) if form.dtype else origin_of(policy.model).types
    return AsModel(types, form.largest_bytes)


def _vocabulary(policy: Policy, tokenizer: Any, stops: Collection[int]) -> Vocabulary:
    """Return the vocabulary of a model that a GGUF file can hold.

    Raises:
        UserError: It cannot.
    """
    no_end = "" if stops else "the model has no token that ends a text, and readers of GGUF files take one of their own"
    if not (problem := gguf_problem(policy.model.config.to_dict()) or no_end):
        try:
            return Vocabulary.of(tokenizer, policy.vocabulary, stops)
        except Inexpressible as found:
            problem = str(found)
    raise UserError(problem, "--gguf", "export it as a model folder, without `--gguf`")
