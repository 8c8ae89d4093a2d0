"""`dpo prepare-data`: read, check and tokenize the pairs, and show what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config import Config
from dpo_cli.errors import raise_all
from dpo_cli.pipeline.setup import as_list, check_inputs, load_tokenizer, prepared_pairs
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.tables import dropped_examples, marked_pair, statistics_table, tokens_table

if TYPE_CHECKING:
    from dpo_cli.data.prepared import PreparedPairs


def prepare(config: Config, console: Console, *, out: Path | None, show: int) -> None:
    """Prepare the training pairs and, where they have a source of their own, the held-out pairs.

    Args:
        config: What to prepare.
        console: Where the tables go.
        out: Where to keep the training pairs, or None for the cache.
        show: How many pairs to print token by token.
    """
    raise_all(check_inputs(config))
    tokenizer, tokenize = load_tokenizer(config, config.model.name)
    assert config.data.train is not None
    parts = [("train", as_list(config.data.train), out)]
    if isinstance(config.data.eval, (str, list)):
        parts.append(("eval", as_list(config.data.eval), None))
    for name, sources, folder in parts:
        pairs = prepared_pairs(config, sources, tokenize, console, folder)
        _report(name, pairs, console)
        if name == "train":
            _show(pairs, tokenizer, show, console)


def _report(name: str, pairs: PreparedPairs, console: Console) -> None:
    statistics = pairs.manifest["statistics"]
    console.result(f"data.{name}")
    console.result(statistics_table(statistics))
    console.result("")
    console.result(tokens_table(statistics))
    for line in dropped_examples(statistics):
        console.notice(line)


def _show(pairs: PreparedPairs, tokenizer: Any, count: int, console: Console) -> None:
    """Print the first pairs token by token, special tokens visible."""
    for pair in pairs[: min(count, len(pairs))]:
        parts = {
            name: [tokenizer.decode([token]) for token in getattr(pair, name).tolist()]
            for name in ("prompt", "chosen", "rejected")
        }
        console.result("")
        console.result(marked_pair(pair.origin, parts, colour=console.has_colour))
