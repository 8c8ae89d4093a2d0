"""`dpo eval`: score held-out pairs with a model or several, against the reference that the run had."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config import Config
from dpo_cli.data.checkup.selection import without_copies
from dpo_cli.data.pairs.sources import as_sources, describe
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import LABELS
from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.details import figures_and_details
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.evaluation.evaluate import evaluate as score
from dpo_cli.evaluation.figures import figures_by
from dpo_cli.evaluation.held_out import held_out_rows
from dpo_cli.modeling.adapters.files import base_of, holds_adapter
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders.model_names import same_model, whole_model
from dpo_cli.modeling.folders.saving import end_at
from dpo_cli.modeling.folders.tokenizers import check_same_tokens
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import BatchScorer
from dpo_cli.pipeline.alike import check_job, check_pairs, named_models
from dpo_cli.pipeline.beginning import Beginning, noted_by
from dpo_cli.pipeline.comparing import Measured, as_json, compared, letters
from dpo_cli.pipeline.memory import settling_scores
from dpo_cli.pipeline.models import known_reference, open_reference, opened, reference_sketch, scored_and_reference
from dpo_cli.pipeline.pairs import load_tokenizer, named_pairs, num_trained_on, prepared_pairs, run_data
from dpo_cli.pipeline.plan import described_loss
from dpo_cli.pipeline.session import Session, started
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import NoReference, OpenReference
from dpo_cli.reporting.console import STANDARD_OUTPUT, Console
from dpo_cli.reporting.detail_tables import GROUP_CELLS, detail_blocks
from dpo_cli.reporting.json_file import write_json
from dpo_cli.reporting.tables import HELD_OUT, figures_table, groups_table
from dpo_cli.system.launchers import is_main_process
from dpo_cli.system.text import several
from dpo_cli.training.checks import check_columns, check_fits
from dpo_cli.training.run_folder import RunFolder


def evaluate(
    config: Config, console: Console, *, models: Sequence[str], data: str | None, json_file: Path | None
) -> dict[str, Any]:
    """Score models on held-out pairs, print the figures and return them.

    Args:
        config: The run's configuration; it names the reference, the loss and the held-out pairs.
        console: Where the tables go.
        models: What to score, each a folder, a .gguf file or a Hub id; of several, the others are compared with the
            first.
        data: Pairs to score, all of them; None: what the configuration holds out.
        json_file: Where to write the figures; `-`: standard output, in place of the tables; or None.

    Raises:
        UserError: Something is wrong that the user can fix.
    """
    with started(config, console) as session:
        named = {f"--model {number}": model for number, model in enumerate(models, 1)}
        check_job(session, {"--model": list(models), "--data": data}, {**named, **named_models(config)})
        asked = _asked(session, models, data)
        measured = [_measure(session, asked, model) for model in models]
    comparisons = compared(measured)
    found = as_json(measured, comparisons)
    if json_file == STANDARD_OUTPUT:
        console.result(json.dumps(found, indent=1))
        return found
    _show(config, [one.figures for one in measured], console)
    for comparison in comparisons:
        comparison.show(console)
    if json_file and is_main_process():
        write_json(json_file, found, "writing the figures")
        console.notice(f"figures written: {json_file}")
    return found


@dataclass(frozen=True)
class _Asked:
    """What is scored, whichever model does it.

    Attributes:
        pairs: All pairs.
        held_out: Indices of those that are scored.
        end: The token that ends a response.
        about: What the figures of every model say of the pairs.
    """

    pairs: PreparedPairs
    held_out: NDArray[np.int64]
    end: int
    about: dict[str, Any]


def _asked(session: Session, models: Sequence[str], data: str | None) -> _Asked:
    """Prepare or find the pairs, and check that the models read the same tokens."""
    config = session.config
    with session.accelerator.main_process_first():
        # Where there is a run, its prompts are as they were on its first day.
        day = RunFolder(Path(config.output_dir)).first_day()
        tokenizer, tokenize = load_tokenizer(config, session.console, day)
        for model in models:
            check_same_tokens(tokenizer, whole_model(model), "the model that is scored", config.model.trust)
        pairs, held_out, source = _held_out(config, data, tokenize, session.console)
        trained_on = {"trained_on": num_trained_on(config, pairs, held_out, tokenize)} if data is not None else {}
    read = hashlib.sha256(pairs.key_numbers("key")[held_out].tobytes()).hexdigest()
    check_pairs(session, read, "`data`" if data is None else "--data")
    check_columns(pairs, config.objective)
    return _Asked(pairs, held_out, tokenizer.eos_token_id, {"data": source, **trained_on})


def _measure(session: Session, asked: _Asked, model: str) -> Measured:
    """Score the pairs with model and reference, and sum up."""
    config, pairs = session.config, asked.pairs
    policy, reference, batches = _open_both(session, model, pairs, asked.held_out, asked.end)
    policy.place(session.accelerator, trained=False, collisions=config.objective.wpo)
    results = scored(session, policy.scorer, reference, batches, asked.held_out, model)
    base = base_of(model) if holds_adapter(model) else None
    told = figures_and_details(results, config.objective)
    told["baselines"] |= _unscored_base(config, model)
    found = {
        **told,
        **_by_label(results, pairs, config.objective),
        "model": model,
        **({"base": base} if base else {}),
        **({"quantize": config.model.quantize} if base and config.model.quantize else {}),
        "reference": _named_reference(config),
        **asked.about,
        "objective": config.model_dump(mode="json")["loss"],
    }
    return Measured(found, held_out_rows(0, results, pairs))


def _open_both(
    session: Session, model: str, pairs: PreparedPairs, held_out: NDArray[np.int64], end: int
) -> tuple[Policy, OpenReference, Batches]:
    """Open the model that is scored and the reference that the run began with; both at once only if it has to be.

    An adapter beside the reference's own weights takes little more than these.

    Args:
        session: Says which reference.
        model: The model that is scored.
        pairs: All pairs.
        held_out: Indices of those that are scored.
        end: The token that ends a response.
    """
    config, settle = session.config, settling_scores(session, pairs)
    if isinstance(config.reference, NoReference):
        (policy,), batches = opened(session, {model: model}, pairs, held_out, settle)
        return policy, config.reference.open(), batches
    sketch = Policy.empty(config.model.name, config.model.trust, held=session.held)
    check_fits(pairs, sketch, "`model.name`")
    other, begun = reference_sketch(session, sketch), Beginning(config, session.agreed(noted_by(config)))
    if known := known_reference(session, other, model, pairs, held_out, begun.is_identity):
        session.console.notice("the cache has all answers of the reference: its weights are not read")
        (policy,), batches = opened(session, {model: model}, pairs, held_out, settle)
        return policy, known, batches
    where = "`reference.model`" if config.reference.model else "`model.name`"
    asked, other = scored_and_reference(session, model)
    _warn_of_change(session, begun, asked, other, end)
    if config.reference.holds_model or isinstance(asked, Policy):
        (policy, other), batches = opened(session, {model: asked, where: other}, pairs, held_out, settle)
        return policy, open_reference(session, other, batches, held_out), batches
    (other,), batches = opened(session, {where: other}, pairs, held_out, settle)
    reference = open_reference(session, other, batches, held_out)
    del other
    (policy,), batches = opened(session, {model: model}, pairs, held_out, settle)
    return policy, reference, batches


def _warn_of_change(session: Session, begun: Beginning, asked: str | Policy, reference: Policy, end: int) -> None:
    """Say so where the reference that was loaded is not the one that the run began with."""
    config = session.config
    # A run of all weights notes its model with that token. An adapter is compared with its base as that came.
    if config.model.eos_token is not None and config.adapter is None and not config.reference.model:
        if isinstance(asked, Policy):
            return
        end_at(reference.model, end)
    if changed := begun.change(reference, session.precision.name):
        session.console.warning(changed)


def scored(
    session: Session,
    scorer: BatchScorer,
    reference: BatchScorer,
    batches: Batches,
    held_out: NDArray[np.int64],
    where: str,
    what: str = "evaluating",
) -> list[PairResult]:
    """Score held-out pairs, in a run or after it.

    Args:
        session: Says by which objective.
        scorer: The policy's.
        reference: The reference's.
        batches: How pairs go through the models without gradient.
        held_out: The pairs' indices.
        where: Which model is scored.
        what: What is shown while it lasts.

    Raises:
        UserError: A pair's loss is NaN or infinite; it is named by file and line.
    """
    with session.console.progress(what, len(held_out)) as progress, session.during("while held-out pairs were scored"):
        results = score(
            scorer, session.config.objective, reference, held_out.tolist(), batches, session.accelerator, progress
        )
    broken = [result.index for result in results if not math.isfinite(result.metrics["loss"])]
    if broken:
        what = f"the held-out loss is not finite; its pairs: {named_pairs(batches.pairs, broken)}"
        hint = "the weights are damaged, or `training.learning_rate` was too high; the last checkpoint is intact"
        raise UserError(what, where, hint, status=FAILED)
    return results


def _named_reference(config: Config) -> str | None:
    """Say what is the reference; None: there is none."""
    if config.reference.type == "none":
        return None
    start = config.adapter.start if config.adapter and not config.reference.model else None
    return f"{config.model.name} with {start}" if start else config.reference.model or config.model.name


def _unscored_base(config: Config, model: str) -> dict[str, Any]:
    """Say how to get the figures of the model that training began with, if it is neither scored nor the reference."""
    base, reference = config.model.name, _named_reference(config)
    if same_model(base, model) or (reference and same_model(base, reference)):
        return {}
    return {"base": {"missing": f"`--model {shlex.quote(base)}` scores it"}}


def _show(config: Config, found: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what was measured, and the figures of all pairs; of one model also those of groups of them."""
    first, chosen = found[0], "trained_on" in found[0]
    names = (
        {one["model"]: one for one in found} if len(found) == 1 else dict(zip(letters(len(found)), found, strict=True))
    )
    measured = {
        **({name: _named(one) for name, one in names.items()} if len(found) > 1 else {}),
        "loss": described_loss(config),
        **({"base": _base(first)} if len(found) == 1 and "base" in first else {}),
        "reference": first["reference"] or "none (not needed)",
        "pairs of": first["data"],
        **({"trained on": _trained_on(first)} if chosen else {}),
    }
    console.block()
    width = max(map(len, measured))
    for name, value in measured.items():
        console.result(f"{name:<{width}}  {value}")
    console.result("")
    console.result(figures_table(names, "scored pairs" if chosen else HELD_OUT))
    if len(found) > 1:
        # The details of each are in the JSON: beside each other they would be pages.
        return
    for block in detail_blocks(first):
        console.result("")
        console.result(block)
    for label in LABELS:
        if groups := first.get(f"by_{label}"):
            for table in (groups_table(label, groups), groups_table(label, groups, GROUP_CELLS)):
                console.result("")
                console.result(table)


