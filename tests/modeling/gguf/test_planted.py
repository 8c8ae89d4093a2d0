"""Faults that converters have had, planted one at a time into what writes GGUF files: no export survives one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

import dpo_cli.modeling.policy as policies
from dpo_cli.modeling.gguf import transforms, writing
from dpo_cli.modeling.gguf.header import Header
from dpo_cli.modeling.gguf.tensors import FileTensors, Written
from dpo_cli.modeling.gguf.vocabulary import Vocabulary
from tests.builders import save_adapter
from tests.cli.in_process import call
from tests.modeling.gguf.test_reading_experts import random_model

_SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16384,
}  # fmt: skip
_LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "rope_parameters": _LLAMA_3}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12, "attn_logit_softcapping": 3.0,
         "final_logit_softcapping": 4.0},
    ),
    "experts": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "norm_topk_prob": True},
    ),
}  # fmt: skip
"""Models by name: a configuration's class in transformers, and what it is built with."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with all of them, and an adapter of one."""
    folder: Path = tmp_path_factory.mktemp("models")
    for name, (config, settings) in MODELS.items():
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        built: PretrainedConfig = getattr(transformers, config)(
            **_SMALL, **settings, **ends, pad_token_id=None, vocab_size=len(tokenizer)
        )
        random_model(built).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_adapter(folder / "linear", folder / "adapter")
    return folder


Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


