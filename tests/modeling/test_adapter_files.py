"""What PEFT saves is read as it is; what cannot be put into a base exactly is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_name, read_adapter, read_start
from tests.builders import save_adapter

LAYERS = {f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qv"}


def of_two(base: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter of two of the layers of each block."""
    return save_adapter(base, folder, **{"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8, **settings})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return of_two(tiny_llama, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def says(**settings: Any) -> Callable[[Path], object]:
    """Change what the folder says of itself."""

    def change(folder: Path) -> None:
        file = folder / ADAPTER_CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def weighs(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Change the tensors of the folder."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return write


def named(ending: str, tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith(ending))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "rank": 3, "lora_alpha": 5}])
def test_what_peft_saves_is_read_as_it_is(tiny_llama, tmp_path, settings):
    found = read_adapter(of_two(tiny_llama, tmp_path, **settings))

    assert (found.rank, found.alpha) == (settings.get("rank", 4), settings.get("lora_alpha", 8))
    assert (found.dora, found.rslora) == (settings.get("use_dora", False), settings.get("use_rslora", False))
    assert found.targets == ("q_proj", "v_proj")
    assert set(found.layers) == LAYERS
    assert base_name(found) == str(tiny_llama)
    assert found.shapes == {name: tuple(one.shape) for name, one in load_file(tmp_path / ADAPTER_WEIGHTS).items()}


def test_a_pattern_stays_one_and_left_out_layers_are_named_by_those_that_are_left(tiny_llama, tmp_path):
    pattern = read_adapter(of_two(tiny_llama, tmp_path / "a", target_modules=r".*\.(q|v)_proj"))
    first = read_adapter(of_two(tiny_llama, tmp_path / "b", layers_to_transform=[0]))

    assert pattern.targets == r".*\.(q|v)_proj"
    assert set(pattern.layers) == LAYERS
    assert set(first.targets) == set(first.layers) == {name for name in LAYERS if ".0." in name}


def test_training_cannot_go_on_where_ranks_or_alphas_differ_from_layer_to_layer(tiny_llama, tmp_path):
    for name in ("rank_pattern", "alpha_pattern"):
        folder = of_two(tiny_llama, tmp_path / name, **{name: {"q_proj": 2}})
        assert len(read_adapter(folder).layers) == 4
        with pytest.raises(UserError, match=f"not all of its layers are alike .`{name}`"):
            read_start(str(folder), "`adapter.start`")
    assert read_start(str(of_two(tiny_llama, tmp_path / "c")), "`adapter.start`").rank == 4


