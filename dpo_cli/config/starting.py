"""A configuration to start from: its lines and comments, by what was found of a model and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_cli.settings import escape_path
from dpo_cli.system import plain_yaml
from dpo_cli.system.text import several

_PAIRS = 32
"""Pairs of a step, unless there are few."""

_EVALUATE, _SAVE = 50, 100
"""Steps between evaluations and between checkpoints, where a run has four times and twice as many."""

_COVERED = 0.99
"""The share of the pairs that `data.max_length` is to hold whole."""

UNLIMITED = 1_000_000
_LENGTH = 1024
_RATES = ((5e8, "5e-6"), (1e9, "2e-6"), (4e9, "1e-6"), (float("inf"), "5e-7"))
"""Learning rates for models of fewer parameters than that."""

_ADAPTER_RATE = "2e-5"
"""The learning rate for adapters, whatever their base."""

_BYTES = 16
"""What a parameter takes with AdamW: weight, gradient and two moments in float32."""


@dataclass(frozen=True)
class ModelFound:
    """What a look at the model found.

    Attributes:
        parameters: How many it has.
        positions: The most tokens that it reads, or None where nothing limits them.
        template: `plain` where the tokenizer has no chat template; the template's file where an adapter has its own.
        start: The folder of the adapter that was named as the model, or None.
    """

    parameters: int
    positions: int | None
    template: str | None
    start: str | None = None


@dataclass(frozen=True)
class DataFound:
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
        counted = f"{'the first ' * (self.rows != self.num_rows)}{several(self.rows, 'row')}"
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


def starting_text(model: str | None, found: ModelFound | None, data: str | None, rows: DataFound | None) -> str:
    """Return a configuration with comments; placeholders where there is no model or no data."""
    return "\n".join(_lines(model, found, data, rows)) + "\n"


def _lines(model: str | None, found: ModelFound | None, data: str | None, rows: DataFound | None) -> Iterator[str]:
    """Yield the lines of the configuration."""
    yield "# yaml-language-server: $schema=schema.json"
    yield "# Written by `dpo init`. `dpo config example` shows more settings, `dpo config schema > schema.json` all."
    yield from _model_lines(model, found)
    if found is None or found.start is None:
        less = f"train a few weights beside the model's own, in less memory; then at a rate of {_ADAPTER_RATE}"
        yield f"# adapter: lora    # {less}"
    yield ""
    yield from _data_lines(data, rows, found)
    yield ""
    yield from (
        "loss:",
        "  type: dpo",
        "  beta: 0.1    # larger keeps the model closer to the reference",
    )
    yield ""
    yield from _training_lines(found, rows)
    yield ""
    if rows is None or rows.held_out is not None:
        yield "evaluation:"
        yield f"  every_steps: {rows.every(_EVALUATE, 4) if rows else _EVALUATE}    # null: once, at the end"
        yield ""
    yield from ("checkpoints:", f"  every_steps: {rows.every(_SAVE, 2) if rows else _SAVE}", "  keep: 2")


def _model_lines(model: str | None, found: ModelFound | None) -> Iterator[str]:
    yield "model:"
    if model is None:
        yield "  name: path/to/model    # replace it with yours: a folder, a .gguf file or a Hub id"
        return
    yield f"  name: {plain_yaml.written(escape_path(model))}"
    if found and found.template:
        why = "the adapter's own" if found.start and found.template != "plain" else "the tokenizer has none of its own"
        yield f"  chat_template: {plain_yaml.written(escape_path(found.template))}    # {why}"
    if found and found.start:
        yield from ("", "adapter:", "  type: lora")
        yield f"  start: {plain_yaml.written(escape_path(found.start))}    # the reference is the model with it"


def _data_lines(data: str | None, rows: DataFound | None, model: ModelFound | None) -> Iterator[str]:
    yield "data:"
    if data is None or rows is None:
        yield "  train: pairs.jsonl    # replace it with yours: a file, a glob, a folder or a Hub id"
    else:
        yield f"  train: {plain_yaml.written(escape_path(data))}"
        yield f"  # {rows.looked_at}"
        if rows.columns:
            yield f"  columns: {plain_yaml.written(rows.columns)}    # guessed from their names: check them"
        if rows.dropped:
            setting = "on_bad_row: drop    " if rows.broken else ""
            dropped = f"{rows.dropped:,} of them {become_no_pairs(rows.dropped)}"
            yield f"  {setting}# {dropped}: `dpo prepare-data` lists them"
    if rows and rows.held_out is None:
        yield "  eval: null    # there are too few prompts to hold some out"
    else:
        yield f"  eval: {rows.held_out if rows else _fraction(_PAIRS)}    # the fraction held out"
    yield from _length_lines(rows, model)
    yield "  on_too_long: drop    # or truncate: shorten the prompt from the left"


def _length_lines(rows: DataFound | None, model: ModelFound | None) -> Iterator[str]:
    if rows is None or rows.lengths is None or model is None:
        yield f"  max_length: {_LENGTH}    # tokens of prompt and response together"
        return
    length, covered = _length(rows.lengths, model)
    longest = int(rows.lengths.max())
    yield f"  max_length: {length}    # tokens; fits {covered:.1%} of the pairs, the longest has {longest:,}"


def _length(lengths: NDArray[np.int64], model: ModelFound) -> tuple[int, float]:
    """Return the `data.max_length` that holds nearly all pairs, if the model reads so much, and the share it holds."""
    wanted = int(np.sort(lengths)[min(len(lengths) - 1, int(_COVERED * len(lengths)))])
    length = min(-(-wanted // 64) * 64, model.positions or UNLIMITED)
    return length, float((lengths <= length).mean())


def too_long(rows: DataFound, model: ModelFound) -> str | None:
    """Say which share of the pairs the model cannot read, unless nearly all of them fit."""
    if rows.lengths is None:
        return None
    length, covered = _length(rows.lengths, model)
    if covered >= _COVERED:
        return None
    return f"{1 - covered:.1%} of the pairs have more than the {length:,} tokens that the model reads; they are dropped"


def _training_lines(found: ModelFound | None, rows: DataFound | None) -> Iterator[str]:
    yield "training:"
    yield "  epochs: 1"
    yield f"  pairs_per_step: {rows.pairs_per_step if rows else _PAIRS}    # across all processes"
    if found is None:
        yield "  learning_rate: 1e-6    # the larger the model, the lower: 5e-7 for 7B, 5e-6 below 500M"
        return
    if found.start:
        yield f"  learning_rate: {_ADAPTER_RATE}    # usual for adapters: 5e-6 to 5e-5"
        yield "  schedule: cosine"
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


def become_no_pairs(num_rows: int) -> str:
    """Say of a number of rows that they do not become pairs."""
    return "does not become a pair" if num_rows == 1 else "do not become pairs"
