"""`dpo prepare-data`: read, check and tokenize the pairs, and show and write down what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_cli.config import Config
from dpo_cli.config.inputs import held_out_sources
from dpo_cli.data.checkup.report import Report
from dpo_cli.data.pairs.sources import as_sources
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import Gaps
from dpo_cli.pipeline.check import (
    PAGE,
    check,
    default_report_folder,
    refuse_grave,
    show_check,
    write_check,
)
from dpo_cli.pipeline.setup import (
    load_tokenizer,
    prepared_pairs,
    split,
    tell_day,
)
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.data_check import PathLine, Wrapped, reading
from dpo_cli.reporting.tables import MarkedPair, marked_pair


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
    tokenizer, tokenize = load_tokenizer(config, config.model.name)
    tell_day(tokenize, console)
    assert config.data.train is not None
    pairs = prepared_pairs(config, as_sources(config.data.train), tokenize, console, out)
    console.block()
    console.result(reading("data.train", pairs.manifest["statistics"]))
    marked = _marked(pairs, tokenizer, show)
    for pair in marked:
        console.block()
        console.result(Wrapped(marked_pair(pair, colour=console.has_colour)))
    others = None
    if sources := held_out_sources(config):
        others = prepared_pairs(config, sources, tokenize, console)
        console.block()
        console.result(reading("data.eval", others.manifest["statistics"]))
    found = check(config, split(config, pairs, others), tokenizer)
    show_check(found, console)
    folder = report or default_report_folder(config, pairs, out)
    write_check(found, marked, folder)
    console.block()
    console.result(PathLine("report", folder / PAGE))
    if strict:
        refuse_grave(found, str(folder))
    return found


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
                name: _places(gaps)
                for name, gaps in (("chosen", pair.chosen_gaps), ("rejected", pair.rejected_gaps))
                if gaps is not None
            },
        )
        for pair in pairs[: min(count, len(pairs))]
    ]


def _places(gaps: Gaps) -> set[int]:
    """Return every place within some gaps."""
    return {place for start, stop in gaps.reshape(-1, 2).tolist() for place in range(start, stop)}
