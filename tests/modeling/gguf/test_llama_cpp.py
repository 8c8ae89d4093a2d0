"""llama.cpp reads what is written as transformers does: `make test-llama` installs its package and runs these tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dpo_cli import export
from dpo_cli.errors import UserError
from dpo_cli.evaluation.agreement import Difference
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.generation import greedy_answers
from dpo_cli.modeling.gguf.activations import rounded_logps
from dpo_cli.modeling.gguf.llama_cpp import LlamaCpp, available, opened
from dpo_cli.modeling.gguf.types import GgufType
from dpo_cli.modeling.gguf.vocabulary import Vocabulary
from dpo_cli.modeling.gguf.writing import write_gguf
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.export_answers import ANSWER_TOKENS
from dpo_cli.pipeline.export_facts import Facts, question_tokens
from dpo_cli.pipeline.export_llama_cpp import ByTransformers, allowed_beside, read_by_llama_cpp
from dpo_cli.pipeline.export_proof import OnTokens, Said
from dpo_cli.reporting.console import Console
from tests.conftest import GGUF

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.program,
    pytest.mark.skipif(not available(), reason="the package llama-cpp-python is not installed"),
]

_NO_WINDOW = {"sliding_window": None}
WRITTEN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _NO_WINDOW,
    "qwen2": {**_NO_WINDOW, "use_sliding_window": False, "layer_types": None},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {
        "query_pre_attn_scalar": 8, "final_logit_softcapping": None, "layer_types": None, "num_hidden_layers": 6,
        "sliding_window": 8,
    },
    "phi3": _NO_WINDOW,
    "starcoder2": _NO_WINDOW,
    "stablelm": {"qk_layernorm": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False},
    "falcon": {},
    "bloom": {},
}  # fmt: skip
"""Kinds of tiny models that are written, each with the settings that a file has words for."""


def tiny(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """Build a tiny model with a tokenizer's words."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    return build(kind, vocab_size=len(tokenizer), **{**special, **WRITTEN[kind], **changes})


def written(model: Any, file: Path, kind: GgufType, tokenizer: Any) -> Path:
    """Write a model as a GGUF file."""
    words = Vocabulary.of(tokenizer, model.config.vocab_size, [tokenizer.eos_token_id])
    write_gguf(model, file, kind, "tiny", words.add_to)
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


def _no_caps(model: Any) -> None:
    model.config.attn_logit_softcapping = 1000.0


def _no_window(model: Any) -> None:
    model.config.sliding_window = 4096


def _another_base(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 100.0}


def _no_scaling(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}


def _transposed(model: Any) -> None:
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.T.clone()


def _layers_exchanged(model: Any) -> None:
    one, other = (layer.mlp.down_proj.weight for layer in model.model.layers[:2])
    one.data, other.data = other.data, one.data


def _norms_from_one(model: Any) -> None:
    model.model.norm.weight.data += 1


def _merged_twice(model: Any) -> None:
    chance = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight):
            down, up = (torch.randn(4, size, generator=chance) for size in (weight.shape[1], weight.shape[0]))
            weight.data += 0.1 * up.T @ down


_LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
FAULTS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None]]] = {
    "a weight transposed": ("llama", {}, _transposed),
    "layers exchanged": ("llama", {}, _layers_exchanged),
    "an adapter merged twice": ("llama", {}, _merged_twice),
    "norms from one": ("gemma2", {}, _norms_from_one),
    "another base of the positions": ("qwen3", {}, _another_base),
    "no scale of the positions": ("llama", _LINEAR, _no_scaling),
    "no soft cap": ("gemma2", {}, _no_caps),
    "no window": ("gemma2", {}, _no_window),
}
"""What a file may have wrong: a kind of model, its settings, and what is done to it before it is written."""


