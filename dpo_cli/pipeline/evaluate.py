"""`dpo eval`: score held-out pairs with a model, against the reference that the run had."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from dpo_cli.config import Config
from dpo_cli.data.checkup.comparison import without_copies
from dpo_cli.data.pairs.sources import as_sources, describe
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import LABELS
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.evaluation.evaluate import evaluate as score
from dpo_cli.evaluation.figures import figures_by
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.loading import check_same_tokens, load_policy
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.pipeline import setup
from dpo_cli.pipeline.passes import choose_layout, prove_logps, wanted_tokens, without_gradient
from dpo_cli.pipeline.plan import described_loss
from dpo_cli.preference.reference import NoReference, OpenReference
from dpo_cli.preference.reference_work import ReferenceWork, reference_model
from dpo_cli.reporting.console import STANDARD_OUTPUT, Console
from dpo_cli.reporting.tables import figures_table, groups_table
from dpo_cli.system.storage import write_text
from dpo_cli.training.checks import check_columns, check_fits
from dpo_cli.training.ranks import watched
from dpo_cli.training.run_folder import RunFolder


def evaluate(
    config: Config, console: Console, *, model: str, data: str | None, json_file: Path | None
) -> dict[str, Any]:
    """Score a model on held-out pairs, print the figures and return them.

    Args:
        config: The run's configuration; it names the reference, the loss and the held-out pairs.
        console: Where the table goes.
        model: What to score: a folder, a .gguf file or a Hub id.
        data: Pairs to score, all of them; None: what the configuration holds out.
        json_file: Where to write the figures; `-`: standard output, in place of the table; or None.

    Raises:
        UserError: Something is wrong that the user can fix.
    """
    accelerator = setup.start_accelerator(config)
    with watched(accelerator, config.training.rank_timeout, Console().error):
        return _score(config, console, accelerator, model, data, json_file)


def _score(
    config: Config, console: Console, accelerator: Accelerator, scored: str, data: str | None, json_file: Path | None
) -> dict[str, Any]:
    """Score what was named, and show and write what was found."""
    with accelerator.main_process_first():
        # Where there is a run, its prompts are as they were on its first day.
        day = RunFolder(Path(config.output_dir)).first_day()
        tokenizer, tokenize = setup.load_tokenizer(config, config.model.name, day)
        setup.tell_day(tokenize, console)
        check_same_tokens(tokenizer, scored, "the model that is scored", config.model.trust)
        pairs, held_out, source = _held_out(config, data, tokenize, console)
    check_columns(pairs, config.objective)
    reference, asked = _open_reference(config, pairs, held_out, accelerator, console)
    policy = load_policy(scored, config.model.trust).to(accelerator.device)
    check_fits(pairs, policy, scored)
    layout = choose_layout(config, [policy], pairs, held_out, accelerator, console, trained=False)
    if asked is not None and layout is not asked:
        hint = "set `training.layout=padded`, which both can read"
        raise UserError("only one of the model and its frozen reference can be packed", scored, hint)
    batches = without_gradient(Batches(pairs, layout, wanted_tokens(config, accelerator), accelerator.device))
    prove_logps(policy, batches, held_out, accelerator)
    scorer = Scorer(policy, collisions=config.objective.wpo)
    scorer = accelerator.prepare_model(scorer, evaluation_mode=True)
    with console.progress("evaluating", len(held_out)) as progress:
        results = score(scorer, config.objective, reference, held_out.tolist(), batches, accelerator, progress)
    found: dict[str, Any] = {
        **setup.finite_figures(results, pairs, scored),
        **_by_label(results, pairs),
        "model": scored,
        "reference": None if config.reference.type == "none" else config.reference.model or config.model.name,
        "data": source,
        "objective": config.model_dump(mode="json")["loss"],
    }
    if json_file == STANDARD_OUTPUT:
        console.result(json.dumps(found, indent=1))
        return found
    _show(config, found, console)
    if json_file and accelerator.is_main_process:
        _write(json_file, found)
        console.notice(f"figures written: {json_file}")
    return found


def _show(config: Config, found: dict[str, Any], console: Console) -> None:
    """Print what was measured, and the figures of all pairs and of groups of them."""
    measured = {
        "loss": described_loss(config),
        "reference": found["reference"] or "none, and none is needed",
        "pairs of": found["data"],
    }
    console.block()
    for name, value in measured.items():
        console.result(f"{name:<9}  {value}")
    console.result("")
    console.result(figures_table({found["model"]: found}))
    for label in LABELS:
        if groups := found.get(f"by_{label}"):
            console.result("")
            console.result(groups_table(label, groups))


def _open_reference(
    config: Config, pairs: PreparedPairs, held_out: NDArray[np.int64], accelerator: Accelerator, console: Console
) -> tuple[OpenReference, Layout | None]:
    """Open the reference that the run began with; return it, and the layout of a model that is asked batch by batch."""
    if isinstance(config.reference, NoReference):
        return config.reference.open(), None
    base = load_policy(config.model.name, config.model.trust).to(accelerator.device)
    check_fits(pairs, base, "`model.name`")
    if config.reference.model is not None:
        base = reference_model(config.reference.model, base, config.model.trust)
        check_fits(pairs, base, "`reference.model`")
    layout = choose_layout(config, [base], pairs, held_out, accelerator, console, trained=False)
    batches = without_gradient(Batches(pairs, layout, wanted_tokens(config, accelerator), accelerator.device))
    prove_logps(base, batches, held_out, accelerator)
    num_asked = config.reference.num_asked(len(held_out), 0)
    with console.progress("reference log-probabilities", num_asked) as progress:
        work = ReferenceWork(base, None, accelerator, held_out, batches, progress)
        return config.reference.open(work), layout if config.reference.holds_model else None


def _held_out(config: Config, data: str | None, tokenize: Any, console: Console) -> tuple[Any, Any, str]:
    """Return pairs, the indices to score, and what they are called."""
    if data is not None:
        pairs = setup.prepared_pairs(config, as_sources(data), tokenize, console)
        return pairs, without_copies(pairs, np.arange(len(pairs))), data
    split = setup.run_data(config, tokenize, console)
    held_out = config.data.eval
    if isinstance(held_out, float):
        name = f"{held_out:g} of {describe(as_sources(config.data.train))}"
    else:
        name = describe(as_sources(held_out))
    return split.pairs, split.held_out, name


def _by_label(results: Sequence[PairResult], pairs: PreparedPairs) -> dict[str, Any]:
    """Return the figures of the pairs of each source and of each category, where the data tells several."""
    found = {
        f"by_{name}": figures_by(results, [pairs.label(name, result.index) for result in results]) for name in LABELS
    }
    return {name: groups for name, groups in found.items() if groups}


def _write(file: Path, found: dict[str, Any]) -> None:

    text = json.dumps(found, indent=1) + "\n"
    try:
        if file.exists() and not file.is_file():
            # A pipe or a device is written into; a rename would put a file in its place.
            file.write_text(text, encoding="utf-8")
        else:
            write_text(file.resolve(), text)
    except OSError as error:
        raise from_os_error(error, "writing the figures", str(file)) from error
