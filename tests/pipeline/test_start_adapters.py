"""Training goes on from an adapter with that adapter's settings, or trains all weights of its base with it merged."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.modeling.adapters.files import read_adapter
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.reporting.console import Console
from dpo_cli.settings import escape_path
from dpo_cli.system.storage import read_manifest
from tests.builders import save_adapter
from tests.conftest import CHATML, read_metrics

# PEFT asks transformers in a way that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TWO = {"target_modules": ["v_proj", "q_proj"], "lora_alpha": 8}


@pytest.fixture(autouse=True)
def no_accelerator_of_others():
    """One that another test has made in this process has a precision of its own, which is that of all until then."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_llama):
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("start"), rank=3, use_dora=True, **TWO)


def trained(file, **how):
    list(dpo_cli.train(file, **how))
    return Path(load_config(file).output_dir)


def final(run):
    return (run / "final/adapter_model.safetensors").read_bytes()


def test_what_was_not_set_is_the_adapters_and_the_resolved_configuration_runs_again_as_it_is(write_config, start):
    run = trained(write_config(adapter={"start": str(start)}, training={"max_steps": 2}))
    resolved = yaml.safe_load((run / "config.yaml").read_text())

    own = {"rank": 3, "alpha": 8, "targets": ["q_proj", "v_proj"], "dora": True, "rslora": False, "dropout": 0.0}
    assert resolved["adapter"] == {"type": "lora", "start": escape_path(str(start)), **own}
    first = final(run)
    assert final(trained(run / "config.yaml", overwrite=True)) == first
    assert (
        load_file(run / "final/adapter_model.safetensors").keys()
        == load_file(start / "adapter_model.safetensors").keys()
    )


def test_a_start_is_found_below_the_home_and_behind_variables(write_config, start, monkeypatch):
    monkeypatch.setenv("HOME", str(start.parent))
    monkeypatch.setenv("STARTS", str(start.parent))
    for written in (f"~/{start.name}", f"$STARTS/{start.name}"):
        config = load_config(write_config(adapter={"start": written}))
        assert (config.adapter.start, config.adapter.rank) == (str(start), 3)


def test_what_is_set_as_in_the_adapter_is_no_error_whatever_its_order(write_config, start):
    same = {"rank": 3, "alpha": 8, "dora": True, "targets": ["v_proj", "q_proj"]}
    assert load_config(write_config(adapter={"start": str(start), **same})).adapter.rank == 3
    pattern = r"model\.layers\.\d+\.self_attn\.[qv]_proj"
    assert load_config(write_config(adapter={"start": str(start), "targets": pattern})).adapter.targets == pattern


@pytest.mark.parametrize(
    "targets", ["q_proj", "[qv]_proj", ["q_proj", "v_proj", "o_proj"], ["layers.0.self_attn.v_proj"]]
)
def test_targets_that_cannot_be_those_of_the_adapter_are_refused_before_anything_is_loaded(
    write_config, start, targets
):
    with pytest.raises(dpo_cli.UserError, match=r"`adapter.targets` is .*, but \[q_proj, v_proj\]"):
        load_config(write_config(adapter={"start": str(start), "targets": targets}))


def test_one_run_goes_on_where_another_ended_with_all_linear_layers(write_config, tiny_llama):
    first = trained(write_config("first", adapter="lora", training={"max_steps": 2}))
    going_on = {"start": str(first / "final"), "targets": "all-linear"}
    second = trained(write_config("second", adapter=going_on, training={"max_steps": 2}, evaluation={"every_steps": 1}))

    rows = read_metrics(second, "eval")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["logps/chosen"] == pytest.approx(read_metrics(first, "eval")[-1]["logps/chosen"], rel=1e-6)
    assert final(second) != final(first)


