"""From a data file through the prepared folder and back: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.cli import app
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import Message, Pair
from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized
from tests.builders import prepare_pairs
from tests.conftest import CHATML, make_config, write_rows
from tests.data.awkward_texts import texts

few_folders = settings(max_examples=15, deadline=None)

TEXT = texts("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "end|>")
NUMBER = st.floats(0, 1000, width=32)


@st.composite
def said(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a row of the shape `instruction`."""
    chosen, rejected = draw(st.lists(TEXT, min_size=2, max_size=2, unique=True))
    given_input = draw(st.sampled_from(({}, {"input": ""}, {"input": None})) | TEXT.map(lambda text: {"input": text}))
    return {"instruction": draw(TEXT), **given_input, "chosen": chosen, "rejected": rejected}


@st.composite
def talked(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a row of message lists, with answers of several turns, and with all that a pair may have beside them."""

    def turns(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": draw(TEXT)} for role in roles]

    opening = draw(st.sampled_from(((), ("system",), ("user", "assistant"), ("system", "user", "assistant"))))
    answers = st.sampled_from(((), ("assistant", "user"), ("assistant", "tool")))
    columns = {"prompt": turns(*opening, "user")}
    for name in ("chosen", "rejected"):
        columns[name] = turns(*draw(answers), "assistant")
        # They part in their first turn: what they have in common would be the prompt's.
        columns[name][0]["content"] += f" {name}"
    beside = {"weight": NUMBER, "margin": NUMBER, "source": TEXT, "category": TEXT}
    return {**columns, **{name: draw(values) for name, values in beside.items() if draw(st.booleans())}}


def prepared(rows: Sequence[dict[str, Any]], tokenizer: Any, folder: str, *, ascii_only: bool) -> PreparedPairs:
    """Write rows as JSON lines, prepare them, and read the folder again."""
    source, out = Path(folder, "pairs.jsonl"), Path(folder, "prepared")
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    source.write_text(lines, encoding="utf-8", newline="")
    prepare_pairs(source, tokenizer, out)
    return PreparedPairs.open(out)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@few_folders
@given(rows=st.lists(said(), min_size=1, max_size=8), ascii_only=st.booleans())
def test_any_texts_come_back_out_of_the_folder(tokenizer, rows, ascii_only):
    """Prompt and response decode to what the template writes, and all of the response is judged."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = prepared(rows, tokenizer, folder, ascii_only=ascii_only)
        assert len(pairs) == len(rows)
        for row, pair in zip(rows, pairs, strict=True):
            given_input = row.get("input") or ""
            asked = f"{row['instruction']}\n{given_input}" if given_input.strip() else row["instruction"]
            prompt = turn("user", asked) + "<|im_start|>assistant\n"
            assert tokenizer.decode(pair.prompt.tolist()) == prompt
            for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                assert tokenizer.decode([*pair.prompt, *tokens]) == prompt + row[name] + "<|im_end|>\n"
                assert tokens.tolist().count(tokenizer.eos_token_id) == 1
            assert pair.chosen_gaps is None
            assert pair.rejected_gaps is None


@few_folders
@given(rows=st.lists(talked(), min_size=1, max_size=8))
def test_every_field_of_a_pair_survives_the_folder(tokenizer, rows):
    with tempfile.TemporaryDirectory() as folder:
        pairs = prepared(rows, tokenizer, folder, ascii_only=False)
        source = Path(folder, "pairs.jsonl")
        tokenize = PairTokenizer(tokenizer, template=None, max_length=1000, on_too_long="drop")
        direct = tokenize([as_pair(row, f"{source}:{number}") for number, row in enumerate(rows, 1)])
        assert len(pairs) == len(direct)
        for found, expected in zip(pairs, direct, strict=True):
            assert isinstance(expected, Tokenized)
            for name in ("origin", "weight", "margin", "source", "category"):
                assert getattr(found, name) == getattr(expected.pair, name)
            for name in ("prompt", "chosen", "rejected", "chosen_gaps", "rejected_gaps"):
                ours, theirs = getattr(found, name), getattr(expected.pair, name)
                assert (ours is None) == (theirs is None)
                assert ours is None or (ours.dtype == np.int32 and np.array_equal(ours, theirs))


def as_pair(row: dict[str, Any], origin: str) -> Pair:
    """Return the pair that a row of message lists is."""
    parts = (tuple(Message(**message) for message in row[name]) for name in ("prompt", "chosen", "rejected"))
    beside = {name: row[name] for name in ("weight", "margin", "source", "category") if name in row}
    return Pair(*parts, origin, **beside)


@few_folders
@given(rows=st.lists(talked(), min_size=1, max_size=8))
def test_the_assistants_turns_alone_are_judged_when_they_come_back(tokenizer, rows):
    with tempfile.TemporaryDirectory() as folder:
        pairs = prepared(rows, tokenizer, folder, ascii_only=False)
        for row, pair in zip(rows, pairs, strict=True):
            for name, tokens, gaps in (
                ("chosen", pair.chosen, pair.chosen_gaps),
                ("rejected", pair.rejected, pair.rejected_gaps),
            ):
                written = "".join(turn(message["role"], message["content"]) for message in row[name])
                assert tokenizer.decode(tokens.tolist()) == written.removeprefix("<|im_start|>assistant\n")
                ends = judged(tokens.tolist(), gaps).count(tokenizer.eos_token_id)
                assert ends == sum(message["role"] == "assistant" for message in row[name])
                assert (gaps is None) == (len(row[name]) == 1)


def judged(tokens: list[int], gaps: Any) -> list[int]:
    edges = [0, *(() if gaps is None else gaps.tolist()), len(tokens)]
    return [token for start, stop in zip(edges[::2], edges[1::2], strict=True) for token in tokens[start:stop]]


@few_folders
@given(rows=st.lists(said(), min_size=1, max_size=8))
def test_the_same_conversations_in_other_shapes_have_the_same_keys(tokenizer, rows):
    """As an instruction, as text beside a prompt, and as lists of messages."""
    asked = [
        f"{row['instruction']}\n{row['input']}" if (row.get("input") or "").strip() else row["instruction"]
        for row in rows
    ]
    as_text = [
        {"prompt": text, "chosen": row["chosen"], "rejected": row["rejected"]}
        for text, row in zip(asked, rows, strict=True)
    ]
    as_messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in as_text
    ]
    keys = []
    for shape in (rows, as_text, as_messages):
        with tempfile.TemporaryDirectory() as folder:
            keys.append(list(prepared(shape, tokenizer, folder, ascii_only=False).keys()))
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys[0])) == len(
        {(text, row["chosen"], row["rejected"]) for text, row in zip(asked, rows, strict=True)}
    )


