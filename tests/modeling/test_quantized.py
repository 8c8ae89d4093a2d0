"""Layers of few bits a weight: what they hold, what they compute, and what their library must not do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.digests import weights_digest
from dpo_cli.modeling.folders.loading import empty_policy, load_onto_shards, load_policy
from dpo_cli.modeling.folders.model_files import NO_TRUST, WEIGHTS
from dpo_cli.modeling.folders.shard_files import Piece, write_list, write_part
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.held import FLOAT32, QUANTIZED, Held, held_as
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.quantized_layers import quantized_layers
from dpo_cli.modeling.shards import _materialize
from tests.modeling.gguf.test_reading import llama, tensors_of, write

TRIES_KERNELS = """
import sys
import torch
from dpo_cli.modeling.extras import import_bitsandbytes
import_bitsandbytes()
import peft.tuners.lora.bnb
assert "bitsandbytes" in sys.modules
import kernels
print(kernels.__name__)
"""


@pytest.mark.program
def test_no_kernel_of_others_is_asked_for_and_nothing_is_printed(tmp_path: Path) -> None:
    # On some CPUs bitsandbytes downloads code as it is imported, if it finds this package.
    asked = tmp_path / "asked"
    (tmp_path / "kernels.py").write_text(f"def get_kernel(*a, **b):\n    open({str(asked)!r}, 'w').close()\n")
    done = subprocess.run(
        [sys.executable, "-c", TRIES_KERNELS],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("kernels\n", "")
    assert not asked.exists()


def held_policy(model: Path, held: Held, **adapter: Any) -> Policy:
    """Load a model with an adapter that is not zero."""
    policy = Policy.load(str(model), trained=Adapted(Lora(**adapter)), held=held)
    with torch.no_grad():
        for name, weights in policy.weights.tensors().items():
            if "lora_B" in name:
                weights.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_on_paper_are_those_in_memory(kind: str, dtype: str, tiny_llama: Path) -> None:
    held, adapter = held_as(kind, dtype), Adapted(Lora())
    plain = Policy.load(str(tiny_llama), trained=adapter).sizes()
    sketch = Policy.empty(str(tiny_llama), trained=adapter, held=held).sizes()
    policy = Policy.load(str(tiny_llama), trained=adapter, held=held)
    loaded = policy.sizes()
    assert sketch.held == pytest.approx(held_in_memory(policy.model), rel=0.01)
    assert loaded.held == pytest.approx(held_in_memory(policy.model), rel=0.01)
    assert (sketch.numbers, loaded.numbers) == (plain.numbers, plain.numbers)
    assert (sketch.present, loaded.present) == (0, loaded.held)
    assert sketch.trained == loaded.trained == plain.trained


def held_in_memory(model: PreTrainedModel) -> int:
    """Return the bytes of every tensor that can be reached from a model but its buffers, each storage once."""
    buffers = {id(buffer) for buffer in model.buffers()}
    found: dict[int, int] = {}
    waiting: list[Any] = list(model.modules())
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or id(one) in buffers:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        if isinstance(one, dict):
            waiting += one.values()
        elif hasattr(one, "__dict__"):
            waiting += [value for value in vars(one).values() if not isinstance(value, type)]
    return sum(found.values())


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_copy_shares_all_that_does_not_train(kind: str, tiny_llama: Path) -> None:
    policy = held_policy(tiny_llama, held_as(kind, "float32"))
    before = held_in_memory(policy.model)
    other = policy.frozen_copy()
    both = held_in_memory(torch.nn.ModuleList([policy.model, other.model]))
    assert both - before == sum(weights.nbytes for weights in policy.weights.tensors().values())


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_the_dequantized_model(kind: str, dora: bool, tiny_llama: Path) -> None:
    policy = held_policy(tiny_llama, held_as(kind, "float32"), dora=dora)
    plain = held_policy(tiny_llama, FLOAT32, dora=dora)
    for name, layer in quantized_layers(policy.model).items():
        plain.model.get_submodule(name).weight.data = dequantize_bnb_weight(layer.weight, layer.__dict__.get("state"))
    plain.weights.set_tensors(policy.weights.tensors())
    ids = torch.arange(40).reshape(2, 20)
    # A pass without gradient must not change what the next one computes.
    with torch.no_grad():
        first = policy.model(ids).logits
    results = [one.model(ids).logits for one in (policy, plain)]
    assert torch.equal(first, results[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    for logits in results:
        logits.log_softmax(-1)[..., 3].sum().backward()
    ours, expected = policy.model.named_parameters(), dict(plain.model.named_parameters())
    gradients = {name: weights.grad for name, weights in ours if weights.requires_grad}
    assert [*gradients] == [*policy.weights.tensors()]
    for name, gradient in gradients.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_token_does_not_depend_on_what_it_is_batched_with(kind: str, tiny_llama: Path) -> None:
    policy = held_policy(tiny_llama, held_as(kind, "float32"))
    # One token whose activations are large, as those of some tokens of real models are.
    policy.model.get_input_embeddings().weight.data[7] *= 200
    ids = torch.tensor([[1, 2, 3, 4, 5], [7, 7, 7, 7, 7]])
    with torch.no_grad():
        together, alone = policy.model(ids).logits[0], policy.model(ids[:1]).logits[0]
    assert (together.log_softmax(-1) - alone.log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", QUANTIZED)
def test_identity_is_the_bases_whatever_the_adapter_and_the_passes_are(kind: str, tiny_llama: Path) -> None:
    held = held_as(kind, "float32")
    policies = [
        Policy.load(str(tiny_llama), trained=Adapted(Lora(rank=rank), seed), held=held)
        for rank, seed in ((4, 1), (8, 2))
    ]
    before = weights_digest(Policy.load(str(tiny_llama), held=held).frozen().model)
    with torch.no_grad():
        policies[1].model(torch.arange(20)[None])
    assert policies[0].identity == policies[1].identity == before
    assert before != Policy.load(str(tiny_llama), held=FLOAT32).identity


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_built_is_quantized_as_what_is_loaded(kind: str, dtype: str, tiny_llama: Path) -> None:
    held = held_as(kind, dtype)
    built = held.take_over(load_policy(str(tiny_llama), held=held_as(dtype, dtype)), "cpu")
    assert weights_digest(built) == weights_digest(load_policy(str(tiny_llama), held=held))


def llama_folder(tmp_path: Path, tiny_llama: Path) -> Path:
    return tiny_llama


def gpt2_folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A model whose files have matrices transposed."""
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=300, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return tmp_path


