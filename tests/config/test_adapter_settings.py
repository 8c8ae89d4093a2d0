"""What is wrong with the settings of an adapter is said where they were made, in the file or on the command line."""

from __future__ import annotations

import re

import pytest

from dpo_cli.config import load_config
from dpo_cli.errors import UserError
from tests.builders import save_adapter

LINES = """\
model: {name: model}
data: {train: pairs.jsonl}
adapter:
  type: lora
  start: START
  rank: 4
  targets:
    - q_proj
    - v_proj
"""


@pytest.fixture
def written(tmp_path, tiny_llama):
    """Return a function that writes the lines above with some replaced; the start adapter has rank 4, alpha 8."""
    start = save_adapter(tiny_llama, tmp_path / "start", target_modules=["q_proj", "v_proj"], lora_alpha=8)

    def write(before="START", after="START"):
        file = tmp_path / "run.yaml"
        file.write_text(LINES.replace(before, after).replace("START", str(start)))
        return file

    return write


def the_error(file, *overrides):
    with pytest.raises(UserError) as refused:
        load_config(file, overrides)
    assert refused.value.hint
    return refused.value


@pytest.mark.parametrize(
    ("before", "after", "line", "what"),
    [
        ("    - q_proj\n    - v_proj\n", "    - q_proj\n    - ''\n", 7, "has an empty name"),
        ("  targets:\n    - q_proj\n    - v_proj\n", "  targets: (q\n", 7, "no regular expression"),
        ("    - v_proj", "    - 3", 9, r"`adapter.targets.1` should be text"),
        ("rank: 4", "rank: 0", 6, r"`adapter.rank` should be"),
        ("rank: 4", "rnk: 4", 6, r"`adapter.rnk` is not a setting"),
        ("rank: 4", "rank: 8", 6, r"`adapter.rank` is 8, but 4"),
        ("    - v_proj", "    - k_proj", 7, r"`adapter.targets` is \[q_proj, k_proj\]"),
        ("start: START", "start: $NOWHERE/a", 5, "variable `NOWHERE`"),
        ("type: lora", "type: lroa", 4, "`adapter.type` should be"),
        ("type: lora", "type: lora\n  dropout: 1", 5, "`adapter.dropout` should be"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_of_its_line(written, before, after, line, what):
    file = written(before, after)
    error = the_error(file)
    assert re.search(what, error.what)
    assert error.where == f"{file}, line {line}"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("adapter.targets=(q", "no regular expression"),
        ("adapter.targets=[q_proj, '']", "has an empty name"),
        ("adapter.targets=[]", "a list of at least one"),
        ("adapter.targets=[k_proj]", r"`adapter.targets` is \[k_proj\], but"),
        ("adapter.targets.1=3", r"`adapter.targets.1` should be text"),
        ("adapter.rank=0", "`adapter.rank` should be"),
        ("adapter.rank=8", "`adapter.rank` is 8, but 4"),
        ("adapter.rslora=true", "`adapter.rslora` is true, but false"),
        ("adapter={targets: (q}", "no regular expression"),
        ("adapter={rank: 0}", "`adapter.rank` should be"),
        ("adapter=dora", "`adapter` should be `lora`"),
        ("adapter.type=dora", "`adapter.type` should be `lora`"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_of_it(written, override, what):
    error = the_error(written(), override)
    assert re.search(what, error.what)
    assert error.where == f"the command line: {override}"


def test_few_bits_without_an_adapter_are_an_error_where_they_are_asked_for(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: pairs.jsonl}\nmodel:\n  name: model\n  quantize: nf4\n")
    assert the_error(file).where == f"{file}, line 4"
    assert the_error(file, "model.quantize=int8").where == "the command line: model.quantize=int8"
