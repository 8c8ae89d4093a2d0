"""llama.cpp reads what is written as transformers does: `make test-llama` installs its package and runs these tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build

from dpo_cli.errors import UserError
from dpo_cli.evaluation.agreement import Difference
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.generation import greedy_answers
from dpo_cli.modeling.gguf.activations import rounded_logps
from dpo_cli.modeling.gguf.llama_cpp import LlamaCpp, available, opened
from dpo_cli.modeling.gguf.types import GgufType
from dpo_cli.modeling.gguf.vocabulary import add_vocabulary
from dpo_cli.modeling.gguf.writing import write_gguf
from dpo_cli.modeling.policy import Policy

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.program,
    pytest.mark.skipif(not available(), reason="the package llama-cpp-python is not installed"),
]

WRITTEN: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": None}}
"""Kinds of tiny models that are written, each with the settings that a file has words for."""


def tiny(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """Build a tiny model with a tokenizer's words."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    return build(kind, vocab_size=len(tokenizer), **special, **WRITTEN[kind], **changes)


def written(model: Any, file: Path, kind: GgufType, tokenizer: Any) -> Path:
    """Write a model as a GGUF file."""

    def add_words(writer: Any) -> None:
        add_vocabulary(writer, tokenizer, model.config.vocab_size, [tokenizer.eos_token_id])

    write_gguf(model, file, kind, "tiny", add_words)
    return file


def sequences(rows: list[dict[str, str]], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return prompts and responses of some pairs, as tokens."""
    found = []
    for row in rows:
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)[-64:]
        for name in ("chosen", "rejected"):
            found.append((prompt, [*tokenizer(row[name]).input_ids[:48], tokenizer.eos_token_id]))
    return found


def apart(reader: LlamaCpp, policy: Policy, kind: GgufType, texts: list[tuple[list[int], list[int]]]) -> Difference:
    """Compare llama.cpp with transformers, of which activations are rounded for a type."""
    theirs = {at: reader.logps(*text) for at, text in enumerate(texts)}
    return Difference.between({at: rounded_logps(policy, kind, *text) for at, text in enumerate(texts)}, theirs)


@pytest.mark.parametrize("kind", WRITTEN)
def test_llama_cpp_reads_what_transformers_reads(
    tmp_path: Path, tokenizer: Any, demo_rows: list[dict[str, str]], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In float32 both give the same log-probabilities, but for tables of 16 bits in some of llama.cpp's functions."""
    texts = sequences(demo_rows[:4], tokenizer)
    file = written(tiny(kind, tokenizer), tmp_path / "model.gguf", "f32", tokenizer)
    policy = Policy(load_policy(str(file)).eval())
    with opened(file, 256) as reader:
        found = apart(reader, policy, "f32", texts)
        prompts = [prompt for prompt, _ in texts[::2]]
        answers = [reader.greedy(prompt, [tokenizer.eos_token_id], 16) for prompt in prompts]
        assert tokenizer.eos_token_id in reader.ends()
        for row in demo_rows[:4]:
            assert reader.tokens(row["chosen"]) == tokenizer(row["chosen"]).input_ids
    assert found.largest < 2e-2
    assert found.mean < 2e-3
    assert answers == greedy_answers(policy, prompts, [tokenizer.eos_token_id], 16)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_rounding_activations_explains_what_llama_cpp_computes_otherwise(
    tmp_path: Path, tokenizer: Any, demo_rows: list[dict[str, str]], kind: GgufType
) -> None:
    """Else a difference would tell nothing: that of 8 bits is as large as that of a wrong model."""
    texts = sequences(demo_rows[:4], tokenizer)
    file = written(tiny("llama", tokenizer), tmp_path / "model.gguf", kind, tokenizer)
    policy = Policy(load_policy(str(file)).eval())
    with opened(file, 256) as reader:
        without, explained = apart(reader, policy, "f32", texts), apart(reader, policy, kind, texts)
    assert explained.mean < 0.2 * without.mean


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"GGUF", "failed to read header"), (b"no file of this kind", "invalid magic"), (None, "not exist")],
)
def test_a_file_that_llama_cpp_cannot_open_is_an_error(
    tmp_path: Path, content: bytes | None, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"llama.cpp cannot read the file.*{reason}") as found, opened(file, 16):
        pass
    assert found.value.where == str(file)
    assert capfd.readouterr() == ("", "")


def test_a_token_that_the_file_does_not_have_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    file = written(tiny("llama", tokenizer), tmp_path / "model.gguf", "f16", tokenizer)
    with opened(file, 16) as reader, pytest.raises(UserError, match="invalid token"):
        reader.logps([len(tokenizer)], [1])


def test_a_crash_of_llama_cpp_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    file = written(tiny("llama", tokenizer), tmp_path / "model.gguf", "f16", tokenizer)
    with opened(file, 16) as reader:
        os.kill(reader.worker.pid, signal.SIGSEGV)
        with pytest.raises(UserError, match="ended while it read the file: signal SIGSEGV") as found:
            reader.tokens("a")
    assert found.value.where == str(file)


def test_its_process_ends_with_the_context(tmp_path: Path, tokenizer: Any) -> None:
    file = written(tiny("llama", tokenizer), tmp_path / "model.gguf", "f16", tokenizer)
    with opened(file, 16) as reader:
        assert reader.worker.poll() is None
    assert reader.worker.returncode is not None
