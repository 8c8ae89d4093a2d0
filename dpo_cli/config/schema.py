"""Everything that can be set, with its default, its range and a sentence about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, Union

from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, model_validator

from dpo_cli.config.places import Places
from dpo_cli.data.pairs.renaming import ColumnNames
from dpo_cli.data.pairs.shapes import FORMATS, RankedRule
from dpo_cli.data.pairs.sources import Sources
from dpo_cli.data.records import BadRowRule, LengthRule, TurnRule
from dpo_cli.evaluation.best import BEST_BY
from dpo_cli.modeling.adapters.settings import Adapter, Lora
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.folders.model_files import Trust
from dpo_cli.modeling.held import QUANTIZED, WEIGHTS
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.preference.losses import Loss
from dpo_cli.preference.losses.pairwise import DPO
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import Cached, NoReference, Reference
from dpo_cli.reporting.trackers import Tracker
from dpo_cli.settings import (
    MAY_CHANGE,
    MAY_GROW,
    OneOf,
    OneOfLater,
    PathText,
    Settings,
    contradiction,
    on_resume,
    types,
)
from dpo_cli.system import plain_yaml
from dpo_cli.training.optimizer import SCHEDULES, AdamW, Optimizer

SHORT_FORMS = {
    "model": "name",
    "adapter": "type",
    "loss": "type",
    "reference": "type",
    "data.train": "path",
    "data.eval": "path",
    "training.optimizer": "type",
    "tracking": "type",
}
"""Groups that may be written as one word, and the setting that the word gives."""


def expand_short_form(group: str, value: Any) -> Any:
    """Turn `model: some/name` into `model: {name: some/name}`; leave anything else as it is."""
    return {SHORT_FORMS[group]: value} if group in SHORT_FORMS and isinstance(value, str) else value


def _typed(default: str) -> BeforeValidator:
    """Add the type that a group has by default, which pydantic wants said before it looks at the rest."""

    def with_type(value: Any) -> Any:
        return {"type": default, **value} if isinstance(value, dict) and "type" not in value else value

    return BeforeValidator(with_type)


def _short(group: str, schema: Any = str) -> BeforeValidator:
    return BeforeValidator(lambda value: expand_short_form(group, value), json_schema_input_type=schema)


def _short_type(group: str, union: Any, *others: Any) -> BeforeValidator:
    """Let a group of a closed union be written as its type alone; others may stand in its place."""
    return _short(group, Union[Annotated[str, OneOf(*types(union))], union, *others])


OneLoss = Annotated[Loss, _typed(DPO().type), _short_type("loss", Loss)]
ONE, SEVERAL = "a loss", "a list of losses"
"""What pydantic calls the two ways to write the losses; in no path of a setting."""

OneTracker = Annotated[Tracker, _short_type("tracking", Tracker)]
ONE_TRACKER, TRACKERS = "a tracker", "a list of trackers"
"""What it calls the two ways to write the trackers."""

SHARE, APART = "a fraction", "pairs of their own"
"""What it calls the two ways to hold pairs out."""
HeldOut = Annotated[
    Annotated[float, Tag(SHARE), Field(gt=0, lt=1)] | Annotated[Sources, Tag(APART)],
    Discriminator(lambda value: SHARE if isinstance(value, (float, int)) else APART),
]


def _droppable() -> Iterable[str]:
    # Comparing pairs takes NumPy.
    from dpo_cli.data.checkup.comparisons import DROPPABLE

    return DROPPABLE


class ModelSettings(Settings):
    """The model that is trained."""

    name: PathText = Field(min_length=1)
    """The model: a local folder, a .gguf file, or a Hub id; an adapter's folder is its base with the adapter in it."""
    dtype: Annotated[str, OneOf("auto", *PRECISIONS)] = "auto"
    """The precision of the computation; auto: bfloat16 on GPUs that have it, and where `weights` needs it."""
    weights: Annotated[str, OneOf("auto", *WEIGHTS)] = "auto"
    """How weights are held: float32; split (bfloat16 and the 16 bits it lacks); bfloat16, if they do not train; auto:
    split where a GPU computes in bfloat16, float32 elsewhere; beside an adapter, the dtype."""
    quantize: Annotated[str, OneOf(*QUANTIZED)] | None = None
    """The bits of a weight of linear layers under an adapter: 4 (nf4) or 8 (int8); null: those of the dtype."""
    chat_template: PathText | None = None
    """null: the tokenizer's own; the name of one of several; a Jinja file; `plain` for models without a template."""
    eos_token: str | None = Field(None, min_length=1)
    """The token that ends a response, if the template ends turns with another than the tokenizer's; saved."""
    attention: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] | None = None
    """The attention of the padded layout, by its name in transformers; null: what config.json names, else transformers'
    choice. The packed layout has its own attention."""
    allow_pickle: bool = False
    """Read pickled weights (.bin) where a model has no others, as bare tensors: nothing in them is executed."""
    trust_remote_code: bool = False
    """Run Python files that come with a model, with your rights. Read them first: they can do whatever you can."""

    @property
    def computed_in(self) -> str:
        """The precision of the computation, or `auto`."""
        return "bfloat16" if self.dtype == "auto" and self.weights in ("split", "bfloat16") else self.dtype

    @property
    def trust(self) -> Trust:
        """What every model of the run may bring along."""
        return Trust(self.trust_remote_code, self.allow_pickle, self.attention)


