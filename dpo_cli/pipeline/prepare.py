"""`dpo prepare-data`: read, check and tokenize the pairs, and show and write down what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config import Config
from dpo_cli.config.inputs import held_out_sources
from dpo_cli.data.checkup.endings import end_tokens
from dpo_cli.data.checkup.examine import examine
from dpo_cli.data.checkup.report import Report
from dpo_cli.data.pairs.sources import as_sources
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import Gaps
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.folders.tokenizers import generation_config
from dpo_cli.pipeline.pairs import RunData, load_tokenizer, prepared_pairs, report_folder, shown_counts, split
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.data_check import PathLine, Wrapped, findings, screen
from dpo_cli.reporting.pages.data import data_page
from dpo_cli.reporting.run_record import DATA_CHECK_FILE
from dpo_cli.reporting.safe_text import as_json
from dpo_cli.reporting.tables import MarkedPair, marked_pair
from dpo_cli.system.storage import write_text

JSON, PAGE = DATA_CHECK_FILE, "report.html"


def prepare(
    config: Config, console: Console, *, out: Path | None, report: Path | None, strict: bool, show: int
) -> Report:
    """Prepare the training pairs and, where they have a source of their own, the held-out pairs; check them all.

    Args:
        config: What to prepare, and how it is split.
        console: Where the tables go.
        out: Where to keep the training pairs, or None for the cache.
        report: Where to keep the report, or None for a folder beside the training pairs.
        strict: Whether warnings are errors, after everything was printed and written.
        show: How many pairs to print token by token.

    Raises:
        UserError: Something is wrong that the user can fix.
    """
    tokenizer, tokenize = load_tokenizer(config, console)
    pairs = prepared_pairs(config, as_sources(config.data.train), tokenize, console, out)
    sources = held_out_sources(config)
    others = prepared_pairs(config, sources, tokenize, console) if sources else None
    found = check(config, split(config, pairs, others), tokenizer)
    marked = _marked(pairs, tokenizer, show)
    for pair in marked:
        console.block()
        console.result(Wrapped(marked_pair(pair, colour=console.has_colour)))
    folder = report or report_folder(config, pairs, out)
    _write(found, marked, folder)
    console.block()
    console.result(screen(found))
    console.block()
    console.result(PathLine("report", folder / PAGE))
    if strict and found.grave:
        named = shown_counts({finding.name: finding.count for finding in found.grave})
        hint = "fix the data, list the findings to leave out in `data.drop`, or check without --strict"
        raise UserError(f"the data has findings that --strict does not accept: {named}", str(folder), hint)
    return found


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


def _marked(pairs: PreparedPairs, tokenizer: Any, count: int) -> list[MarkedPair]:
    """Return the first pairs token by token, special tokens visible."""
    return [
        MarkedPair(
            pair.origin,
            {
                name: [tokenizer.decode([token]) for token in getattr(pair, name).tolist()]
                for name in ("prompt", "chosen", "rejected")
            },
            {
                name: _positions(gaps)
                for name, gaps in (("chosen", pair.chosen_gaps), ("rejected", pair.rejected_gaps))
                if gaps is not None
            },
        )
        for pair in pairs[: min(count, len(pairs))]
    ]


def _positions(gaps: Gaps) -> set[int]:
    """Return every position within some gaps."""
    return {position for start, stop in gaps.reshape(-1, 2).tolist() for position in range(start, stop)}


def _write(report: Report, pairs: Sequence[MarkedPair], folder: Path) -> None:
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
