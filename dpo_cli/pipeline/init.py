"""`dpo init`: write a configuration to start from, after a look at the model and the data."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli import plain_yaml
from dpo_cli.data.sources import Source, as_sources, check_source, read_rows
from dpo_cli.errors import UserError, from_os_error, raise_all
from dpo_cli.modeling.loading import check_model
from dpo_cli.modeling.model_files import most_tokens
from dpo_cli.reporting.console import Console
from dpo_cli.settings import escape_path, located
from dpo_cli.storage import MANIFEST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ROWS = 1000
"""How many of the first rows are looked at."""

_COVERED = 0.99
"""The share of the pairs that `data.max_length` is to hold whole."""

_UNLIMITED = 1_000_000
_LENGTH = 1024
_RATES = ((5e8, "5e-6"), (1e9, "2e-6"), (4e9, "1e-6"), (float("inf"), "5e-7"))
"""Learning rates for models of fewer parameters than that."""

_BYTES = 16
"""What a parameter takes with AdamW: weight, gradient and two moments in float32."""


@dataclass(frozen=True)
class _Model:
    """What a look at the model found.

    Attributes:
        parameters: How many it has.
        positions: The most tokens that it reads, or None where nothing limits them.
        tokenizer: Its tokenizer.
        template: `plain` where the tokenizer has no chat template.
    """

    parameters: int
    positions: int | None
    tokenizer: Any
    template: str | None


@dataclass(frozen=True)
class _Data:
    """What a look at the data found.

    Attributes:
        shape: The shape of the rows.
        columns: What `data.columns` has to be for that, or None.
        rows: How many were looked at.
        all_rows: Whether these are all.
        lengths: Tokens of each pair's longer sequence, `[pairs]`, or None where there is no tokenizer.
        dropped: How many of the rows cannot be read as pairs.
    """

    shape: str
    columns: dict[str, str] | None
    rows: int
    all_rows: bool
    lengths: NDArray[np.int64] | None
    dropped: int


def init(console: Console, *, model: str | None, data: str | None, out: Path) -> None:
    """Write a configuration with comments that fits a model and data.

    Args:
        console: Says what was found.
        model: A model folder, a .gguf file or a Hub id; None: a placeholder is written.
        data: A source of pairs; None: a placeholder is written.
        out: The file to write, which must not exist.

    Raises:
        UserError: The file exists or cannot be written; the model or the data cannot be read.
    """
    problems = [UserError(f"{located(out)} exists already", "--out", "choose another file")] if out.exists() else []
    if not out.parent.is_dir():
        problems.append(UserError(f"there is no folder {located(out.parent)}", "--out", "create it"))
    if model is not None and (problem := check_model(model, "--model")):
        problems.append(problem)
    for source in as_sources(data):
        if problem := check_source(source, "--data"):
            problems.append(problem)
        elif (Path(source.path) / MANIFEST).is_file():
            hint = "name the data that it was prepared from"
            problems.append(UserError(f"`{source.path}` is a prepared folder", "--data", hint))
    raise_all(problems)
    console.notice(
        "looking at the model and the data …" if model or data else "writing placeholders: no model, no data"
    )
    found_model = _look_at_model(model) if model else None
    found_data = _look_at_data(as_sources(data)[0], found_model) if data else None
    text = "\n".join(_lines(model, found_model, data, found_data)) + "\n"
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise from_os_error(error, "writing the configuration", str(out)) from error
    console.notice(f"configuration written: {out}; next: dpo train {out} --dry-run")


def _look_at_model(name: str) -> _Model:
    """Count parameters by the model's settings, without its weights, and load its tokenizer."""
    from dpo_cli.modeling.loading import empty_policy, load_tokenizer

    tokenizer = load_tokenizer(name)
    policy = empty_policy(name)
    template = None if tokenizer.chat_template else "plain"
    return _Model(policy.num_parameters(), most_tokens(policy.config), tokenizer, template)


def _look_at_data(source: Source, model: _Model | None) -> _Data:
    """Find the shape of the first rows, and their lengths where there is a tokenizer."""
    from dpo_cli.data.detection import detect, guessed_columns
    from dpo_cli.data.renaming import renamed

    rows = list(itertools.islice(read_rows(source), _ROWS + 1))
    all_rows, rows = len(rows) <= _ROWS, rows[:_ROWS]
    if not rows:
        raise UserError("the data has no rows", source.path, "name data with pairs in it")
    columns = guessed_columns([row.values for row in rows if row.values is not None])
    shape = detect(list(renamed(rows, columns or {}, "")), source.path)
    if model is None:
        return _Data(shape, columns, len(rows), all_rows, None, 0)
    lengths, dropped = _lengths(source.model_copy(update={"limit": _ROWS, "columns": columns}), model)
    return _Data(shape, columns, len(rows), all_rows, lengths, dropped)