def _named(found: Mapping[str, Any]) -> str:
    """Name a model, and of an adapter the base."""
    return f"{found['model']} on {_base(found)}" if "base" in found else str(found["model"])


def _base(found: Mapping[str, Any]) -> str:
    """Name the base of an adapter, and the bits that it was held in, if few."""
    return f"{found['base']} ({found['quantize']})" if "quantize" in found else str(found["base"])


def _trained_on(found: Mapping[str, Any]) -> str:
    """Say how many of the pairs that were chosen are training pairs of the configuration, which it may not be."""
    if (number := found["trained_on"]) is None:
        return "not known: the training pairs of the configuration are not prepared"
    return f"{number:,} of the {several(found['pairs'], 'pair')}, by their tokens"


def _held_out(config: Config, data: str | None, tokenize: Any, console: Console) -> tuple[Any, Any, str]:
    """Return pairs, the indices to score, and what they are called."""
    if data is not None:
        pairs = prepared_pairs(config, as_sources(data), tokenize, console)
        return pairs, without_copies(pairs, np.arange(len(pairs))), data
    split = run_data(config, tokenize, console)
    held_out = config.data.eval
    if isinstance(held_out, float):
        name = f"{held_out:g} of {describe(as_sources(config.data.train))}"
    else:
        name = describe(as_sources(held_out))
    return split.pairs, split.held_out, name


def _by_label(results: Sequence[PairResult], pairs: PreparedPairs, objective: Objective) -> dict[str, Any]:
    """Return figures and details of each source and of each category, where the data names several."""
    told = functools.partial(figures_and_details, objective=objective)
    found = {
        f"by_{name}": figures_by(results, [pairs.label(name, result.index) for result in results], told)
        for name in LABELS
    }
    return {name: groups for name, groups in found.items() if groups}