class Project:
    """A configuration whose data is prepared by the program's own command, in this process."""

    def __init__(self, folder: Path, model: Path, rows: list[dict[str, Any]], capsys: Any) -> None:
        self.pairs = write_rows(folder / "pairs.jsonl", rows)
        self.config = make_config(folder, model, self.pairs, data={"train": str(self.pairs), "eval": 0.25})
        self.capsys = capsys

    def prepare(self, *overrides: str) -> tuple[str, bool]:
        """Return the folder that was found or written, and whether it was found."""
        arguments = ["prepare-data", "--config", str(self.config), *overrides]
        with pytest.raises(SystemExit) as ended:
            app(arguments)
        assert ended.value.code == 0
        said = self.capsys.readouterr().err
        (found,) = re.findall(r"prepared data (found|written): (.+)", said)
        return found[1], found[0] == "found"


@pytest.fixture
def project(tmp_path, tiny_llama, demo_rows, capsys) -> Project:
    return Project(tmp_path, tiny_llama, demo_rows[:12], capsys)


def test_what_does_not_decide_the_tokens_finds_the_folder_again(project):
    folder, found = project.prepare()
    assert not found
    for override in ("training.learning_rate=0.5", "training.seed=7", "data.drop=[duplicates]", "data.eval=0.5"):
        assert project.prepare(override) == (folder, True)


def test_a_changed_byte_template_or_length_rule_makes_another_folder(project, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML + "{# another #}", encoding="utf-8")
    folders = [project.prepare()[0]]
    changes = ("model.chat_template=plain", f"model.chat_template={template}", "data.max_length=900")
    for override in (*changes, "data.on_too_long=truncate", "data.turns=last"):
        folder, found = project.prepare(override)
        assert not found
        folders.append(folder)
    original = project.pairs.read_bytes()
    project.pairs.write_bytes(original.replace(b"a", b"b", 1))
    folders.append(project.prepare()[0])
    assert len(set(folders)) == len(folders)
    project.pairs.write_bytes(original)
    assert project.prepare() == (folders[0], True)
