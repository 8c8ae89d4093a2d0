"""`dpo init`: look at a model and at data for a configuration to start from."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import TrainingSettings
from dpo_cli.config.starting import UNLIMITED, DataFound, ModelFound, become_no_pairs, starting_text, too_long
from dpo_cli.data.pairs.detection import detect, guessed_columns
from dpo_cli.data.pairs.renaming import renamed
from dpo_cli.data.pairs.sources import Source, as_sources, read_rows
from dpo_cli.data.prepared.folder import PreparedPairs, Reading
from dpo_cli.data.prepared.writing import prepare
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import holds_adapter, may_be_start
from dpo_cli.modeling.folders.model_files import most_tokens
from dpo_cli.modeling.folders.model_names import whole_model
from dpo_cli.modeling.folders.tokenizers import load_tokenizer, own_template
from dpo_cli.modeling.policy import Policy
from dpo_cli.reporting.console import Console
from dpo_cli.system import plain_yaml

_ROWS = 1000
"""How many of the first rows are looked at."""

_COUNTED = 5000
"""How many rows are counted: the steps of so many are enough for any of the intervals below."""


def described(console: Console, model: str | None, data: str | None) -> str:
    """Look at a model and at data, say what was found, and return a configuration that fits them.

    Args:
        console: Is told what was found.
        model: A model folder, a .gguf file or a Hub id; None: a placeholder is written.
        data: A source of pairs; None: a placeholder is written.

    Raises:
        UserError: The model or the data cannot be read.
    """
    tokenizer = load_tokenizer(model) if model else None
    found_model = _look_at_model(model, tokenizer) if model else None
    found_data = _look_at_data(as_sources(data)[0], found_model, tokenizer) if data else None
    if found_data:
        _say_what_was_found(console, found_data, found_model)
    if found_model and found_model.start:
        console.notice(
            f"{model} is an adapter of {whole_model(model or '')}: the configuration lets training go on from it"
        )
        model = whole_model(model or "")
    elif model and holds_adapter(model):
        console.warning(
            f"{model} is an adapter that training cannot go on from, since its layers differ in rank or alpha: it is "
            f"merged into {whole_model(model)}, all of whose weights train"
        )
    return starting_text(model, found_model, data, found_data)


def _say_what_was_found(console: Console, data: DataFound, model: ModelFound | None) -> None:
    """Show what the comments of the configuration say, and warn of what should be looked at before it is run."""
    console.notice(data.looked_at)
    if data.columns:
        console.warning(
            f"`data.columns` is guessed from the column names, check it: {plain_yaml.written(data.columns)}"
        )
    if data.dropped:
        console.warning(f"{data.dropped:,} of the rows {become_no_pairs(data.dropped)}; `dpo prepare-data` lists them")
    if model and model.template:
        console.warning("the tokenizer has no chat template; `model.chat_template: plain` puts headings before turns")
    if model and (beyond := too_long(data, model)):
        console.warning(beyond)


def _look_at_model(name: str, tokenizer: Any) -> ModelFound:
    """Count parameters by the model's settings, without its weights; of an adapter, those of its base."""
    policy = Policy.empty(name)
    template = None if tokenizer.chat_template else "plain"
    start = name if holds_adapter(name) and may_be_start(name) else None
    if start and (own := own_template(start, load_tokenizer(whole_model(start)).chat_template)):
        template = str(own)
    return ModelFound(policy.sizes().numbers, most_tokens(policy.model.config), template, start)


def _look_at_data(source: Source, model: ModelFound | None, tokenizer: Any) -> DataFound:
    """Find the shape of the first rows, and their lengths where there is a tokenizer."""
    there = read_rows(source)
    rows = list(itertools.islice(there, _ROWS))
    num_rows = len(rows) + sum(1 for _ in itertools.islice(there, _COUNTED - _ROWS))
    if not rows:
        raise UserError("the data has no rows", source.path, "name data with pairs in it")
    columns = guessed_columns([row.values for row in rows if row.values is not None])
    shape = detect(list(renamed(rows, columns or {}, "")), source.path)
    if model is None:
        return DataFound(shape, columns, len(rows), num_rows, None, 0, broken=False, divisible=len(rows) > 1)
    plain = "plain" if model.template == "plain" else None
    with _tokenized(source.model_copy(update={"limit": _ROWS, "columns": columns}), tokenizer, plain) as (
        pairs,
        broken,
    ):
        lengths, dropped = pairs.sizes.longest.copy(), sum(pairs.manifest["statistics"]["dropped"].values())
        found = DataFound(shape, columns, len(rows), num_rows, lengths, dropped, broken, divisible=True)
        assert found.held_out is not None
        sides = pairs.hold_out(found.held_out, TrainingSettings().seed)
        return replace(found, divisible=all(map(len, sides)))


@contextlib.contextmanager
def _tokenized(source: Source, tokenizer: Any, template: str | None) -> Iterator[tuple[PreparedPairs, bool]]:
    """Tokenize the rows of a source, those that can be read; tell whether others would stop a run."""
    tokenize = PairTokenizer(tokenizer, template=template, max_length=UNLIMITED, on_too_long="drop")
    with tempfile.TemporaryDirectory() as folder:
        try:
            pairs, broken = prepare([source], Reading(), tokenize, Path(folder) / "pairs"), False
        except (UserError, ExceptionGroup):
            # What has another reason than broken rows is raised again.
            pairs, broken = prepare([source], Reading(on_bad_row="drop"), tokenize, Path(folder) / "pairs"), True
        yield pairs, broken
