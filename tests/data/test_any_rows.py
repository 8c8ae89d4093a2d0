"""Whatever is in a data file: prepared and checked pairs, or errors for the user; never anything else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.examination import examine
from dpo_cli.data.files import READERS
from dpo_cli.data.formats import FORMATS
from dpo_cli.errors import UserError
from dpo_cli.reporting.data_page import data_page
from tests.builders import prepare_pairs
from tests.conftest import ROW_OF

COLUMNS = sorted({name for shape in FORMATS.values() for name in shape.example} | {"system", "history", "tools"})
WORDS = st.sampled_from(
    ["user", "assistant", "gpt", "tool", "\n\nHuman: a\n\nAssistant: b", "<|im_end|>", "", "x\ud800"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=8)
KEYS = st.sampled_from(["role", "content", "from", "value", "text", "type", "tool_calls"]) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "judge"]), "content": SCALARS}
    ),
    max_size=4,
)
ROWS = st.dictionaries(st.sampled_from(COLUMNS), VALUES | MESSAGES, max_size=8)


def prepare_and_check(content: bytes, name: str, tokenizer, **options) -> None:
    """Prepare a file and check what comes of it; the user's errors, one or many, are an answer too."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_bytes(content)
        try:
            pairs = prepare_pairs(source, tokenizer, Path(folder, "prepared"), on_bad_row="drop", **options)
        except UserError:
            return
        except ExceptionGroup as several:
            assert all(isinstance(one, UserError) for one in several.exceptions)
            return
        read = {"data.train": pairs.manifest["statistics"]}
        report = examine(pairs, *pairs.hold_out(0.5, 0), max_length=1000, read=read, tokenizer=tokenizer)
        assert "<h1" in data_page(report)
        assert json.dumps(report.as_json(), allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=5), shape=st.sampled_from(["auto", *FORMATS]), data=st.data())
def test_any_rows_are_pairs_or_errors(tokenizer, rows, shape, data):
    good = data.draw(st.sampled_from(sorted(FORMATS))) if shape == "auto" else shape
    # Beside a good row, so that what is wrong has something to spoil.
    lines = [json.dumps(row) for row in (ROW_OF[good], *rows, ROW_OF[good])]
    prepare_and_check("\n".join(lines).encode(), "rows.jsonl", tokenizer, data_format=shape)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=120), ending=st.sampled_from(sorted(READERS)))
def test_any_bytes_are_pairs_or_errors(tokenizer, content, ending):
    prepare_and_check(content, f"rows{ending}", tokenizer)


@pytest.mark.parametrize("shape", FORMATS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_change_to_a_good_row_is_a_pair_or_an_error(tokenizer, shape, data):
    row = {**ROW_OF[shape], data.draw(st.sampled_from(sorted(ROW_OF[shape]))): data.draw(VALUES | MESSAGES)}
    prepare_and_check(json.dumps(row).encode(), "rows.jsonl", tokenizer, data_format=shape)