def noisy(model, folder):
    """Save a model with other weights than those of another one, under the same names and in the same shapes."""
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.01)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    other.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        ("final", "float32"),
        pytest.param("checkpoints/step-000001", "bfloat16", marks=pytest.mark.slow),
        pytest.param("exported", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_of_a_run_knows_the_weights_of_its_base_under_whatever_name(
    write_config, tiny_llama, tmp_path, part, dtype
):
    once = {"training": {"max_steps": 1}}
    first = trained(write_config("first", adapter="lora", model={"dtype": dtype}, checkpoints={"at_end": True}, **once))
    if part == "exported":
        dpo_cli.export(first, tmp_path / "copied")
    else:
        shutil.copytree(first / part, tmp_path / "copied")
    told = {"adapter": {"start": str(tmp_path / "copied")}, **once}
    moved = Path(shutil.copytree(tiny_llama, tmp_path / "moved"))
    model = {"name": str(moved), "eos_token": "<|endoftext|>", "dtype": "float32"}
    trained(write_config("second", model=model, **told))

    with pytest.raises(dpo_cli.UserError, match=r"another base: .* has other weights or settings"):
        other = {"name": str(noisy(tiny_llama, tmp_path / "noisy")), "dtype": dtype}
        trained(write_config("third", model=other, **told))


def test_what_cannot_be_known_of_a_base_is_said(write_config, tiny_llama, tmp_path, capfd):
    told = {"training": {"max_steps": 1}}
    full, half = (
        str(trained(write_config(dtype, model={"dtype": dtype}, adapter="lora", **told)) / "final")
        for dtype in ("float32", "bfloat16")
    )
    foreign = str(save_adapter(tiny_llama, tmp_path / "adapter", **TWO))
    other = str(noisy(tiny_llama, tmp_path / "noisy"))
    capfd.readouterr()
    for start, model, unknown in (
        (full, {"dtype": "bfloat16"}, "beside a base held in float32, which is held in bfloat16 here"),
        (half, {"dtype": "float32"}, ""),
        (foreign, {"name": other}, f"names its base `{tiny_llama}`: whether `{other}` is the same"),
        (foreign, {}, ""),
    ):
        trained(write_config(model=model, adapter={"start": start}, **told), overwrite=True, console=Console())
        said = capfd.readouterr().err
        assert ("is the same is not known" in said) == bool(unknown)
        assert unknown in said


@pytest.mark.parametrize("chosen", [False, True])
def test_a_template_of_the_start_that_is_not_used_is_warned_of(write_config, tiny_llama, tmp_path, capfd, chosen):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter", **TWO)
    own = adapter / "chat_template.jinja"
    own.write_text(CHATML)
    told = {"adapter": {"start": str(adapter)}, "model": {"chat_template": str(own)} if chosen else {}}
    list(dpo_cli.train(write_config(**told), dry_run=True, console=Console()))
    assert "has a chat template of its own" not in capfd.readouterr().err

    own.write_text(CHATML + "{# another #}")
    list(dpo_cli.train(write_config(**told), dry_run=True, console=Console()))
    assert (f"which is not used; `model.chat_template: {own}` uses it" in capfd.readouterr().err) != chosen


def test_a_base_in_a_relative_folder_is_named_as_it_is_from_everywhere(write_config, tiny_llama, tmp_path, monkeypatch):
    shutil.copytree(tiny_llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    run = trained(write_config(model={"name": "model"}, adapter="lora", training={"max_steps": 1}))
    assert read_adapter(run / "final").base == str(tmp_path / "model")


def test_an_adapter_whose_bytes_are_not_those_that_were_saved_is_refused(write_config):
    first = trained(write_config("first", adapter="lora", training={"max_steps": 1}))
    weights = first / "final/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(dpo_cli.UserError, match=r"is damaged: adapter_model.safetensors does not have the bytes"):
        dpo_cli.train(write_config("second", adapter={"start": str(first / "final")}))


def test_a_dry_run_says_what_of_the_base_only_a_run_can_compare(write_config, tiny_llama, tmp_path, capfd):
    own = str(trained(write_config("first", adapter="lora", training={"max_steps": 1})) / "final")
    foreign = str(save_adapter(tiny_llama, tmp_path / "adapter", **TWO))
    other = str(noisy(tiny_llama, tmp_path / "noisy"))
    capfd.readouterr()
    for start, model, remains in (
        (own, other, f"not checked without weights: whether `{other}` has those that the adapter `{own}`"),
        (foreign, other, f"names its base `{tiny_llama}`: whether `{other}` is the same"),
        (foreign, str(tiny_llama), ""),
    ):
        file = write_config("dry", model={"name": model}, adapter={"start": start})
        list(dpo_cli.train(file, dry_run=True, console=Console()))
        said = capfd.readouterr().err
        assert ("whether" in said) == bool(remains)
        assert remains in said


@pytest.fixture
def begun(write_config, tiny_llama, tmp_path):
    """The configuration and the folder of a run that went on from an adapter, which lies in another folder."""
    start = save_adapter(tiny_llama, tmp_path / "sft", rank=3, **TWO)
    file = write_config(adapter={"start": str(start)}, training={"max_steps": 2}, checkpoints={"every_steps": 1})
    return file, trained(file), start


@pytest.mark.parametrize(
    ("settings", "was"),
    [
        ({"rank": 4}, "`adapter.rank` was 3 and is 4"),
        ({"rank": 3, "lora_alpha": 16}, "`adapter.alpha` was 8.* and is 16"),
        ({"rank": 3, "target_modules": ["q_proj"]}, r"`adapter.targets` was \[.*q_proj.*\] and is \[.*q_proj.*\]"),
        ({"rank": 3, "seed": 2}, ""),
    ],
    ids=["rank", "alpha", "targets", "weights"],
)
def test_a_start_that_has_changed_is_named_where_the_run_is_resumed_or_exported(
    begun, tiny_llama, tmp_path, settings, was
):
    """Whatever of it has changed, and whether the settings are the user's or those that the run wrote down."""
    file, run, start = begun
    shutil.rmtree(run / "final")
    shutil.rmtree(start)
    save_adapter(tiny_llama, start, **{**TWO, **settings})
    named = re.escape(f"the start adapter `{start}` is not the one that the ")
    attempts = [
        lambda: trained(file, resume=True),
        lambda: trained(run / "config.yaml", resume=True),
        lambda: dpo_cli.export(run / "checkpoints/step-000002", tmp_path / "merged"),
    ]
    for attempt in attempts:
        with pytest.raises(dpo_cli.UserError, match=f"{named}.*{was}") as refused:
            attempt()
        assert "restore" in refused.value.hint
    assert not (tmp_path / "merged").exists()


def test_what_is_set_otherwise_on_the_command_line_is_no_change_of_the_start(begun):
    _, run, start = begun
    with pytest.raises(dpo_cli.UserError, match=r"`adapter.rank` is 8, but 3") as refused:
        load_config(run / "config.yaml", ["adapter.rank=8"])
    assert refused.value.hint == f"leave `adapter.rank` out: it is taken from `{start}`"


def test_the_manifest_of_a_whole_model_says_what_it_always_said(write_config):
    assert read_manifest(trained(write_config(training={"max_steps": 1})) / "final").keys() == {"files"}


def test_all_weights_of_an_adapter_that_is_the_model_train_and_the_header_says_so(
    write_config, tiny_llama, tmp_path, capfd
):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter", **TWO)
    file = write_config(model={"name": str(adapter)}, training={"max_steps": 2})
    run = trained(file, console=Console())

    said = capfd.readouterr().err
    assert f"{adapter} (LlamaForCausalLM): that adapter, merged into {tiny_llama}" in said
    before, after = load_policy(str(adapter)).state_dict(), load_policy(str(run / "final")).state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert read_metrics(run, "eval")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_its_evaluation_gives_the_figures_of_the_run(write_config, tiny_llama, tmp_path):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter", **TWO)
    file = write_config(model={"name": str(adapter)}, training={"max_steps": 2})
    run = trained(file)
    last = read_metrics(run, "eval")[-1]

    found = dpo_cli.evaluate(file)
    assert {name: found[name] for name in found if name in last} == {
        name: pytest.approx(last[name], abs=1e-5) for name in last if name in found
    }


def test_an_overwritten_run_never_loses_an_adapter_that_it_needs(write_config, tiny_llama, tmp_path):
    run = trained(write_config(training={"max_steps": 1}))
    inside = save_adapter(tiny_llama, run / "checkpoints/adapter", **TWO)
    for settings in ({"adapter": {"start": str(inside)}}, {"model": {"name": str(inside)}}):
        with pytest.raises(dpo_cli.UserError, match="would remove"):
            dpo_cli.train(write_config(**settings), overwrite=True)
    assert (inside / "adapter_config.json").is_file()
