"""What a model card is written from: the run's configuration, what it noted when it began, and what it measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_cli.config import Config
from dpo_cli.data.pairs.sources import Source, as_sources, describe
from dpo_cli.data.rows.files import reader_of
from dpo_cli.data.tokens.chat_template import named_templates
from dpo_cli.evaluation.best import best_step
from dpo_cli.evaluation.comparison import compare
from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.evaluation.statistics import Estimate
from dpo_cli.modeling.folders.provenance import Provenance, provenance_of
from dpo_cli.modeling.folders.resolving import load_named
from dpo_cli.reporting.card import Card
from dpo_cli.reporting.environment import versions
from dpo_cli.reporting.row_log import rows_in
from dpo_cli.settings import PUBLISHED
from dpo_cli.system.hub import is_hub_id, public_name
from dpo_cli.training.run_folder import PLAN, RunFolder, step_of

_OF_PLAN = ("parameters", "pairs", "optimizer", "learning rate")
"""What a card has of what a run said when it began."""


def card_of_run(config: Config, run: RunFolder, facts: Mapping[str, Any], tokenizer: Any, **others: Any) -> Card:
    """Gather what is known of a model that a run has trained.

    Args:
        config: What it did.
        run: Its folder.
        facts: What else is known of the model.
        tokenizer: The model's.
        others: Other attributes of the card.
    """
    sources = as_sources(config.data.train) if config.data.train is not None else []
    templates, asked = named_templates(tokenizer), config.model.chat_template
    found = {
        **_noted(run),
        "data": describe(source.model_copy(update={"path": public_name(source.path)}) for source in sources),
        "loss": str(config.objective),
        **facts,
        "versions": shown_versions(),
    }
    return Card(
        run.path.resolve().name,
        settings=config.model_dump(mode="json", context=PUBLISHED),
        base=config.model.name,
        facts=found,
        datasets=list(dict.fromkeys(source.path for source in sources if _on_hub(source))),
        chats=bool(templates),
        template=asked if asked in templates and len(templates) > 1 else "",
        **others,
    )


def provenance_of_run(config: Config, run: RunFolder, *, complete: bool) -> Provenance:
    """Return where the base of a run comes from: as that tells itself, or else as the card of the trained model does.

    Args:
        config: What the run did.
        run: Its folder.
        complete: Whether the base is still there.
    """
    if complete:
        name, trust = config.model.name, config.model.trust
        found = load_named(name, "model", lambda folder: provenance_of(Path(folder)), trust)
        if found != Provenance():
            return found
    return provenance_of(run.final)


def digest_of_base(fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Return the digest of the weights of a run's base, as a fact, where it is known."""
    return {"digest of the base": fingerprints["model"][:24]} if "model" in fingerprints else {}


def shown_versions() -> str:
    """Name the versions of Python and of the packages that affect results."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def measured(run: RunFolder, step: int | None) -> dict[str, dict[str, Any]]:
    """Return a run's own held-out figures before step 1 and after a step, where it measured both."""
    rows = {row["step"]: row for row in rows_in(run.metrics) if row.get("split") == "eval"}
    if step is None or step not in rows:
        return {}
    columns = {"before": rows.get(0, {}), "after": rows[step]}
    return {name: row for name, row in columns.items() if row and all(map(_can_be_shown, _values(row)))}


def changes_of(run: RunFolder, step: int | None) -> dict[str, Estimate]:
    """Return how the held-out figures after a step differ from those before step 1; nothing where a run lacks either.

    Pairs are compared one by one, so that an interval says how sure the difference is.
    """
    rows = rows_in(run.held_out) if step else []
    before, after = ([row for row in rows if row.get("step") == when] for when in (0, step))
    found = compare(before, after)
    return dict(found.differences) if found else {}


def step_of_model(config: Config, run: RunFolder, folder: Path) -> int | None:
    """Return the step after which a model of a run was saved; None: no evaluation tells it."""
    if folder.name.startswith("step-"):
        return step_of(folder)
    rows = [row for row in rows_in(run.metrics) if row.get("split") == "eval" and row["step"]]
    if by := config.evaluation.best_by:
        return best_step(rows, by)
    return max((row["step"] for row in rows), default=None)


def _values(row: Mapping[str, Any]) -> list[Any]:
    return [row[figure.key] for figure in FIGURES if figure.key in row]


def _can_be_shown(value: Any) -> bool:
    """Tell whether a value is a number or an interval, as a file that nobody has edited has them."""
    values = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(one) in (int, float) for one in values)


def _noted(run: RunFolder) -> dict[str, str]:
    """Return what a run said of itself when it began, where that is still there."""
    try:
        plan = json.loads(run.environment.read_bytes())[PLAN]
        return {name: str(plan[name]) for name in _OF_PLAN if name in plan}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _on_hub(source: Source) -> bool:
    """Tell whether a source is a data set on the Hub: a file that is gone may look like one."""
    return is_hub_id(source.path) and reader_of(Path(source.path)) is None
