"""A model folder or a checkpoint does not own the machine: nothing in it runs, and it takes no more than it holds."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import empty_policy, load_policy
from dpo_cli.modeling.folders.model_files import Trust
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from tests.builders import save_adapter
from tests.cli.test_bad_inputs import CHECKPOINTS, TRAIN, Payload
from tests.security.conftest import within

PICKLES = ("optimizer.bin", "optimizer.pt", "pytorch_model.bin", "training_args.bin", "scheduler.pt", "tokenizer.pkl")
OWN_CODE = """
open("executed", "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def pickled(folder: Path, **others: object) -> Path:
    """Make a folder's weights pickled ones, with anything else beside them."""
    torch.save({**load_file(folder / "model.safetensors"), **others}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def parted(folder: Path) -> Path:
    """Make a folder's weights pickled ones that an index names."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "part.bin")}
    pickled(folder).joinpath("pytorch_model.bin").rename(folder / "part.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def settings(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def own_code(folder: Path, **changes: object) -> None:
    """Put code beside a model, and say in its settings that it is needed."""
    settings(folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, **changes)
    (folder / "own.py").write_text(OWN_CODE)


@pytest.mark.parametrize("make", [pickled, parted])
@pytest.mark.parametrize(
    "arguments", [f"{TRAIN} model.name=other", f"{TRAIN} reference.model=other", "eval --config run.yaml --model other"]
)
def test_pickled_weights_are_refused_wherever_a_model_is_named(project, dpo, make, arguments):
    shutil.copytree("model", "other")
    make(Path("other"))
    result = dpo(arguments)
    assert result.status == 2
    ((error, hint),) = [found for found in result.errors if "pickled" in found[0]]
    assert "`other`" in error
    assert "model.allow_pickle: true" in hint


@pytest.mark.parametrize("make", [pickled, parted])
def test_pickled_weights_that_are_allowed_are_the_same_and_said_to_be_pickled(project, caplog, make):
    before = load_policy("model").state_dict()
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        after = load_policy(str(make(Path("model"))), Trust(pickle=True)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "model.allow_pickle" in caplog.text


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_in_pickled_weights_never_runs_even_where_pickles_are_allowed(project, dpo, zipped):
    pickled(Path("model"), payload=Payload())
    if not zipped:
        Path("model/pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Payload()}, protocol=2))
    result = dpo(f"{TRAIN} model.allow_pickle=true")
    assert result.status == 2
    assert "hold more than tensors" in result.errors[-1][0]
    assert not Path("executed").exists()


def test_pickles_beside_the_weights_are_never_read(project):
    for name in PICKLES:
        Path("model", name).write_bytes(pickle.dumps(Payload()))
    load_policy("model", Trust(pickle=True))
    load_tokenizer("model")
    assert not Path("executed").exists()


def test_pickles_in_a_checkpoint_are_never_read(project, started, dpo):
    shutil.copytree(started / "runs", "runs")
    newest = sorted(CHECKPOINTS.iterdir())[-1]
    shutil.rmtree(newest)
    newest = sorted(CHECKPOINTS.iterdir())[-1]
    whole = Path("runs/run/final/model.safetensors").read_bytes()
    shutil.rmtree("runs/run/final")
    for name in (*PICKLES, "rng_state.pth"):
        (newest / name).write_bytes(pickle.dumps(Payload()))
    result = dpo(f"{TRAIN} --resume")
    assert result.status == 0, result.said
    assert f"resuming after step {int(newest.name[5:])}" in result.said
    assert Path("runs/run/final/model.safetensors").read_bytes() == whole
    assert not Path("executed").exists()


def test_code_beside_a_model_is_not_imported(project, dpo):
    own_code(Path("model"))
    load_policy("model")
    own_code(Path("model"), model_type="own")
    Path("model/tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    result = dpo(TRAIN)
    assert result.status == 2
    ((error, hint),) = result.errors
    assert "its own code" in error
    assert "model.trust_remote_code" in hint
    for load in (load_policy, empty_policy, load_tokenizer):
        with pytest.raises(UserError, match="its own code"):
            load("model")
    assert not Path("executed").exists()


def test_code_beside_a_model_runs_where_it_is_trusted_and_a_warning_says_what_that_means(project, dpo, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(project.folder / "modules"))
    own_code(Path("model"), model_type="own")
    result = dpo(f"{TRAIN} --dry-run model.trust_remote_code=true")
    assert result.status == 0, result.said
    (warning,) = [line for line in result.said.splitlines() if "trust_remote_code" in line]
    assert warning.startswith("warning: ")
    assert "with your rights" in warning
    assert Path("executed").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "/outside.safetensors"}}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}),
        ("adapter_config.json", {"base_model_name_or_path": "../other"}),
        ("shard-00001-model-00001-of-00001.safetensors", {}),
    ],
)
def test_weights_come_from_the_folder_that_was_named(project, file, content):
    Path("model/model.safetensors").rename("outside.safetensors")
    Path("model", file).write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not loaded"):
        load_policy("model")


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"lora_A.weight": Payload()}))


def code_beside_it(folder: Path) -> None:
    own_code(Path("model"), model_type="own")


def tokenizer_with_code(folder: Path) -> None:
    shutil.copy("model/tokenizer.json", folder)
    (folder / "own.py").write_text(OWN_CODE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))


@pytest.mark.parametrize("plant", [pickled_adapter, code_beside_it, tokenizer_with_code])
@pytest.mark.parametrize("setting", ["model.name", "adapter.start"])
def test_nothing_of_an_adapter_or_its_base_is_executed(project, dpo, plant, setting):
    plant(save_adapter(Path("model").resolve(), Path("adapter")))
    result = dpo(f"{TRAIN} model.allow_pickle=true {setting}=adapter training.max_steps=1")
    assert not Path("executed").exists()
    # A tokenizer beside a start adapter is not read.
    assert result.status == (0 if (plant, setting) == (tokenizer_with_code, "adapter.start") else 2), result.said


@pytest.mark.parametrize("base", ["../other", "model", "./model"])
def test_the_base_of_an_adapter_is_no_path_that_depends_on_where_one_is(project, base):
    save_adapter(Path("model").resolve(), Path("adapter"))
    said = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": base}))
    with pytest.raises(UserError, match="by a relative path"):
        load_policy("adapter")


def test_links_to_nowhere_hide_nothing_that_a_folder_brings_along(project):
    for number in range(12):
        Path(f"model/{number}.txt").symlink_to("nowhere")
    Path("model/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="it is an adapter"):
        load_policy("model")


@pytest.mark.program
@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"attn_implementation": "somebody/attention"}], ids=str
)
def test_settings_of_a_model_in_the_hubs_cache_are_looked_at_as_well(project, changes):
    settings(Path("model"), **changes)
    cached = Path("hub/models--some--body")
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    shutil.copytree("model", cached / "snapshots/abc")
    load = "from dpo_cli.modeling.folders.loading import empty_policy; empty_policy('some/body')"
    told = {**os.environ, "HF_HUB_CACHE": str(Path("hub").resolve()), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", load], env=told, capture_output=True, text=True, check=False)
    assert "UserError: config.json " in ended.stderr


@pytest.mark.parametrize("name", ["../outside.safetensors", "adapter_model.bin"])
def test_a_setting_does_not_name_weights_elsewhere(project, name):
    pickled(Path("model"), payload=Payload()).joinpath("pytorch_model.bin").rename("model/adapter_model.bin")
    settings(Path("model"), transformers_weights=name)
    with pytest.raises(UserError, match="its weights are said to be in"):
        load_policy("model", Trust(pickle=True))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 10**12},
        {"vocab_size": 10**11},
        {"vocab_size": 10**30},
        {"num_hidden_layers": 10**9, "layer_types": None},
        {"num_labels": 10**9},
        {"hidden_size": -8},
        {"attn_implementation": "somebody/attention"},
        {"decoder_layers": 10**9},
        {"moe_num_experts": 10**9},
    ],
    ids=str,
)
def test_settings_that_ask_for_more_than_there_is_are_refused_before_memory_is_taken(project, changes):
    settings(Path("model"), **changes)
    with within(5, megabytes=300), pytest.raises(UserError) as found:
        load_policy("model")
    assert found.value.hint


def safetensors(header: object, size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        safetensors({}, size=2**63),
        safetensors({}, size=2**40),
        safetensors({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**63]}}),
        safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors({f"{n}": {"dtype": "F32", "shape": [8], "data_offsets": [n, n + 32]} for n in (0, 8)}),
    ],
    ids=["header of 8 EiB", "header of 1 TiB", "shape that overflows", "weights of 4 TiB", "weights that overlap"],
)
def test_headers_of_weights_that_lie_are_refused_before_memory_is_taken(project, content):
    Path("model/model.safetensors").write_bytes(content)
    with within(5, megabytes=300), pytest.raises(UserError, match="cannot be loaded"):
        load_policy("model")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, '{"vocab_size": ' + "1" * 1_000_000 + "}", "null", '{"model": 1}', "\0" * 99],
    ids=["lists", "objects", "digits", "null", "nonsense", "zeros"],
)
def test_json_of_nonsense_beside_a_model_is_an_error_or_nothing(project, file, content):
    Path("model", file).write_text(content)
    for load in (load_tokenizer, load_policy):
        with within(5, megabytes=300):
            try:
                load("model")
            except UserError as error:
                assert error.hint