class DataSettings(Settings):
    """The preference pairs."""

    train: Sources | None = None
    """A data file, a glob, a folder, a prepared folder or a Hub id, with or without settings; or a list of these."""
    eval: HeldOut | None = 0.1
    """The held-out pairs: a fraction of `train`, chosen by `training.seed`; a source or a list; or null."""
    format: Annotated[str, OneOf("auto", *FORMATS)] = "auto"
    """The shape of the rows."""
    columns: ColumnNames | None = None
    """Columns under other names: `{prompt: question, chosen: response_j}` reads the data's `question` as `prompt`."""
    system: str | None = None
    """The system message of conversations without one; a row's own system message takes precedence."""
    on_bad_row: BadRowRule = "error"
    """Whether a row with a missing field, a wrong type or broken text stops the run or is dropped, counted."""
    max_length: int = Field(1024, ge=2)
    """The maximum number of tokens of prompt and response together."""
    on_too_long: LengthRule = "drop"
    """What to do with longer pairs; truncate shortens the prompt from the left, whole turns first."""
    min_response: int | None = Field(None, ge=1)
    """With truncate, the least tokens to which a response may be shortened from the right; null: never."""
    turns: TurnRule = "all"
    """Which of the assistant's turns in a response of several turns are scored."""
    ranked: RankedRule = "extremes"
    """Which pairs a list of ranked responses becomes: the best against the worst, or all that differ."""
    drop: list[Annotated[str, OneOfLater(_droppable)]] = Field(default_factory=list)
    """Which findings of the check leave pairs out of the run: duplicates, conflicts, leakage, near_identical, …"""

    @model_validator(mode="after")
    def _check_min_response(self) -> Self:
        if self.min_response is not None and self.on_too_long != "truncate":
            what = "`data.min_response` has no effect unless `data.on_too_long` is `truncate`"
            both = "min_response", "on_too_long"
            raise contradiction(what, "set `data.on_too_long: truncate`, or leave `data.min_response` out", *both)
        if self.min_response is not None and self.min_response >= self.max_length:
            what = (
                f"`data.min_response` leaves no room for a prompt below `data.max_length`, which is {self.max_length}"
            )
            hint = f"set `data.min_response` to less than {self.max_length}, or leave it out"
            raise contradiction(what, hint, "min_response", "max_length")
        return self