REFUSED = {
    "a whole layer beside it": (says(modules_to_save=["lm_head"]), r"trained as a whole \(`modules_to_save`\)"),
    "parameters": (says(target_parameters=["experts.gate_up"]), r"`target_parameters`"),
    "tokens": (says(trainable_token_indices=[1, 2]), r"embeddings of tokens"),
    "biases of the base": (says(bias="all"), r"`bias: all`"),
    "another kind": (says(peft_type="IA3"), r"of the type 'IA3', and only LORA"),
    "no kind": (says(peft_type=None), r"of the type null"),
    "PiSSA": (says(init_lora_weights="pissa_niter_4"), r"base that was changed .*pissa_niter_4"),
    "LoftQ": (says(init_lora_weights="loftq"), r"base that was changed"),
    "an unknown beginning": (says(init_lora_weights="someday"), r"`init_lora_weights: someday`"),
    "rank of text": (says(r="4"), r"`r` .* should be a whole number above 0, but is '4'"),
    "rank of nothing": (says(r=0), r"`r` .* but is 0"),
    "alpha NaN": (says(lora_alpha=float("nan")), r"`lora_alpha` .* but is nan"),
    "alpha true": (says(lora_alpha=True), r"`lora_alpha` .* but is True"),
    "DoRA of text": (says(use_dora="yes"), r"`use_dora` .* should be true or false"),
    "no targets": (says(target_modules=None), r"`target_modules` .* but is null"),
    "base a number": (says(base_model_name_or_path=3), r"`base_model_name_or_path` .* should be text"),
    "another rank than said": (says(r=8), r"shapes \[4, 32\] and \[\d+, 4\], but the rank is 8"),
    "DoRA without magnitudes": (says(use_dora=True), r"magnitude_vector differ"),
    "settings cut": (lambda folder: (folder / ADAPTER_CONFIG).write_text("{"), r"adapter_config.json cannot be read"),
    "settings a list": (lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"), r"not a JSON object"),
    "settings no text": (lambda folder: (folder / ADAPTER_CONFIG).write_bytes(b"\xff\xfe"), r"cannot be read"),
    "no settings": (lambda folder: (folder / ADAPTER_CONFIG).unlink(), r"no adapter_config.json"),
    "no weights": (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), r"no adapter_model.safetensors"),
    "pickled weights": (
        lambda folder: (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin"), r"weights are pickled",
    ),
    "weights cut": (
        lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-20]),
        r"adapter_model.safetensors cannot be read",
    ),
    "weights of text": (lambda folder: (folder / ADAPTER_WEIGHTS).write_text("NaN " * 9), r"cannot be read"),
    "weights empty": (weighs(dict.clear), r"is empty"),
    "a part missing": (weighs(lambda all_: all_.pop(named("lora_B.weight", all_))), r"should have A, B, and B differ"),
    "whole numbers": (weighs(lambda all_: all_.update({k: v.int() for k, v in all_.items()})), r"of the type I32"),
    "an embedding": (
        weighs(lambda all_: all_.update({"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)})),
        r"`base_model.model.model.embed_tokens.weight`, which is no part",
    ),
    "an embedding's LoRA": (
        weighs(lambda all_: all_.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)})),
        r"lora_embedding_A`, which is no part",
    ),
    "a convolution's LoRA": (
        weighs(lambda all_: all_.update({(n := named("lora_A.weight", all_)): all_[n][..., None, None]})),
        r"have the shapes \[4, 32, 1, 1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason_and_a_hint(adapter, name):
    spoil, reason = REFUSED[name]
    spoil(adapter)
    with pytest.raises(UserError, match=reason) as refused:
        read_adapter(adapter, "`adapter.start`")

    assert refused.value.what.startswith(f"the adapter `{adapter}` is not loaded: ")
    assert refused.value.where == "`adapter.start`"
    assert refused.value.hint


@pytest.mark.parametrize("begins", [True, "gaussian", "orthogonal", "eva"])
def test_beginnings_that_leave_the_base_as_it_is_are_taken(adapter, begins):
    says(init_lora_weights=begins)(adapter)
    assert read_adapter(adapter).rank == 4


@pytest.mark.parametrize("bias", [None, "none"])
def test_an_adapter_without_biases_says_so_or_says_nothing(adapter, bias):
    says(bias=bias)(adapter)
    assert read_adapter(adapter).rank == 4


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (None, "names no base"),
        ("./here", r"by a relative path, `./here`"),
        ("here", r"by a relative path, `here`"),
        ("here/model", r"by a relative path, `here/model`"),
        ("/nowhere/model", r"belongs to `/nowhere/model`, which does not exist"),
    ],
)
def test_a_base_that_cannot_be_found_from_everywhere_is_refused(adapter, monkeypatch, tmp_path, base, reason):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    says(base_model_name_or_path=base)(adapter)
    with pytest.raises(UserError, match=reason) as refused:
        base_name(read_adapter(adapter))

    assert "base_model_name_or_path" in (refused.value.hint or "")


def test_a_base_on_the_hub_is_one_unless_the_adapter_is_of_an_older_version(adapter):
    says(base_model_name_or_path="some/model", revision="main")(adapter)
    assert base_name(read_adapter(adapter)) == "some/model"

    says(revision="v1")(adapter)
    with pytest.raises(UserError, match="version `v1` of `some/model`"):
        base_name(read_adapter(adapter))


def test_an_adapter_to_an_adapter_is_refused(adapter, saved):
    says(base_model_name_or_path=str(saved))(adapter)
    with pytest.raises(UserError, match="is an adapter itself"):
        base_name(read_adapter(adapter))
