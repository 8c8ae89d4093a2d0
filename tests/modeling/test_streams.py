"""Tensors are written one at a time, as safetensors writes them all at once."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.folders.saved_weights import SavedWeights
from dpo_cli.modeling.folders.saving import origin_of
from dpo_cli.modeling.folders.shard_files import Piece, write_part
from dpo_cli.modeling.folders.streams import NAMES, save_tensors
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.held import Bfloat16, Float32, Held, Nf4, Split
from dpo_cli.modeling.policy import Policy
from dpo_cli.system.storage import heartbeats
from scripts.tiny_models import build


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_has_the_bytes_that_safetensors_gives_it(tmp_path: Path, metadata: Any) -> None:
    shapes = [(), (0,), (3,), (2, 5), (1, 2, 3)]
    tensors = {
        f"ö{place}.{dtype}": (10 * torch.randn(shape)).to(dtype)
        for dtype in NAMES
        for place, shape in enumerate(shapes)
    }
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    save_tensors(tensors, tmp_path / "ours", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).t()
    save_tensors({"a": turned}, tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["a"], turned)


@pytest.mark.parametrize("sizes", [[10_500], [400] * 26, [0, 999, 1, 3000, 0, 6500]], ids=str)
def test_a_process_shows_that_it_gets_on_while_a_file_is_written(tmp_path: Path, monkeypatch: Any, sizes: Any) -> None:
    """The disk has little to flush at a time, whether one tensor is large or many are small."""
    monkeypatch.setattr("dpo_cli.system.storage._FLUSHED_BYTES", 1000)
    flushed, flush = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_size), flush(file)))
    tensors = {str(place): torch.arange(size).to(torch.uint8) for place, size in enumerate(sizes)}
    before = heartbeats()
    save_tensors(tensors, tmp_path / "ours")
    assert heartbeats() - before == len(flushed) == sum(sizes) // 1000
    assert {end - start for start, end in itertools.pairwise(flushed)} == {1000}
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_are_flushed_while_they_are_written_as_well(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("dpo_cli.system.storage._FLUSHED_BYTES", 1000)
    rows = torch.arange(2500.0).view(50, 50)
    before = heartbeats()
    write_part(tmp_path, "weights", {"one": Piece(rows, 0, (50, 50), (50, 50), True)}, 0, 1)
    # The file itself and its folder are flushed at the end.
    assert heartbeats() - before == 10 + 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_neox"])
def test_a_model_is_written_with_the_bytes_that_transformers_gives_it(tmp_path: Path, kind: str) -> None:
    """Experts, which it holds together and saves apart, included."""
    model = build(kind)
    model.save_pretrained(tmp_path / "theirs")
    model.config.save_pretrained(tmp_path / "ours")
    SavedWeights(model).write(tmp_path / "ours")
    file = "model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    SavedWeights(model).check(tmp_path / "ours")


def test_a_large_model_is_written_into_the_files_that_transformers_makes(tmp_path: Path, monkeypatch: Any) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    monkeypatch.setattr("dpo_cli.modeling.folders.saved_weights.LARGEST_BYTES", 40_000)
    model.config.save_pretrained(tmp_path / "ours")
    SavedWeights(model).write(tmp_path / "ours")
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").glob("model*")}
    assert len(theirs) > 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").glob("model*")} == theirs
    SavedWeights(model).check(tmp_path / "ours")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "gpt2"])
def test_weights_are_written_over_those_that_are_there(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    saved = build(kind)
    saved.save_pretrained(tmp_path)
    model = Policy.load(str(tmp_path)).model
    parameters = {name: (id(one), one.data_ptr()) for name, one in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    Policy(model).weights.restore(tmp_path)
    assert {name: (id(one), one.data_ptr()) for name, one in model.named_parameters()} == parameters
    expected = saved.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "further", "shape"])
def test_weights_of_another_model_are_refused(tmp_path: Path, fault: str) -> None:
    build("llama").save_pretrained(tmp_path)
    policy = Policy.load(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    first = min(weights)
    one = weights.pop(first)
    if fault != "missing":
        weights |= {first: one, "further": one.clone()} if fault == "further" else {first: one[:-1].contiguous()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as refused:
        policy.weights.restore(tmp_path)
    assert "--overwrite" in refused.value.hint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tiny_llama", "mixtral"])
def test_weights_are_rounded_once_to_the_type_that_they_came_in(
    tmp_path: Path, tiny_llama: Path, dtype: torch.dtype, kind: str
) -> None:
    source, tokenizer = tmp_path / "source", load_tokenizer(str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama) if kind == "tiny_llama" else build(kind)
    model.to(dtype).save_pretrained(source)
    policy = Policy.load(str(source))
    with torch.no_grad():
        for weights in policy.weights.trained():
            weights += 0.01 * torch.randn_like(weights)
    expected = {name: tensor.to(dtype) for name, tensor in policy.model.state_dict().items()}
    folder = tmp_path / "final"
    folder.mkdir()
    policy.weights.write(folder, tokenizer, types=origin_of(policy.model).types)
    policy.weights.check_written(folder, types=origin_of(policy.model).types)
    size = (source / "model.safetensors").stat().st_size
    assert (folder / "model.safetensors").stat().st_size == size
    assert AutoConfig.from_pretrained(folder).dtype == dtype
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    # Those in memory are as they were.
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.parameters())


def test_each_weight_keeps_the_type_that_it_came_in(tmp_path: Path, tiny_llama: Path) -> None:
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    types = {name: torch.bfloat16 if "mlp" in name else torch.float32 for name in weights}
    mixed = {name: tensor.to(types[name]) for name, tensor in weights.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    policy, folder = Policy.load(str(source)), tmp_path / "final"
    assert origin_of(policy.model).types == WeightTypes.of_files(source)
    folder.mkdir()
    policy.weights.write(folder, load_tokenizer(str(tiny_llama)), types=origin_of(policy.model).types)
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert load_policy(str(folder)).config.vocab_size == policy.vocabulary


@pytest.mark.parametrize("held", [Float32(), Bfloat16(), Split(), Nf4()])
def test_weights_go_to_a_gpu_without_a_copy_of_all_on_the_host(held: Held, tiny_llama: Path) -> None:
    sketch = Policy.empty(str(tiny_llama)).model
    assert held.loaded_as(sketch, "cuda:0")["device_map"] == {"": torch.device("cuda:0")}
    assert held.loaded_on("cuda:0") == torch.device("cuda:0")
    assert "device_map" not in Float32().loaded_as(sketch, "cpu")
    # Half of each stays on the host.
    assert "device_map" not in Split(low_on_host=True).loaded_as(sketch, "cuda:0")
