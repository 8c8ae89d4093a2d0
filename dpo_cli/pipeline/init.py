"""`dpo init`: write a configuration to start from, after a look at the model and the data."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config.inputs import check_new_file
from dpo_cli.config.schema import TrainingSettings
from dpo_cli.data.pairs.sources import Source, as_sources, read_rows
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.model_files import most_tokens
from dpo_cli.reporting.console import STANDARD_OUTPUT, Console
from dpo_cli.settings import escape_path
from dpo_cli.system import plain_yaml

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dpo_cli.data.prepared.folder import PreparedPairs

_ROWS = 1000
"""How many of the first rows are looked at."""

_COUNTED = 5000
"""How many rows are counted: the steps of so many are enough for any of the intervals below."""

_PAIRS = 32
"""Pairs of a step, unless there are few."""

_EVALUATE, _SAVE = 50, 100
"""Steps between evaluations and between checkpoints, where a run has four times and twice as many."""

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
        num_rows: How many there are, counted up to `_COUNTED`.
        lengths: Tokens of each pair's longer sequence, `[pairs]`, or None where there is no tokenizer.
        dropped: How many of the rows become no pair.
        broken: Whether any of these would stop a run.
        divisible: Whether some of the pairs can be held out.
    """

    shape: str
    columns: dict[str, str] | None
    rows: int
    num_rows: int
    lengths: NDArray[np.int64] | None
    dropped: int
    broken: bool
    divisible: bool

    @property
    def looked_at(self) -> str:
        """Say how many rows were looked at, and what they are."""
        counted = f"{self.rows:,} rows" if self.rows == self.num_rows else f"the first {self.rows:,} rows"
        return f"{counted} looked at, of the shape {self.shape}"

    @property
    def num_pairs(self) -> int:
        """About how many pairs the rows are, counted as they are."""
        return self.num_rows if self.lengths is None else self.num_rows * len(self.lengths) // self.rows

    @property
    def pairs_per_step(self) -> int:
        """So many pairs that an epoch has steps enough to learn something."""
        return next(pairs for pairs in (_PAIRS, 16, 8, 4) if self.num_pairs >= 20 * pairs or pairs == 4)

    @property
    def held_out(self) -> float | None:
        """The fraction of the pairs that is held out."""
        return _fraction(self.pairs_per_step) if self.divisible else None

    def every(self, steps: int, times: int) -> int:
        """Return an interval of so many steps, or a smaller one that an epoch holds some times."""
        num_steps = self.num_pairs * (1 - (self.held_out or 0)) / self.pairs_per_step
        return max(1, min(steps, int(num_steps / times)))


def init(console: Console, *, model: str | None, data: str | None, out: Path) -> None:
    """Write a configuration with comments that fits a model and data.

    Args:
        console: Says what was found.
        model: A model folder, a .gguf file or a Hub id; None: a placeholder is written.
        data: A source of pairs; None: a placeholder is written.
        out: The file to write, which must not exist; `-`: standard output.

    Raises:
        UserError: The file exists or cannot be written; the model or the data cannot be read.
    """
    check_new_file(out, model, data)
    console.notice(
        "looking at the model and the data …" if model or data else "writing placeholders: no model, no data"
    )
    found_model = _look_at_model(model) if model else None
    found_data = _look_at_data(as_sources(data)[0], found_model) if data else None
    if found_data:
        _say_what_was_found(console, found_data, found_model)
    text = "\n".join(_lines(model, found_model, data, found_data)) + "\n"
    if out == STANDARD_OUTPUT:
        console.result(text.rstrip("\n"))
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise from_os_error(error, "writing the configuration", str(out)) from error
    console.notice(f"configuration written: {out}; next: dpo train {out} --dry-run")


def _say_what_was_found(console: Console, data: _Data, model: _Model | None) -> None:
    """Show what the comments of the configuration say, and warn of what should be looked at before it is run."""
    console.notice(data.looked_at)
    if data.columns:
        console.warning(
            f"`data.columns` is guessed by the columns' names, check it: {plain_yaml.written(data.columns)}"
        )
    if data.dropped:
        console.warning(f"{data.dropped:,} of the rows become no pair; `dpo prepare-data` names them")
    if model and model.template:
        console.warning("the tokenizer has no chat template; `model.chat_template: plain` puts headings before turns")
    if model and (too_long := _too_long(data, model)):
        console.warning(too_long)


def _look_at_model(name: str) -> _Model:
    """Count parameters by the model's settings, without its weights, and load its tokenizer."""
    from dpo_cli.modeling.loading import empty_policy, load_tokenizer

    tokenizer = load_tokenizer(name)
    policy = empty_policy(name)
    template = None if tokenizer.chat_template else "plain"
    return _Model(policy.num_parameters(), most_tokens(policy.config), tokenizer, template)


