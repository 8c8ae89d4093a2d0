"""A file with a large vocabulary is read without a look at each token, and says what the package `gguf` finds in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFEndian, GGUFValueType
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import modeling_gguf_pytorch_utils as legacy

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.gguf.reader import Reader, fast_reading

TOKENS = ["", "a", "ä", "😀", *(f"token {number}" for number in range(10_000))]


@pytest.fixture(params=GGUFEndian)
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write(tmp_path / "model.gguf", request.param)


def write(file: Path, order: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    """Write a file with values and arrays of all types, a vocabulary, and two tensors."""
    writer = gguf.GGUFWriter(file, "llama", endianess=order)
    for kind in set(GGUFValueType) - {GGUFValueType.ARRAY}:
        values: list[Any] = {GGUFValueType.STRING: ["", "ä"], GGUFValueType.BOOL: [True, False]}.get(kind, [3, 0, 1])
        writer.add_key_value(f"one.{kind.name}", values[0], kind)
        writer.add_key_value(f"many.{kind.name}", values, GGUFValueType.ARRAY, kind)
    for name, number in {"context_length": 64, "embedding_length": 32, "block_count": 1}.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-0.5 * number for number in range(len(TOKENS))])
    writer.add_token_types([1 + number % 6 for number in range(len(TOKENS))])
    for name, number in {"first": 1.0, "second": 2.0}.items():
        writer.add_tensor(name, np.full((2, 3), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_it_finds_what_the_package_finds(file: Path) -> None:
    ours, theirs = Reader(file), gguf.GGUFReader(file)
    assert len(theirs.fields) > 25 and [*ours.fields] == [*theirs.fields]
    for name, field in theirs.fields.items():
        assert (ours.fields[name].contents(), ours.fields[name].types) == (field.contents(), field.types), name
    assert ours.fields["tokenizer.ggml.tokens"].contents() == TOKENS
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data_offset) == (other.name, other.tensor_type, other.data_offset)
        assert np.array_equal(one.data, other.data)


@pytest.mark.parametrize("reader", [Reader, gguf.GGUFReader], ids=["ours", "the package's"])
def test_no_token_is_read_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any) -> None:
    """The reader of the package looks at the file for every token, which takes most of its time."""
    file, looks, look = write(tmp_path / "model.gguf"), [], gguf.GGUFReader._get
    monkeypatch.setattr(gguf.GGUFReader, "_get", lambda self, *what, **how: looks.append(1) or look(self, *what, **how))
    reader(file)
    assert (len(looks) < len(TOKENS) / 10) == (reader is Reader)


def test_transformers_reads_the_same_with_it_and_its_own_reader_is_back_afterwards(tmp_path: Path) -> None:
    file, before = write(tmp_path / "model.gguf"), (gguf.GGUFReader, gguf.get_tensor_name_map)
    expected = legacy.load_gguf_checkpoint(str(file))
    with fast_reading():
        assert gguf.GGUFReader is Reader
        assert legacy.load_gguf_checkpoint(str(file)) == expected
    assert expected["tokenizer"]["tokens"] == TOKENS
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_names_are_mapped_once_for_a_model_of_many_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=1, vocab_size=8, head_dim=8
    )
    model, built, build = LlamaForCausalLM(config), [], gguf.get_tensor_name_map
    expected = legacy.get_gguf_hf_weights_map(model, legacy.TensorProcessor())
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *what: built.append(what) or build(*what))
    with fast_reading():
        assert legacy.get_gguf_hf_weights_map(model, legacy.TensorProcessor()) == expected
    assert len(expected) > 36 and len(built) == 1


HEADER = "the header of the GGUF file cannot be read"
"""What is said of a file in which a number or a name is none."""


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_policy(str(file))
    assert refused.value.where == str(file)
    assert "incomplete or damaged" in (refused.value.hint or "") or HEADER not in refused.value.what
    return refused.value.what


@pytest.mark.parametrize("left", [10, 40, 3_000, 60_000], ids=["counts", "settings", "tokens", "scores"])
def test_a_file_that_ends_in_its_header_is_refused_in_words(tmp_path: Path, left: int) -> None:
    file = write(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:left])
    assert refusal(file) == HEADER


def test_of_a_file_that_ends_in_its_weights_it_is_said_how_long_it_should_be(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf")
    last = gguf.GGUFReader(file).tensors[-1]
    end = int(last.data_offset + last.n_bytes)
    file.write_bytes(file.read_bytes()[: end - 1])
    told = f"the GGUF file ends early: it has {end - 1:,} bytes, and its weights end at byte {end:,}"
    assert refusal(file) == told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (b"general.architecture", b"general.archiTecture", HEADER),
        (b"llama.context_length\4", b"llama.context_length\x7f", HEADER),
        (b"tokenizer.ggml.tokens\t\0\0\0\b\0\0\0", b"tokenizer.ggml.tokens\t\0\0\0\b\0\0\0\xff\xff\xff", HEADER),
        (b"first\2\0", b"first\xff\xff", HEADER),
        ("ä".encode(), b"\xff\xff", "the GGUF file has texts that are not UTF-8"),
        (b"GGUF\3", b"GGUF\4", "the package `gguf` does not read this version of GGUF files"),
    ],
)
def test_a_file_with_other_bytes_in_its_header_is_refused_in_words(
    tmp_path: Path, before: bytes, after: bytes, told: str
) -> None:
    file = write(tmp_path / "model.gguf")
    content = file.read_bytes()
    assert before in content
    place = content.index(before)
    file.write_bytes(content[:place] + after + content[place + len(after) :])
    assert refusal(file) == told