class TrainingSettings(Settings):
    """The optimizer's steps."""

    epochs: Annotated[float, MAY_GROW] = Field(1, gt=0, le=100_000)
    """Passes over the training pairs."""
    max_steps: Annotated[int | None, MAY_GROW] = Field(None, ge=1)
    """Where to stop earlier, in optimizer steps."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs of one optimizer step, across all processes."""
    micro_batch_tokens: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], MAY_CHANGE] = "auto"
    """The limit of tokens in one forward pass, with padding; affects memory and speed, not the result."""
    shuffle: bool = True
    """Whether every epoch has its own order; otherwise the order of the data."""
    layout: Annotated[str, OneOf("auto", *LAYOUTS), MAY_CHANGE] = "auto"
    """How pairs are laid out for the model; auto: packed if it is proved exact, else padded."""
    attention: Annotated[str, OneOf("auto", *KERNELS), MAY_CHANGE] = "auto"
    """What computes the attention of the packed layout; auto: pieces on a CPU, on a GPU flex, or varlen if it fails."""
    optimizer: Annotated[Optimizer, _typed(AdamW().type), _short_type("training.optimizer", Optimizer)] = AdamW()
    """The optimizer; adafactor keeps almost no state, adamw_8bit a quarter of AdamW's, rmsprop half."""
    offload: Annotated[Literal["optimizer"] | None, MAY_CHANGE] = None
    """What a GPU leaves to the host: optimizer state and, unless sharded, low bits of split weights; null: nothing."""
    sharding: Annotated[Literal["none", "full", "hybrid"], MAY_CHANGE] = "none"
    """Among which processes weights, gradients and optimizer state are split; full: all; hybrid: those of a machine."""
    learning_rate: float = Field(1.0e-6, gt=0)
    """The highest learning rate; adafactor scales it by the size of each matrix's weights."""
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "linear"
    """The course of the learning rate after the warm-up."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises to its highest value."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the matrices, decoupled from the gradient except in rmsprop; biases and norms have none."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients with a larger norm are scaled down to it; null: never."""
    on_nonfinite: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """Whether a loss or gradient that is NaN or infinite stops the run, or its step is skipped and counted."""
    max_skipped: Annotated[int, MAY_CHANGE] = Field(10, ge=1)
    """With skip, how many steps a run may skip; one more stops it."""
    gradient_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third slower."""
    deterministic: Annotated[bool, MAY_CHANGE] = True
    """On GPUs, use only kernels that give the same bytes every time, so that runs can be repeated; CPUs always do."""
    compile: Annotated[Literal["auto"] | bool, MAY_CHANGE] = "auto"
    """Whether decoder layers are compiled, which takes a minute or more; auto: in long runs on a GPU."""
    rank_timeout: Annotated[float | None, MAY_CHANGE] = Field(300, ge=1, le=31_536_000)
    """With several processes, seconds after which one that is silent, or hangs while others wait, fails; or null."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Decides the order of the pairs and which are held out."""


class EvaluationSettings(Settings):
    """When the held-out pairs are scored."""

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations; null: once, at the end."""
    best_by: Annotated[str, OneOf(*BEST_BY)] | None = None
    """The held-out figure by which `final/` is the best evaluated step, the earlier of equals; null: the last step."""
    patience: int | None = Field(None, ge=1)
    """Evaluations in a row without a better one than before, after which the run stops; null: it takes all steps."""
    samples: int = Field(4, ge=0)
    """Held-out prompts that are answered before step 1 and at each evaluation, into samples.jsonl; 0: none."""
    max_new_tokens: int = Field(128, ge=1)
    """The most tokens of such an answer; the model's context limits it as well."""


class CheckpointSettings(Settings):
    """What a run saves while it trains."""

    every_steps: int = Field(100, ge=1)
    """Optimizer steps between checkpoints."""
    at_end: bool = True
    """Whether the last step saves one, from which a finished run can be extended."""
    keep: int = Field(2, ge=1)
    """The number of newest checkpoints that are kept."""
    keep_best: int = Field(0, ge=0)
    """The number of best evaluated ones that are kept beside them; with `evaluation.best_by` the best one always is."""
    background: bool = False
    """Whether a copy in memory is written while training continues, instead of waiting for the disk."""