def _look_at_data(source: Source, model: _Model | None) -> _Data:
    """Find the shape of the first rows, and their lengths where there is a tokenizer."""
    from dpo_cli.data.pairs.detection import detect, guessed_columns
    from dpo_cli.data.pairs.renaming import renamed

    there = read_rows(source)
    rows = list(itertools.islice(there, _ROWS))
    num_rows = len(rows) + sum(1 for _ in itertools.islice(there, _COUNTED - _ROWS))
    if not rows:
        raise UserError("the data has no rows", source.path, "name data with pairs in it")
    columns = guessed_columns([row.values for row in rows if row.values is not None])
    shape = detect(list(renamed(rows, columns or {}, "")), source.path)
    if model is None:
        return _Data(shape, columns, len(rows), num_rows, None, 0, broken=False, divisible=len(rows) > 1)
    with _tokenized(source.model_copy(update={"limit": _ROWS, "columns": columns}), model) as (pairs, broken):
        lengths, dropped = pairs.sizes.longest.copy(), sum(pairs.manifest["statistics"]["dropped"].values())
        found = _Data(shape, columns, len(rows), num_rows, lengths, dropped, broken, divisible=True)
        assert found.held_out is not None
        sides = pairs.hold_out(found.held_out, TrainingSettings().seed)
        return replace(found, divisible=all(map(len, sides)))


@contextlib.contextmanager
def _tokenized(source: Source, model: _Model) -> Iterator[tuple[PreparedPairs, bool]]:
    """Tokenize the rows of a source, those that can be read; tell whether others would stop a run."""
    from dpo_cli.data.prepared.folder import Reading
    from dpo_cli.data.prepared.writing import prepare
    from dpo_cli.data.tokens.tokenize import PairTokenizer

    tokenize = PairTokenizer(model.tokenizer, template=model.template, max_length=_UNLIMITED, on_too_long="drop")
    with tempfile.TemporaryDirectory() as folder:
        try:
            pairs, broken = prepare([source], Reading(), tokenize, Path(folder) / "pairs"), False
        except (UserError, ExceptionGroup):
            # What has another reason than broken rows is raised again.
            pairs, broken = prepare([source], Reading(on_bad_row="drop"), tokenize, Path(folder) / "pairs"), True
        yield pairs, broken


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
    if rows is None or rows.held_out is not None:
        yield "evaluation:"
        yield f"  every_steps: {rows.every(_EVALUATE, 4) if rows else _EVALUATE}    # null: once, at the end"
        yield ""
    yield from ("checkpoints:", f"  every_steps: {rows.every(_SAVE, 2) if rows else _SAVE}", "  keep: 2")


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
        yield f"  # {rows.looked_at}"
        if rows.columns:
            yield f"  columns: {plain_yaml.written(rows.columns)}    # guessed by their names: check them"
        if rows.dropped:
            setting = "on_bad_row: drop    " if rows.broken else ""
            yield f"  {setting}# {rows.dropped:,} of them become no pair: `dpo prepare-data` names them"
    if rows and rows.held_out is None:
        yield "  eval: null    # there are too few prompts to hold some out"
    else:
        yield f"  eval: {rows.held_out if rows else _fraction(_PAIRS)}    # the fraction held out"
    yield from _length_lines(rows, model)
    yield "  on_too_long: drop    # or truncate: cut the prompt from the left"


def _length_lines(rows: _Data | None, model: _Model | None) -> Iterator[str]:
    if rows is None or rows.lengths is None or model is None:
        yield f"  max_length: {_LENGTH}    # tokens of prompt and response together"
        return
    length, covered = _length(rows.lengths, model)
    longest = int(rows.lengths.max())
    yield f"  max_length: {length}    # tokens; holds {covered:.1%} of the pairs, the longest has {longest:,}"


def _length(lengths: NDArray[np.int64], model: _Model) -> tuple[int, float]:
    """Return the `data.max_length` that holds nearly all pairs, if the model reads so much, and the share it holds."""
    import numpy as np

    wanted = int(np.sort(lengths)[min(len(lengths) - 1, int(_COVERED * len(lengths)))])
    length = min(-(-wanted // 64) * 64, model.positions or _UNLIMITED)
    return length, float((lengths <= length).mean())


def _too_long(rows: _Data, model: _Model) -> str | None:
    """Say which share of the pairs the model cannot read, unless nearly all of them fit."""
    if rows.lengths is None:
        return None
    length, covered = _length(rows.lengths, model)
    if covered >= _COVERED:
        return None
    return f"{1 - covered:.1%} of the pairs have more than the {length:,} tokens that the model reads; they are dropped"


def _training_lines(found: _Model | None, rows: _Data | None) -> Iterator[str]:
    yield "training:"
    yield "  epochs: 1"
    yield f"  pairs_per_step: {rows.pairs_per_step if rows else _PAIRS}    # across all processes"
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


def _fraction(pairs_per_step: int) -> float:
    """Return the fraction to hold out: more of few pairs."""
    return 0.1 if pairs_per_step < _PAIRS else 0.05


def _counted(number: int) -> str:
    """Write a number of parameters as people say it: 135M, 1.7B."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number:,}"