def changes(change: Callable[[str, PretrainedConfig, torch.Tensor], torch.Tensor | None]) -> Plant:
    """Plant another change of weights, by their names in the file; None: it is as it should be."""

    def plant(patch: Patch) -> None:
        right = FileTensors._change

        def wrong(tensors: FileTensors, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
            def changed(weight: torch.Tensor) -> torch.Tensor:
                found = change(name, tensors._model.config, weight)
                return right(tensors, name)(weight) if found is None else found

            return changed

        patch.setattr(FileTensors, "_change", wrong)

    return plant


def tensors(change: Callable[[list[Written]], list[Written]]) -> Plant:
    """Plant another list of tensors."""

    def plant(patch: Patch) -> None:
        right = FileTensors._planned
        patch.setattr(FileTensors, "_planned", lambda planned: iter(change(list(right(planned)))))

    return plant


def said(change: Callable[[dict[str, Any]], object]) -> Plant:
    """Plant other settings."""

    def plant(patch: Patch) -> None:
        right = Header.of

        def wrong(*told: Any) -> Header:
            header = right(*told)
            change(header.settings)
            return header

        patch.setattr(Header, "of", wrong)

    return plant


def renamed(names: dict[str, str]) -> Plant:
    """Plant tensors whose names are exchanged, in part."""

    def rename(tensor: Written) -> Written:
        found = next((name for name in names if name in tensor.name), None)
        return replace(tensor, name=tensor.name.replace(found, names[found])) if found else tensor

    return tensors(lambda planned: [rename(tensor) for tensor in planned])


def without(end: str) -> Plant:
    return tensors(lambda planned: [tensor for tensor in planned if not tensor.name.endswith(end)])


def _head(planned: list[Written]) -> list[Written]:
    """Add a head to a model that has none of its own."""
    words = next(tensor for tensor in planned if tensor.name == "token_embd.weight")
    return [*planned, replace(words, name="output.weight", take=lambda: words.take().flip(0))]


def _exchanged(planned: list[Written]) -> Iterator[Written]:
    """Exchange two experts in one of the three stacks of a layer."""
    for tensor in planned:
        take = tensor.take
        wrong = tensor.name == "blk.1.ffn_up_exps.weight"
        yield replace(tensor, take=lambda take=take: take()[[1, 0, 2, 3]]) if wrong else tensor


def other_end(patch: Patch) -> None:
    right = Vocabulary.add_to

    def wrong(words: Vocabulary, writer: Any) -> None:
        right(replace(words, fields={**words.fields, "ggml.eos_token_id": 7}), writer)

    patch.setattr(Vocabulary, "add_to", wrong)


def merged_twice(patch: Patch) -> None:
    right = policies.merge_layers

    def wrong(model: torch.nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling = {name: 2 * scale for name, scale in layer.scaling.items()}
        right(model)

    patch.setattr(policies, "merge_layers", wrong)


_LOGPS = r"its log-probabilities differ by \S+ nats per token"


@dataclass(frozen=True)
class Fault:
    """A fault of a converter.

    Attributes:
        model: In which of the models it counts.
        plant: Plants it.
        said: What the error says.
    """

    model: str
    plant: Plant
    said: str = _LOGPS


FAULTS = {
    "queries and keys are not paired": Fault(
        "llama", changes(lambda name, _, weight: weight if "attn_q" in name or "attn_k" in name else None)
    ),
    "keys are paired with as many heads as queries": Fault(
        "llama",
        changes(lambda name, config, weight: transforms.pair_queries(weight, config) if "attn_k" in name else None),
    ),
    "norms are written without the one that is added to them": Fault(
        "gemma2", changes(lambda name, _, weight: weight if name.endswith("norm.weight") else None)
    ),
    "a matrix is transposed": Fault(
        "llama", changes(lambda name, _, weight: weight.T if name == "blk.0.attn_output.weight" else None)
    ),
    "gates and what they gate are exchanged": Fault("llama", renamed({"ffn_gate.": "ffn_up.", "ffn_up.": "ffn_gate."})),
    "two layers are exchanged": Fault("llama", renamed({"blk.0.": "blk.1.", "blk.1.": "blk.0."})),
    "a tied head is written with other weights": Fault("tied", tensors(_head), r"cannot say: tie_word_embeddings"),
    "biases are left out": Fault("llama", without(".bias"), "cannot say: attention_bias"),
    "a norm is left out": Fault("llama", without("blk.1.ffn_norm.weight"), "weights of 1 parameter are missing"),
    "two experts are exchanged": Fault("experts", tensors(lambda planned: list(_exchanged(planned)))),
    "gates and what they gate are exchanged in experts": Fault(
        "experts", renamed({"ffn_gate_exps.": "ffn_up_exps.", "ffn_up_exps.": "ffn_gate_exps."})
    ),
    "positions are not scaled": Fault(
        "linear", said(lambda settings: settings.pop("rope.scaling.factor")), "cannot say: rope_parameters"
    ),
    "the table of scaled positions is left out": Fault(
        "llama", without("rope_freqs.weight"), "cannot say: rope_parameters"
    ),
    "positions have another base": Fault(
        "tied", said(lambda settings: settings.update({"rope.freq_base": 5e5})), "cannot say: rope_parameters"
    ),
    "soft caps are left out": Fault(
        "gemma2", said(lambda settings: settings.pop("attn_logit_softcapping")), "cannot say: attn_logit_softcapping"
    ),
    "the window is left out": Fault(
        "gemma2", said(lambda settings: settings.pop("attention.sliding_window")), "cannot say: sliding_window"
    ),
    "the number of experts that are chosen is another": Fault(
        "experts", said(lambda settings: settings.update(expert_used_count=1)), "cannot say: num_experts_per_tok"
    ),
    "texts end at another token": Fault("tied", other_end, "the eos token is 2, and in what was written 7"),
    "an adapter is merged twice": Fault("adapter", merged_twice),
}  # fmt: skip
"""By what is wrong."""


def exported(models: Path, model: str, capfd: Any) -> tuple[int, str]:
    """Export a model as a GGUF file; return the exit status, and what was reported in one line."""
    merge = "--merge " if model == "adapter" else ""
    status = call(f"export {models}/{model} {merge}--gguf f16 --to out --quiet")
    return status, " ".join(capfd.readouterr().err.split())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("model", [*MODELS, "adapter"])
def test_without_a_fault_a_file_is_written(models: Path, capfd: Any, model: str) -> None:
    assert exported(models, model, capfd)[0] == 0
    assert [file.suffix for file in Path("out").iterdir()].count(".gguf") == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_converter_survives_the_export(models: Path, capfd: Any, monkeypatch: Patch, fault: str) -> None:
    FAULTS[fault].plant(monkeypatch)
    status, told = exported(models, FAULTS[fault].model, capfd)
    assert status == 1, told
    assert re.search(FAULTS[fault].said, told), told
    assert not list(Path.cwd().iterdir())


BY_SETTINGS = [fault for fault, planted in FAULTS.items() if "cannot say" in planted.said]


@pytest.mark.slow
@pytest.mark.parametrize("fault", BY_SETTINGS)
def test_what_settings_show_log_probabilities_show_as_well(
    models: Path, capfd: Any, monkeypatch: Patch, fault: str
) -> None:
    """Were the settings of a file not read back, what is computed would still be another."""
    monkeypatch.setattr(writing, "read_back", lambda *_: [])
    FAULTS[fault].plant(monkeypatch)
    status, told = exported(models, FAULTS[fault].model, capfd)
    assert status == 1, told
    assert re.search(_LOGPS, told), told