class LoggingSettings(Settings):
    """How much of the steps is printed; metrics.jsonl has all of them."""

    every_steps: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Steps between two lines; auto: about 200 lines per run, on a terminal 20; the last step always has one."""


class Config(Settings):
    """A run of dpo."""

    model: Annotated[ModelSettings, _short("model", str | ModelSettings)]
    """The model that is trained."""
    adapter: Annotated[Adapter | None, _typed(Lora().type), _short_type("adapter", Adapter, None)] = None
    """What is trained beside the model's own weights, which then stay as they are; null: all weights train."""
    data: DataSettings = DataSettings()
    """The preference pairs."""
    loss: Annotated[
        Annotated[OneLoss, Tag(ONE)] | Annotated[list[OneLoss], Tag(SEVERAL), Field(min_length=1)],
        Discriminator(lambda value: SEVERAL if isinstance(value, (list, tuple)) else ONE),
    ] = DPO()
    """The loss, or a list of losses that are added up by their weights."""
    reference: Annotated[Reference, _typed(Cached().type), _short_type("reference", Reference)] = Cached()
    """What the policy is held against; none, and only that, where no loss needs it."""
    training: TrainingSettings = TrainingSettings()
    """The optimizer's steps."""
    evaluation: Annotated[EvaluationSettings, MAY_CHANGE] = EvaluationSettings()
    """When the held-out pairs are scored."""
    checkpoints: Annotated[CheckpointSettings, MAY_CHANGE] = CheckpointSettings()
    """What a run saves while it trains."""
    logging: Annotated[LoggingSettings, MAY_CHANGE] = LoggingSettings()
    """How much of the steps is printed; metrics.jsonl has all of them."""
    tracking: Annotated[
        Annotated[OneTracker, Tag(ONE_TRACKER)] | Annotated[list[OneTracker], Tag(TRACKERS)],
        Discriminator(lambda value: TRACKERS if isinstance(value, (list, tuple)) else ONE_TRACKER),
        MAY_CHANGE,
    ] = Field(default_factory=list)
    """A tracker beside metrics.jsonl, or a list of trackers."""
    output_dir: Annotated[PathText, MAY_CHANGE] = Field("", json_schema_extra={"default": "runs/NAME"})
    """The run's folder; by default `runs/` and the name of the configuration file."""
    _places: Places = PrivateAttr(default_factory=Places)
    # Where the settings were made.

    def made_at(self, places: Places) -> Config:
        """Return the same with where its settings were made."""
        config = self.model_copy()
        config._places = places
        return config

    def where(self, *names: str) -> str:
        """Return where some settings were made that together are wrong, by their dotted names."""
        return self._places.of(*(name.split(".") for name in names)) or f"`{names[0]}`"

    def placed(self, named: str | None) -> str | None:
        """Add to the name of a setting, as in "`adapter.rank`", where that was made; leave any other text as it is."""
        group, _, last = (named or "").strip("`").rpartition(".")
        place = self._places.known.get((*filter(None, group.split(".")), last))
        if place is None and SHORT_FORMS.get(group) == last:
            place = self._places.known.get(tuple(group.split(".")))
        return f"{named}, {place}" if place else named

    @property
    def objective(self) -> Objective:
        """What the run minimises."""
        return Objective.of(self.loss)

    @property
    def trackers(self) -> list[Tracker]:
        """Where metrics go beside metrics.jsonl."""
        return self.tracking if isinstance(self.tracking, list) else [self.tracking]


def without_needless_reference(config: Config) -> Config:
    """Return the configuration with `reference: none` where none was named and no loss needs one."""
    if "reference" in config.model_fields_set or config.objective.needs_reference:
        return config
    return config.model_copy(update={"reference": NoReference()})


def changeable() -> frozenset[str]:
    """Return the settings that may be others when a run is resumed, by dotted name; a group covers all in it."""
    return frozenset(on_resume(Config))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def resolved_yaml(config: Config) -> str:
    """Write a configuration out with every default and override in it; it runs again as it is."""
    return plain_yaml.dump(config.model_dump(mode="json"))
