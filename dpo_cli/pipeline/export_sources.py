"""What is exported is opened: the policy in float32, its tokenizer, and what it is compared on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config import Config
from dpo_cli.config.export_sources import ForeignAdapter, TrainedAdapter, TrainedModel
from dpo_cli.config.exporting import Export
from dpo_cli.config.loading import load_config
from dpo_cli.errors import UserError
from dpo_cli.evaluation.samples import sampled_pairs
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.files import adapter_folder
from dpo_cli.modeling.adapters.settings import Saved
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders import tokenizers
from dpo_cli.modeling.folders.saving import end_at, remember_adapter
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.beginning import noted_in
from dpo_cli.pipeline.export_answers import ANSWERS
from dpo_cli.pipeline.export_facts import question_tokens
from dpo_cli.pipeline.export_proof import FEW, OnPairs, OnTokens, Proof
from dpo_cli.pipeline.memory import settling_scores
from dpo_cli.pipeline.models import loaded, open_reference, opened, trained_policy
from dpo_cli.pipeline.pairs import RunData, load_tokenizer, run_data
from dpo_cli.pipeline.session import Session
from dpo_cli.preference.reference import Cached, NoReference, OpenReference
from dpo_cli.reporting.tables import HELD_OUT
from dpo_cli.settings import located
from dpo_cli.training.checkpoints import beginning_of
from dpo_cli.training.checks import check_base
from dpo_cli.training.run_folder import RunFolder

_OTHER_PAIRS = "other pairs"
"""What the pairs are called of a run whose data is not what it was: any of them may have been trained on."""


@dataclass(frozen=True)
class _Scored:
    """The pairs of a run that are scored.

    Attributes:
        name: What they are called.
        indices: Their indices.
    """

    name: str
    indices: NDArray[np.int64]


def in_float32(config: Config) -> Config:
    """Return a configuration in float32, by a process alone, with a reference that is no second model.

    What is compared are weights, not the rounding of sums.
    """
    reference = config.reference
    if not isinstance(reference, NoReference):
        reference = Cached(model=reference.model)
    model = config.model.model_copy(update={"dtype": "float32", "weights": "auto"})
    training = config.training.model_copy(update={"sharding": "none", "offload": None})
    return config.model_copy(update={"model": model, "reference": reference, "training": training})


def alone(session: Session) -> Session:
    """Let go of the models that nobody has any more: two are never in memory at once. Accelerate would keep them."""
    session.accelerator.free_memory()
    return session


def open_source(session: Session, asked: Export) -> tuple[Policy, Any, Proof]:
    """Return what is exported, its tokenizer, and what it is compared on.

    Raises:
        UserError: It cannot be loaded, or does not fit its base or its pairs.
    """
    source = asked.source
    if isinstance(source, TrainedAdapter):
        return _trained_adapter(session, source)
    if isinstance(source, TrainedModel) and source.unscored is None:
        return _trained_model(session, source)
    if isinstance(source, TrainedModel):
        what = "the pairs of the run are not scored, but made-up tokens, since not all of its inputs are here"
        session.console.warning(f"{what}: {source.unscored}")
        name = str(source.folder)
    else:
        session.console.notice("no run is here: no pairs are scored, but made-up tokens")
        name = str(source.folder) if isinstance(source, ForeignAdapter) else source.config.model.name
    tokenizer = tokenizers.load_tokenizer(name, session.config.model.trust)
    policy = _beside_base(session, source) if isinstance(source, ForeignAdapter) else loaded(session, name)
    questions = question_tokens(tokenizer)
    if (largest := max(max(tokens, default=0) for tokens in questions)) >= policy.vocabulary:
        what = f"the tokenizer writes token {largest}, but the model's vocabulary ends at {policy.vocabulary - 1}"
        raise UserError(what, name, "use the tokenizer of this model")
    return policy, tokenizer, OnTokens(session, questions)


def check_finite(policy: Policy, where: str) -> None:
    """Refuse a model with weights that are no numbers: nothing could be proved of what it says.

    Raises:
        UserError: It has some.
    """
    if odd := policy.weights.first_not_finite():
        what = f"the weights of the model are not all numbers: `{odd}` has some that are NaN or infinite"
        raise UserError(what, where, "export an earlier checkpoint, or save or download the model again")


def _beside_base(session: Session, source: ForeignAdapter) -> Policy:
    """Return the base of an adapter with that beside it."""
    base = session.config.model.name
    trained = Adapted(Saved(start=str(source.folder)), base=base)
    policy = Policy.load(base, session.config.model.trust, session.accelerator.device, trained, session.held)
    remember_adapter(policy.model, adapter_folder(source.folder))
    for line in check_base(policy, adapter_folder(source.folder), base, str(source.folder)):
        session.console.notice(line)
    return policy


def _trained_model(session: Session, source: TrainedModel) -> tuple[Policy, Any, Proof]:
    """Open a model that a run has trained, which is loaded after its reference is gone again."""
    _, data, pairs = _pairs(session, source)
    name = session.config.reference.model
    reference = NoReference().open()
    if not isinstance(session.config.reference, NoReference):
        reference = _reference_apart(session, source, data, pairs.indices, name)
    folder = str(source.folder)
    settle = settling_scores(session, data.pairs)
    (policy,), batches = opened(session, {folder: folder}, data.pairs, pairs.indices, settle)
    tokenizer = tokenizers.load_tokenizer(folder, session.config.model.trust)
    return policy, tokenizer, _on_pairs(session, batches, reference, data, pairs)


def _trained_adapter(session: Session, source: TrainedAdapter) -> tuple[Policy, Any, Proof]:
    """Open an adapter that a run has trained; the reference is asked before its base moves."""
    tokenizer, data, pairs = _pairs(session, source)
    name, reference = session.config.reference.model, NoReference().open()
    if name is not None:
        reference = _reference_apart(session, source, data, pairs.indices, name)
    settle = settling_scores(session, data.pairs)
    (policy,), batches = opened(session, {"`model.name`": trained_policy(session)}, data.pairs, pairs.indices, settle)
    _check_base(policy, source)
    if name is None and not isinstance(session.config.reference, NoReference):
        reference = open_reference(session, policy, batches, pairs.indices)
    give_adapter(policy, source, tokenizer)
    return policy, tokenizer, _on_pairs(session, batches, reference, data, pairs)


def _pairs(session: Session, source: TrainedModel | TrainedAdapter) -> tuple[Any, RunData, _Scored]:
    """Return the tokenizer of a run, its pairs, and which of them are scored."""
    tokenizer, tokenize = load_tokenizer(session.config, session.console, source.run.first_day())
    data = run_data(session.config, tokenize, session.console)
    if _is_other(data, session.config, source.run):
        session.console.warning(
            "the data is not what it was when the run began, so pairs that are held out now may have been trained on; "
            f"they are called `{_OTHER_PAIRS}`"
        )
        return tokenizer, data, _Scored(_OTHER_PAIRS, data.held_out if len(data.held_out) else _some(data))
    if len(data.held_out):
        return tokenizer, data, _Scored(HELD_OUT, data.held_out)
    scored = _Scored("training pairs", _some(data))
    session.console.notice(f"no pairs are held out: {len(scored.indices)} of the training pairs are scored")
    return tokenizer, data, scored


def _some(data: RunData) -> NDArray[np.int64]:
    """Return some of the training pairs."""
    return data.train[:FEW]


def _is_other(data: RunData, config: Config, run: RunFolder) -> bool:
    """Tell whether data of the same name is not what a run began with, as far as that is known."""
    noted, trained = noted_in(run).get("data"), load_config(run.config)
    # Digests contain the name.
    is_there = (config.data, config.model.chat_template) == (trained.data, trained.model.chat_template)
    return is_there and noted is not None and noted != data.fingerprint


def _reference_apart(
    session: Session,
    source: TrainedModel | TrainedAdapter,
    data: RunData,
    indices: NDArray[np.int64],
    name: str | None,
) -> OpenReference:
    """Ask a reference that is not in memory afterwards: a model of its own, or what the run began with."""
    where, model = ("`model.name`", trained_policy(session)) if name is None else ("`reference.model`", name)
    settle = settling_scores(session, data.pairs)
    (policy,), batches = opened(session, {where: model}, data.pairs, indices, settle)
    if name is None:
        _check_base(policy, source)
    reference = open_reference(session, policy, batches, indices)
    del policy, model
    alone(session)
    return reference


def _on_pairs(session: Session, batches: Batches, reference: OpenReference, data: RunData, pairs: _Scored) -> OnPairs:
    """Return what is compared on pairs of a run."""
    prompts = [data.pairs[index].prompt.tolist() for index in sampled_pairs(data.pairs, pairs.indices, ANSWERS)]
    return OnPairs(session, batches, reference, pairs.indices, pairs.name, prompts)


def give_adapter(policy: Policy, source: TrainedAdapter | ForeignAdapter, tokenizer: Any) -> None:
    """Let a policy that is as it was before step 1 be what a run has trained."""
    policy.weights.restore(source.folder)
    remember_adapter(policy.model, source.folder)
    if source.config.model.eos_token is not None:
        end_at(policy.model, tokenizer.eos_token_id)


def _check_base(policy: Policy, source: TrainedModel | TrainedAdapter) -> None:
    """Refuse a base that is not the one that a run began with.

    Raises:
        UserError: It is another.
    """
    if (known := beginning_of(source.folder)) and (other := policy.weights.began_with(known)):
        adapter = source.config.adapter
        start = adapter.start if adapter else None
        setting, name = ("model.name", source.config.model.name) if other == "model" else ("adapter.start", start)
        named = f"the {'base' if other == 'model' else other}{f' {located(name)}' if name else ''}"
        what = "the adapter was trained on" if adapter else "the run began with"
        hint = f"restore it, or name it where it is now, as in `{setting}=PATH`"
        raise UserError(f"{named} is not the one that {what}", f"`{setting}`", hint)


def unquantized(session: Session) -> Session:
    """Return the session with the base as it is in its files."""
    config = session.config
    return session.under(config.model_copy(update={"model": config.model.model_copy(update={"quantize": None})}))
