"""The tokenizer and the pairs of a job: prepared or found, then trained on, held out or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config import Config
from dpo_cli.config.inputs import held_out_sources, is_file, no_template
from dpo_cli.data.checkup.endings import set_end
from dpo_cli.data.checkup.selection import drops, without_copies
from dpo_cli.data.pairs.sources import Source, as_sources, describe, paths_of
from dpo_cli.data.prepared import folder as prepared
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.writing import prepare
from dpo_cli.data.tokens.chat_template import named_templates
from dpo_cli.data.tokens.conversation_text import PLAIN
from dpo_cli.data.tokens.tokenize import PairTokenizer, read_template
from dpo_cli.errors import UserError
from dpo_cli.modeling.folders import tokenizers
from dpo_cli.reporting.console import Console
from dpo_cli.system.locks import lock_beside, locked
from dpo_cli.system.storage import MANIFEST, text_digest, why_no_folder
from dpo_cli.system.text import several


def load_tokenizer(config: Config, console: Console, day: date | None = None) -> tuple[Any, PairTokenizer]:
    """Load the model's tokenizer and fit it with template and length rule.

    Args:
        config: Says which template and which rule.
        console: Is told which date the template writes, if it writes any.
        day: What a template is told that asks for the date; None: today.

    Raises:
        UserError: Tokenizer or template cannot be read, or the tokenizer lacks what the configuration names.
    """
    tokenizer = tokenizers.load_tokenizer(config.model.name, config.model.trust)
    if config.reference.model is not None:
        tokenizers.check_same_tokens(tokenizer, config.reference.model, "`reference.model`", config.model.trust)
    if config.model.eos_token is not None:
        set_end(tokenizer, config.model.eos_token)
    own, asked = named_templates(tokenizer), config.model.chat_template
    is_named = asked is not None and asked in own and not is_file(asked)
    if asked is not None and asked != PLAIN and not is_named and not is_file(asked):
        raise no_template(asked, list(own))
    template = own[str(asked)] if is_named else read_template(asked)
    start = config.adapter.start if config.adapter else None
    if start and asked is None and (other := tokenizers.own_template(start, tokenizer.chat_template)):
        console.warning(
            f"the adapter that training goes on from has a chat template of its own, which is not used; "
            f"`model.chat_template: {other}` uses it"
        )
    tokenize = PairTokenizer(
        tokenizer,
        template=template,
        max_length=config.data.max_length,
        on_too_long=config.data.on_too_long,
        turns=config.data.turns,
        min_response=config.data.min_response,
        day=day or date.today(),
    )
    # All of the tokenizer's own are saved as they came.
    if template is not None and not is_named:
        # What is saved with the model is the template it was trained on, or none.
        tokenizer.chat_template = None if template == PLAIN else template
    if tokenize.day:
        today = " (today)" if tokenize.day == date.today() else " (the day on which the run began)"
        console.notice(f"the chat template writes a date: {tokenize.day.isoformat()}{today}")
    return tokenizer, tokenize


def prepared_pairs(
    config: Config,
    sources: Sequence[Source],
    tokenize: PairTokenizer,
    console: Console,
    folder: Path | None = None,
) -> PreparedPairs:
    """Return the pairs of some sources, prepared now or by an earlier run.

    Args:
        config: Decides how rows are read.
        sources: Where rows come from, or one prepared folder.
        tokenize: Template and length rule.
        console: Says what is done.
        folder: Where to keep them, or None for the cache.
    """
    names, reading = describe(sources), reading_of(config)
    if any(prepared.is_prepared(source.path) for source in sources):
        if len(sources) > 1:
            hint = "name only one prepared folder, or the raw sources"
            raise UserError("a prepared folder cannot be mixed with other sources", names, hint)
        return prepared.open_for(Path(sources[0].path), reading, tokenize)
    if folder and (problem := _check_out(folder)):
        raise problem
    digest = prepared.fingerprint(sources, reading, tokenize)
    target = folder or prepared.default_folder(digest)
    found, reason = prepared.find(target, digest)
    if found is not None:
        console.notice(f"prepared data found: {target}")
        return found
    if folder and target.exists():
        hint = "remove that folder first, or choose another with --out"
        raise UserError(reason or "the folder exists", str(target), hint)
    if reason:
        console.warning(f"{reason}; preparing it again")

    def tell(holder: str) -> None:
        console.notice(f"waiting for {holder}, which prepares the same data")

    # Two processes that prepared the same folder would do the same work twice.
    with locked(lock_beside(target), "preparing the data", tell):
        # Whoever was waited for has most likely prepared it.
        if (found := prepared.find(target, digest)[0]) is None:
            console.notice(f"preparing {names}")
            found = prepare(sources, reading, tokenize, target)
            console.notice(f"prepared data written: {target}")
    return found


def reading_of(config: Config) -> prepared.Reading:
    """Return how rows are read."""
    data = config.data
    return prepared.Reading(data.format, data.on_bad_row, data.ranked, data.columns or {}, data.system or "")


def num_trained_on(
    config: Config, scored: PreparedPairs, indices: NDArray[np.int64], tokenize: PairTokenizer
) -> int | None:
    """Count pairs that have the tokens of one of a configuration's training pairs.

    Args:
        config: Names the training pairs.
        scored: Any pairs.
        indices: Which of them are counted.
        tokenize: Template and length rule.

    Returns:
        Their number, or None where it is not known, since the training pairs are not prepared.
    """
    sources = held_out_sources(config)
    try:
        train, others = (_known_pairs(config, one, tokenize) for one in (as_sources(config.data.train), sources))
        if train is None or (sources and others is None):
            return None
        data = split(config, train, others)
    except UserError:
        return None
    trained_on = data.pairs.key_numbers("key")[data.train]
    return int(np.isin(scored.key_numbers("key")[indices], trained_on).sum())


def _known_pairs(config: Config, sources: Sequence[Source], tokenize: PairTokenizer) -> PreparedPairs | None:
    """Return the pairs of sources on this disk, if they were prepared before.

    Raises:
        UserError: A source is not there any more, or is a prepared folder that was made otherwise.
    """
    if len(sources) == 1 and prepared.is_prepared(sources[0].path):
        return prepared.open_for(Path(sources[0].path), reading_of(config), tokenize)
    # Behind a source that is on the Hub there are no files.
    if not sources or not all(paths_of(source)[1:] for source in sources):
        return None
    digest = prepared.fingerprint(sources, reading_of(config), tokenize)
    return prepared.find(prepared.default_folder(digest), digest)[0]


def _check_out(folder: Path) -> UserError | None:
    """Say why pairs cannot be kept in a folder, if so: what is there and is not prepared data stays."""
    hint = "choose another folder with --out"
    if obstacle := why_no_folder(folder):
        return UserError(f"the folder for the prepared pairs cannot be created: {obstacle}", f"--out {folder}", hint)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        return UserError("the folder for the prepared pairs contains other files", f"--out {folder}", hint)
    return None


def report_folder(config: Config, pairs: PreparedPairs, out: Path | None = None) -> Path:
    """Return the folder beside the prepared training pairs in which the report of their check is kept."""
    first = as_sources(config.data.train)[0].path
    beside = (
        Path(first) if prepared.is_prepared(first) else out or prepared.default_folder(pairs.manifest["fingerprint"])
    )
    return beside.resolve().with_name(f"{beside.resolve().name}.report")


@dataclass(frozen=True)
class RunData:
    """The pairs of a run, and which are trained on and which are held out.

    Attributes:
        pairs: All of them.
        train: Indices of the training pairs.
        held_out: Indices of the held-out pairs; empty where there are none.
        fingerprint: A digest of all of it.
        read: What was found while rows were read, by setting.
        left_out: How many pairs `data.drop` leaves out of both sides, by the finding they are left out for.
    """

    pairs: PreparedPairs
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    fingerprint: str
    read: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, int]


def run_data(config: Config, tokenize: PairTokenizer, console: Console) -> RunData:
    """Prepare or find the training pairs and the held-out pairs."""
    assert config.data.train is not None
    pairs = prepared_pairs(config, as_sources(config.data.train), tokenize, console)
    sources = held_out_sources(config)
    others = prepared_pairs(config, sources, tokenize, console) if sources else None
    for name, part in (("train", pairs), ("eval", others)):
        if part is not None:
            _tell(f"data.{name}", part, console)
    data = split(config, pairs, others)
    if not len(data.train) or (config.data.eval is not None and not len(data.held_out)):
        what = f"holding out {config.data.eval} of {several(len(pairs), 'pair')} leaves one side empty"
        hint = "change `data.eval`, name a source of held-out pairs, or set it to null"
        raise UserError(what, "`data.eval`", hint)
    return data


def _tell(name: str, pairs: PreparedPairs, console: Console) -> None:
    """Say in a line what was understood of some sources, and what was dropped."""
    statistics = pairs.manifest["statistics"]
    shapes = ", ".join(dict.fromkeys(source["shape"] for source in statistics["sources"]))
    rows, kept = several(statistics["rows_read"], "row"), several(statistics["pairs_kept"], "pair")
    line = f"{name}: {rows} of the shape {shapes}, {kept}"
    if dropped := statistics["dropped"]:
        console.warning(f"{line}; dropped: {shown_counts(dropped)} (`dpo prepare-data` lists them)")
    else:
        console.notice(line)


def split(config: Config, pairs: PreparedPairs, others: PreparedPairs | None) -> RunData:
    """Settle which pairs are trained on, which are held out, and which are left out of both.

    Args:
        config: Says what is held out and what is left out.
        pairs: What `data.train` names.
        others: What `data.eval` names, where it is a source of its own.

    Raises:
        UserError: `data.drop` leaves a side empty, or names what cannot be found.
    """
    digest, fraction = pairs.manifest["fingerprint"], config.data.eval
    read = {"data.train": pairs.manifest["statistics"]}
    if others is not None:
        read["data.eval"] = others.manifest["statistics"]
        digest = text_digest(digest, others.manifest["fingerprint"])
        train, held_out = np.split(np.arange(len(pairs) + len(others)), [len(pairs)])
        pairs = pairs.followed_by(others)
    elif isinstance(fraction, float):
        train, held_out = pairs.hold_out(fraction, config.training.seed)
    else:
        train, held_out = np.arange(len(pairs)), np.empty(0, np.int64)
    # A row that is trained on twice is no second trial.
    held_out = without_copies(pairs, held_out)
    return _without_dropped(config, RunData(pairs, train, held_out, digest, read, {}))


def _without_dropped(config: Config, data: RunData) -> RunData:
    """Leave out what `data.drop` names."""
    names = config.data.drop
    if not names:
        return data
    if "leakage" in names and not held_out_sources(config):
        what = "`leakage` has no effect: a prompt is on one side only, unless `data.eval` is a separate source"
        raise UserError(what, "`data.drop`", "remove it from the list")
    left_out = drops(data.pairs, data.train, data.held_out, names)
    gone = np.concatenate(list(left_out.values()))
    train, held_out = np.setdiff1d(data.train, gone), np.setdiff1d(data.held_out, gone)
    counts = {name: len(indices) for name, indices in left_out.items()}
    for side, before, after in (("training", data.train, train), ("held-out", data.held_out, held_out)):
        if len(before) and not len(after):
            what = f"no {side} pairs are left: {shown_counts(counts)} left out"
            raise UserError(what, "`data.drop`", "name fewer findings, or fix the data")
    fingerprint = text_digest(data.fingerprint, *sorted(left_out))
    return replace(data, train=train, held_out=held_out, fingerprint=fingerprint, left_out=counts)


def shown_counts(counts: Mapping[str, int]) -> str:
    """Write counts with their names: `3 duplicates, 1,024 conflicts`."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def named_pairs(pairs: PreparedPairs, indices: Sequence[int]) -> str:
    """Name pairs by file and line, the first few of them."""
    origins = [pairs[index].origin for index in indices]
    return ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")