def _lengths(source: Source, model: _Model) -> tuple[NDArray[np.int64], int]:
    """Tokenize the rows of a source; return the tokens of each pair's longer sequence, and how many rows fail."""
    from dpo_cli.data.prepare import prepare
    from dpo_cli.data.prepared import Reading
    from dpo_cli.data.tokenize import PairTokenizer

    tokenize = PairTokenizer(model.tokenizer, template=model.template, max_length=_UNLIMITED, on_too_long="drop")
    with tempfile.TemporaryDirectory() as folder:
        pairs = prepare([source], Reading(on_bad_row="drop"), tokenize, Path(folder) / "pairs")
        return pairs.sizes.longest.copy(), sum(pairs.manifest["statistics"]["dropped"].values())


def _lines(model: str | None, found: _Model | None, data: str | None, rows: _Data | None) -> Iterator[str]:
    """Yield the lines of the configuration."""
    yield "# yaml-language-server: $schema=schema.json"
    yield "# Written by `dpo init`. `dpo config example` shows more settings, `dpo config schema > schema.json` all."
    yield from _model_lines(model, found)
    yield ""
    yield from _data_lines(data, rows, found)
    yield ""
    yield from (
        "loss:",
        "  type: dpo",
        "  beta: 0.1    # how tightly the model is held to what it was: larger is tighter",
    )
    yield ""
    yield from _training_lines(found, rows)
    yield ""
    yield from ("evaluation:", "  every_steps: 50    # null: once, at the end", "")
    yield from ("checkpoints:", "  every_steps: 100", "  keep: 2")


def _model_lines(model: str | None, found: _Model | None) -> Iterator[str]:
    yield "model:"
    if model is None:
        yield "  name: path/to/model    # put yours here: a folder, a .gguf file or a Hub id"
        return
    yield f"  name: {plain_yaml.written(escape_path(model))}"
    if found and found.template:
        yield f"  chat_template: {found.template}    # the tokenizer has none of its own"


def _data_lines(data: str | None, rows: _Data | None, model: _Model | None) -> Iterator[str]:
    yield "data:"
    if data is None or rows is None:
        yield "  train: pairs.jsonl    # put yours here: a file, a glob, a folder or a Hub id"
    else:
        yield f"  train: {plain_yaml.written(escape_path(data))}"
        counted = f"{rows.rows:,} rows" if rows.all_rows else f"the first {rows.rows:,} rows"
        yield f"  # {counted} looked at, of the shape {rows.shape}"
        if rows.columns:
            yield f"  columns: {plain_yaml.written(rows.columns)}    # guessed by their names: check them"
        if rows.dropped:
            yield f"  on_bad_row: drop    # {rows.dropped:,} of them cannot be read: `dpo prepare-data` names them"
    yield f"  eval: {0.1 if _pairs_per_step(rows) < 32 else 0.05}    # the fraction held out"
    yield from _length_lines(rows, model)
    yield "  on_too_long: drop    # or truncate: cut the prompt from the left"


def _length_lines(rows: _Data | None, model: _Model | None) -> Iterator[str]:
    if rows is None or rows.lengths is None or not len(rows.lengths):
        yield f"  max_length: {_LENGTH}    # tokens of prompt and response together"
        return
    import numpy as np

    lengths = np.sort(rows.lengths)
    wanted = int(lengths[min(len(lengths) - 1, int(_COVERED * len(lengths)))])
    limit = model.positions if model and model.positions else _UNLIMITED
    length = min(-(-wanted // 64) * 64, limit)
    covered = float((lengths <= length).mean())
    yield f"  max_length: {length}    # tokens; holds {covered:.1%} of the pairs, the longest has {lengths[-1]:,}"


def _training_lines(found: _Model | None, rows: _Data | None) -> Iterator[str]:
    yield "training:"
    yield "  epochs: 1"
    yield f"  pairs_per_step: {_pairs_per_step(rows)}    # across all processes"
    if found is None:
        yield "  learning_rate: 1e-6    # the larger the model, the lower: 5e-7 for 7B, 5e-6 below 500M"
        return
    rate = next(rate for limit, rate in _RATES if found.parameters < limit)
    yield f"  learning_rate: {rate}    # usual for {_counted(found.parameters)} parameters"
    yield "  schedule: cosine"
    large = found.parameters >= 1e9
    yield f"  gradient_checkpointing: {str(large).lower()}    # true: less memory, a third slower"
    held = found.parameters * _BYTES / 1e9
    yield f"  optimizer: adamw    # takes {held:.1f} GB with weights and gradients; adafactor takes half"


def _pairs_per_step(rows: _Data | None) -> int:
    """Return so many pairs that an epoch has steps enough to learn something."""
    if rows is None or not rows.all_rows:
        return 32
    return next(pairs for pairs in (32, 16, 8, 4) if rows.rows >= 20 * pairs or pairs == 4)


def _counted(number: int) -> str:
    """Write a number of parameters as people say it: 135M, 1.7B."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number:,}"