def read_by_both(
    right: Path, file: Path, kind: GgufType, tokenizer: Any, rows: list[dict[str, str]], stops: Iterable[int]
) -> Any:
    """Let transformers read one file, and llama.cpp another, as an export lets them read the same."""
    policy = Policy(load_policy(str(right)).eval())
    prompts = [prompt for prompt, _ in sequences(rows[:4], tokenizer)[::2]]
    proof = OnTokens(cast("Any", None), prompts)
    texts = proof.sequences(policy)[0]
    logps = torch.cat([rounded_logps(policy, "f32", one.prompt, one.response) for one in texts])
    said = Said({}, {0: logps}, torch.zeros(0), greedy_answers(policy, prompts, stops, ANSWER_TOKENS))
    settings = GenerationConfig(eos_token_id=sorted(stops))
    facts = Facts.of(tokenizer, settings, [row["chosen"] for row in rows[:4]], chats_alone=True)
    other = ByTransformers(policy, said, tokenizer, facts)
    return read_by_llama_cpp(file, kind, other, proof, Console(quiet=True), "--to out")


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_which_llama_cpp_reads_another_model_is_refused(
    tmp_path: Path, tokenizer: Any, demo_rows: list[dict[str, str]], fault: str, kind: GgufType
) -> None:
    name, settings, spoil = FAULTS[fault]
    right = written(tiny(name, tokenizer, **settings), tmp_path / "right.gguf", kind, tokenizer)
    spoil(model := tiny(name, tokenizer, **settings))
    wrong = written(model, tmp_path / "wrong.gguf", kind, tokenizer)
    stops = [tokenizer.eos_token_id]
    found = read_by_both(right, right, kind, tokenizer, demo_rows, stops)
    allowed = allowed_beside(found.explained)
    # Else one of the bounds would be too close to what is right.
    assert 1.5 * found.apart.mean < allowed.mean
    assert 1.5 * found.apart.largest < allowed.largest
    with pytest.raises(UserError, match=r"as llama.cpp reads it, another model.*nats") as refused:
        read_by_both(right, wrong, kind, tokenizer, demo_rows, stops)
    assert refused.value.where == "--to out"


def test_a_file_that_does_not_end_texts_where_the_model_does_is_refused(
    tmp_path: Path, tokenizer: Any, demo_rows: list[dict[str, str]]
) -> None:
    file = written(tiny("llama", tokenizer), tmp_path / "model.gguf", "f16", tokenizer)
    with pytest.raises(UserError, match=r"texts end at the tokens 7 too, where llama.cpp goes on"):
        read_by_both(file, file, "f16", tokenizer, demo_rows, [7])


def test_a_file_with_other_words_is_refused(tmp_path: Path, tokenizer: Any, demo_rows: list[dict[str, str]]) -> None:
    right = written(tiny("llama", tokenizer), tmp_path / "right.gguf", "f16", tokenizer)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"] = described["model"]["merges"][:-20]
    fewer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    wrong = written(tiny("llama", tokenizer), tmp_path / "wrong.gguf", "f16", fewer)
    with pytest.raises(UserError, match=r"the tokens of .* are others from the .* on"):
        read_by_both(right, wrong, "f16", tokenizer, demo_rows, [tokenizer.eos_token_id])


def test_an_export_that_llama_cpp_reads_otherwise_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp leaves the windows of Phi-3 out, whatever a file says, and transformers does not."""
    model = build("phi3", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"as llama.cpp reads it, another model than transformers reads"):
        export("model", "out", gguf="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.real_model
@pytest.mark.slow
def test_the_real_model_answers_the_same_in_llama_cpp_and_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported in float16: the first tokens of ten answers, the prompts of its template, and where answers end."""
    monkeypatch.chdir(tmp_path)
    found = export(GGUF, "out", gguf="f16")
    assert found["answers of llama.cpp"] == {"compared": 10, "alike": 10}
    (file,) = Path("out").glob("*.gguf")
    policy, tokenizer = Policy(load_policy(str(file)).eval()), load_tokenizer(str(file))
    stops = [tokenizer.eos_token_id]
    prompts = question_tokens(tokenizer)
    with opened(file, 256) as reader:
        answers = [reader.greedy(prompt, stops, 32) for prompt in prompts]
    assert answers == greedy_answers(policy, prompts, stops, 32)
    assert sum(len(answer.tokens) for answer in answers) > 100


def test_a_chat_in_llama_cpp_has_the_prompt_of_the_models_own_template(tmp_path: Path, tokenizer: Any) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    file = written(tiny("llama", tokenizer), tmp_path / "model.gguf", "f16", tokenizer)
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What's 2 + 2?\n\nZürich? "},
        {"role": "assistant", "content": "4."}, {"role": "user", "content": "And 3 + 3?"},
    ]  # fmt: skip
    with contextlib.closing(llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False)) as model:
        used = model.create_chat_completion(turns, max_tokens=1, temperature=0.0)["usage"]["prompt_tokens"]
        prompt = list(model.eval_tokens)[:used]
    assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


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
