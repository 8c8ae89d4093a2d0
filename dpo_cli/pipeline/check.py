"""The check of a run's data, as `dpo prepare-data` and `dpo train --dry-run` show it, and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config import Config
from dpo_cli.data.checkup.endings import end_tokens
from dpo_cli.data.checkup.examination import examine
from dpo_cli.data.checkup.report import Report
from dpo_cli.data.pairs.sources import as_sources
from dpo_cli.data.prepared.folder import PreparedPairs, default_folder, is_prepared
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.loading import generation_config
from dpo_cli.pipeline.setup import RunData, shown_counts
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.data_check import findings
from dpo_cli.reporting.pages.data import data_page
from dpo_cli.reporting.safe_text import as_json
from dpo_cli.reporting.tables import MarkedPair
from dpo_cli.system.storage import write_text

JSON, PAGE = "report.json", "report.html"


def check(config: Config, data: RunData, tokenizer: Any) -> Report:
    """Examine the data of a run."""
    return examine(
        data.pairs,
        data.train,
        data.held_out,
        max_length=config.data.max_length,
        read=data.read,
        left_out=data.left_out,
        uses_margins=config.objective.uses_margins,
        tokenizer=tokenizer,
        ends=end_tokens(tokenizer, generation_config(config.model.name, config.model.trust)),
    )


def show_check(report: Report, console: Console) -> None:
    """Print what was found."""
    console.block()
    console.result(findings(report))


def write_check(report: Report, pairs: Sequence[MarkedPair], folder: Path) -> None:
    """Write the report as JSON and as a page, which also shows some pairs token by token.

    Raises:
        UserError: The folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / JSON, as_json(report.as_json()))
        write_text(folder / PAGE, data_page(report, pairs))
    except OSError as error:
        raise from_os_error(error, "writing the report", str(folder)) from error


def default_report_folder(config: Config, pairs: PreparedPairs, out: Path | None) -> Path:
    """Return the folder beside the prepared training pairs in which their report is kept."""
    first = as_sources(config.data.train)[0].path
    prepared = Path(first) if is_prepared(first) else out or default_folder(pairs.manifest["fingerprint"])
    prepared = prepared.resolve()
    return prepared.with_name(f"{prepared.name}.report")


def refuse_grave(report: Report, where: str) -> None:
    """Let a check fail under `--strict`.

    Raises:
        UserError: There are warnings, or worse.
    """
    if report.grave:
        named = shown_counts({finding.name: finding.count for finding in report.grave})
        hint = "fix the data, list the findings to leave out in `data.drop`, or check without --strict"
        raise UserError(f"the data has findings that --strict does not let pass: {named}", where, hint)