def folder_of_shards(tmp_path: Path, tiny_llama: Path) -> Path:
    """A checkpoint of two processes."""
    shutil.copy(tiny_llama / "config.json", tmp_path)
    pieces: list[dict[str, Piece]] = [{}, {}]
    for name, whole in load_file(tiny_llama / "model.safetensors").items():
        half = len(whole) // 2
        for number, (first, end) in enumerate(((0, half), (half, len(whole)))):
            pieces[number][name] = Piece(whole[first:end], first, whole.shape, (end - first, *whole.shape[1:]), True)
    parts = [write_part(tmp_path, WEIGHTS, one, number, 2) for number, one in enumerate(pieces)]
    write_list(tmp_path, [part for part in parts if part], 2)
    return tmp_path


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("folder", [llama_folder, gpt2_folder, folder_of_shards])
def test_what_is_read_onto_shards_has_the_bits_and_scales_that_it_has_as_a_whole(
    folder: Callable[[Path, Path], Path], kind: str, tmp_path: Path, tiny_llama: Path
) -> None:
    name, held, read = str(folder(tmp_path, tiny_llama)), held_as(kind, "bfloat16"), []

    def lay_out(model: PreTrainedModel) -> Callable[[str], str | None]:
        # One process has all rows.
        _materialize(model, torch.device("cpu"))
        read.append(model)
        return str

    load_onto_shards(name, NO_TRUST, held, lay_out)
    whole = load_policy(name, held=held)
    assert weights_digest(read[0]) == weights_digest(whole)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(read[0](ids).logits, whole(ids).logits)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_without_weights_an_adapter_has_the_shapes_that_it_has_with_them(
    kind: str, dora: bool, tiny_llama: Path
) -> None:
    how: Any = {"trained": Adapted(Lora(dora=dora)), "held": held_as(kind, "float32")}
    shapes = Policy.empty(str(tiny_llama), **how).weights.shapes()
    assert shapes == Policy.load(str(tiny_llama), **how).weights.shapes()
    assert len(shapes) == 2 * 7 * (2 + dora)


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DPO_CACHE_DIR", str(cache))
    return cache


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_gguf_file_is_quantized_from_its_own_weights_and_none_are_written(
    kind: str, tmp_path: Path, tokenizer: Any, small_cache: Path
) -> None:
    folder, held = llama(tmp_path / "model", tokenizer), held_as(kind, "float32")
    file = write(tmp_path / "model.gguf", folder, tensors_of(folder))
    assert load_tokenizer(str(file)).get_vocab() == tokenizer.get_vocab()
    sketch, model = empty_policy(str(file), held=held), load_policy(str(file), held=held)
    assert not [path for path in small_cache.rglob("*") if path.suffix in (".safetensors", ".bin", ".gguf")]
    assert held.bytes_of(sketch) == pytest.approx(held.bytes_of(model), rel=0.01)
    whole = load_policy(str(file))
    assert weights_digest(model) == weights_digest(load_policy(whole.name_or_path, held=held))


def test_a_gguf_file_that_lacks_weights_is_refused_where_it_is_quantized(
    tmp_path: Path, tokenizer: Any, small_cache: Path
) -> None:
    folder = llama(tmp_path / "model", tokenizer)
    tensors = {name: array for name, array in tensors_of(folder).items() if name != "blk.1.ffn_up.weight"}
    file = write(tmp_path / "model.gguf", folder, tensors)
    with pytest.raises(UserError, match="missing"):
        load_policy(str(file), held=held_as("nf4", "float32"))


def test_a_quantized_model_stays_refused_where_it_is_to_be_quantized_again(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="quantized"):
        load_policy(str(folder), held=held_as("nf4", "float32"))


def test_a_model_whose_layers_are_of_other_kinds_is_refused_before_its_weights_are_read(
    tmp_path: Path, tokenizer: Any
) -> None:
    # Falcon has linear layers of a class of its own.
    config = FalconConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="FalconForCausalLM has no linear layers that bitsandbytes knows"):
        empty_policy(str(tmp_path), held=held_as("nf4", "float32"))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize(("dtype", "dora"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_a_fresh_adapter_changes_nothing(dtype: str, kind: str, dora: bool, tiny_llama: Path) -> None:
    model, ids = load_policy(str(tiny_llama), held=held_as(kind, dtype)), torch.arange(40).reshape(2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        base = model(ids).logits
        adapter = Adapted(Lora(dora=dora)).choose(model)
        assert torch.equal(model(ids).logits, base)
        with adapter.at_beginning():
            assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_dora_is_refused_where_it_would_not_be_its_base(kind: str, tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="DoRA's norms"):
        Policy.empty(str(tiny_llama), trained=Adapted(Lora(dora=True)), held=held_as(kind, "bfloat16"))
