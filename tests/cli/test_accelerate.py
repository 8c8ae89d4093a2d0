"""What `accelerate launch` is configured for is followed in this program's own way, or refused by name in one error."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.torch import load_file

from dpo_cli.config import load_config
from dpo_cli.config.launched import launch_errors, taken_over
from dpo_cli.system.fsdp_configuration import hidden_from_libraries
from dpo_cli.system.launchers import environment_errors, settle_environment
from tests.conftest import read_metrics, run_dpo
from tests.faults.launching import free_port
from tests.marks import slow_unless
from tests.waiting import PATIENCE

FSDP2 = {
    "fsdp_version": 2,
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_activation_checkpointing": False,
}
"""The questions of `accelerate config` about FSDP 2, answered as it suggests."""
FSDP1 = {
    **FSDP2,
    "fsdp_version": 1,
    "fsdp_reshard_after_forward": "FULL_SHARD",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_forward_prefetch": False,
    "fsdp_use_orig_params": True,
    "fsdp_sync_module_states": True,
}
TWO = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}
FOUR_OF_EIGHT = {**TWO, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture
def launched(monkeypatch):
    """Return the function that sets what `accelerate launch` sets for an FSDP configuration of two processes."""

    def launch(settings=None, ranks=TWO, **variables):
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]:
            monkeypatch.delenv(name)
        given = {**FSDP2, **(settings or {})}
        given["fsdp_transformer_cls_to_wrap"] = given.pop("fsdp_transformer_layer_cls_to_wrap")
        words = {
            name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()
        }
        for name, value in {**ranks, "ACCELERATE_USE_FSDP": "true", **words, **variables}.items():
            monkeypatch.setenv(name, value)

    return launch


def refused():
    settle_environment()
    return [str(error) for error in environment_errors()]


def followed(file, *overrides):
    """Return the configuration as it is run, what is said of it, and what contradicts."""
    config, lines = taken_over(load_config(file, overrides))
    return config, "\n".join(lines), [str(error) for error in launch_errors(config)]


@pytest.mark.parametrize(
    ("settings", "sharding"),
    [
        ({}, "full"),
        (FSDP1, "full"),
        ({**FSDP1, "fsdp_reshard_after_forward": "HYBRID_SHARD"}, "hybrid"),
        ({**FSDP1, "fsdp_reshard_after_forward": 4}, "hybrid"),
        ({**FSDP1, "fsdp_reshard_after_forward": "NO_SHARD"}, "none"),
        ({**FSDP1, "fsdp_sharding_strategy": "HYBRID_SHARD", "fsdp_reshard_after_forward": True}, "hybrid"),
        ({**FSDP1, "fsdp_sharding_strategy": 1}, "full"),
    ],
)
def test_how_weights_are_sharded_is_taken_over(launched, write_config, settings, sharding):
    launched(settings, FOUR_OF_EIGHT)
    assert not refused()
    config, said, wrong = followed(write_config())
    assert not wrong
    assert config.training.sharding == sharding
    assert f"`training.sharding: {sharding}`" in said
    assert ("fsdp_version: 1" in said) == (settings.get("fsdp_version") == 1)


@pytest.mark.parametrize(
    ("sizes", "sharding"), [((1, 8), "full"), ((2, 4), "hybrid"), ((8, 1), "none")], ids=["full", "hybrid", "none"]
)
def test_sizes_of_replicas_and_shards_are_taken_over(launched, write_config, sizes, sharding):
    launched({}, FOUR_OF_EIGHT, **parallel(DP_REPLICATE=sizes[0], DP_SHARD=sizes[1]))
    assert not refused()
    config, _, wrong = followed(write_config())
    assert (config.training.sharding, wrong) == (sharding, [])


def parallel(**sizes):
    named = {f"PARALLELISM_CONFIG_{name}_SIZE": str(size) for name, size in sizes.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **named}


def test_recomputation_and_precision_are_taken_over_where_the_configuration_leaves_them_open(launched, write_config):
    launched({"fsdp_activation_checkpointing": True}, ACCELERATE_MIXED_PRECISION="bf16")
    assert not refused()
    config, said, wrong = followed(write_config())
    assert not wrong
    assert config.training.gradient_checkpointing
    assert config.model.dtype == "bfloat16"
    assert "`training.gradient_checkpointing: true`, `model.dtype: bfloat16`" in said


WITHOUT_EFFECT = [
    ("fsdp_backward_prefetch", "BACKWARD_POST"),
    ("fsdp_forward_prefetch", True),
    ("fsdp_state_dict_type", "FULL_STATE_DICT"),
    ("fsdp_use_orig_params", False),
    ("fsdp_cpu_ram_efficient_loading", False),
    ("fsdp_sync_module_states", False),
]


@pytest.mark.parametrize(("name", "value"), WITHOUT_EFFECT)
def test_another_way_to_the_same_result_is_said_to_have_no_effect(launched, write_config, name, value):
    launched(FSDP1)
    before = followed(write_config())
    launched({**FSDP1, name: value})
    assert not refused()
    config, said, wrong = followed(write_config())
    assert f"`{name}: {str(value).lower() if isinstance(value, bool) else value}` (" in said
    assert name not in before[1]
    assert (config, wrong) == (before[0], [])


REFUSED = [
    ({"fsdp_offload_params": True}, "fsdp_offload_params: true", "training.offload: optimizer"),
    ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy: SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
    ({"fsdp_auto_wrap_policy": "NO_WRAP"}, "fsdp_auto_wrap_policy: NO_WRAP", "TRANSFORMER_BASED_WRAP"),
    ({"fsdp_reshard_after_forward": False}, "fsdp_reshard_after_forward: false", "true"),
    ({"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}, "fsdp_reshard_after_forward: SHARD_GRAD_OP", "FULL_SHARD"),
    ({"fsdp_sharding_strategy": "HYBRID_SHARD_ZERO2"}, "fsdp_sharding_strategy: HYBRID_SHARD_ZERO2", "HYBRID_SHARD"),
    ({"fsdp_sharding_strategy": "9"}, "fsdp_sharding_strategy: 9", "FULL_SHARD"),
    ({"fsdp_activation_checkpointing_offload": True}, "fsdp_activation_checkpointing_offload: true", "false"),
    ({"fsdp_ignored_modules": "lm_head"}, "fsdp_ignored_modules: lm_head", "leave it out"),
    ({"fsdp_version": 3}, "fsdp_version: 3", "2"),
]


@pytest.mark.parametrize(("settings", "named", "hint"), REFUSED)
def test_what_is_not_followed_is_refused_by_name(launched, settings, named, hint):
    launched(settings)
    (error,) = refused()
    assert f"`{named}`" in error.splitlines()[0]
    assert hint in error.partition("hint: ")[2]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"TP": 2, "DP_SHARD": 4}, "parallelism_config_tp_size: 2"),
        ({"CP": 2, "DP_SHARD": 4}, "parallelism_config_cp_size: 2"),
        ({"SP": 2, "DP_SHARD": 4}, "parallelism_config_sp_size: 2"),
        ({"DP_SHARD": 4}, "parallelism_config_dp_shard_size: 4"),
        ({"DP_REPLICATE": 4, "DP_SHARD": 2}, "parallelism_config_dp_shard_size: 2"),
    ],
)
def test_other_kinds_of_parallelism_are_refused_by_name(launched, sizes, named):
    launched({}, FOUR_OF_EIGHT, **parallel(**sizes))
    (error,) = refused()
    assert f"`{named}`" in error.splitlines()[0]


def test_all_that_is_refused_is_in_one_error(launched):
    launched({"fsdp_offload_params": True, "fsdp_ignored_modules": "lm_head", "fsdp_reshard_after_forward": False})
    (error,) = refused()
    for named in ("fsdp_offload_params: true", "fsdp_ignored_modules: lm_head", "fsdp_reshard_after_forward: false"):
        assert error.count(f"`{named}`") == 2  # What is wrong, and what to do.


@pytest.mark.parametrize(
    ("settings", "setting", "asked", "written"),
    [
        ({}, "training.sharding", "full", "none"),
        ({}, "training.sharding", "full", "hybrid"),
        ({"fsdp_activation_checkpointing": True}, "training.gradient_checkpointing", "true", "false"),
        ({}, "model.dtype", "bfloat16", "float32"),
    ],
)
def test_a_configuration_that_contradicts_the_launchers_is_an_error_that_names_both(
    launched, write_config, settings, setting, asked, written
):
    launched(settings, FOUR_OF_EIGHT, **({"ACCELERATE_MIXED_PRECISION": "bf16"} if setting == "model.dtype" else {}))
    assert not refused()
    _, _, (error,) = followed(write_config(), f"{setting}={written}")
    assert f"`{setting}: {asked}`" in error
    assert f"`{setting}: {written}`" in error


def test_what_only_the_configuration_asks_for_is_no_contradiction(launched, write_config):
    launched({}, FOUR_OF_EIGHT, ACCELERATE_MIXED_PRECISION="no")
    asked = ["training.gradient_checkpointing=true", "model.dtype=bfloat16", "training.sharding=full"]
    config, _, wrong = followed(write_config(), *asked)
    assert (config.training.gradient_checkpointing, config.model.dtype, wrong) == (True, "bfloat16", [])


@pytest.mark.parametrize(
    ("variables", "overrides", "what"),
    [
        (TWO, ["training.sharding=hybrid"], "all 2 processes are on one machine"),
        ({**TWO, "LOCAL_WORLD_SIZE": "1"}, ["training.sharding=hybrid"], "one process per machine"),
        ({**TWO, "WORLD_SIZE": "5"}, ["training.sharding=hybrid"], "5 processes do not divide into machines of 2"),
        ({**TWO, "LOCAL_WORLD_SIZE": None}, ["training.sharding=hybrid"], "LOCAL_WORLD_SIZE, .* is not set"),
        (
            TWO,
            ["training.sharding=full", "training.optimizer=adafactor"],
            "`training.optimizer: adafactor` cannot step",
        ),
    ],
)
def test_shards_that_these_processes_cannot_have_are_an_error(monkeypatch, write_config, variables, overrides, what):
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    _, _, (error,) = followed(write_config(), *overrides)
    assert re.search(what, error)
    assert "hint: " in error


@pytest.mark.parametrize("sharding", ["full", "hybrid"])
def test_one_process_has_nothing_to_shard_between_and_says_so(monkeypatch, write_config, sharding):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    _, said, wrong = followed(write_config(), f"training.sharding={sharding}", "training.optimizer=adafactor")
    assert not wrong
    assert said == f"`training.sharding: {sharding}` has no effect: this is one process"


def test_libraries_see_nothing_of_the_configuration_while_a_run_lasts(launched):
    launched({}, TWO, **parallel(DP_SHARD=2))
    before = dict(os.environ)
    with hidden_from_libraries():
        assert not [name for name in os.environ if "FSDP" in name or "PARALLELISM_CONFIG" in name]
    assert dict(os.environ) == before


PORT_TAKEN = re.compile("address already in use|another process is utilizing it", re.IGNORECASE)
"""What torch says of a port, and what `accelerate launch` does."""


def configured(folder, kind, **settings):
    """Write Accelerate's configuration file with its own class, as `accelerate config` does."""
    usual = {"compute_environment": "LOCAL_MACHINE", "debug": False, "num_processes": 2, "machine_rank": 0,
             "num_machines": 1, "main_training_function": "main", "mixed_precision": "no",
             "use_cpu": False}  # fmt: skip
    file = folder / "accelerate.yaml"
    ClusterConfig(distributed_type=kind, **{**usual, **settings}).to_yaml_file(str(file))
    return file


def accelerate_launch(file, *arguments, **env):
    """Launch the program; once more where another program has taken the port meanwhile."""
    done = launched_at(free_port(), file, *arguments, **env)
    return launched_at(free_port(), file, *arguments, **env) if PORT_TAKEN.search(done.stderr) else done


def launched_at(port, file, *arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
         "--main_process_port", str(port), "-m", "dpo_cli", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )  # fmt: skip


def errors_in(said):
    return [line for line in said.splitlines() if line.startswith("error: ")]


SETTINGS = {"training": {"pairs_per_step": 13, "micro_batch_tokens": 300, "max_steps": 2}, "evaluation": {}}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("FSDP", {"fsdp_config": FSDP2}),
        pytest.param("FSDP", {"fsdp_config": FSDP1}, marks=pytest.mark.slow),
        pytest.param("MULTI_GPU", {}, marks=pytest.mark.slow),
    ],
    ids=["FSDP 2", "FSDP 1", "plain"],
)
def test_a_run_that_accelerate_launches_is_that_of_one_process(write_config, tmp_path, kind, settings):
    one = run_dpo("train", "--config", write_config("one", **SETTINGS))
    assert one.returncode == 0, one.stderr
    two = accelerate_launch(
        configured(tmp_path, kind, **settings), "train", "--config", write_config("two", **SETTINGS)
    )
    assert two.returncode == 0, two.stderr
    taken = "taken over from Accelerate's FSDP configuration: `training.sharding: full`"
    assert two.stderr.count(taken) == (kind == "FSDP")
    losses = [[row["loss"] for row in read_metrics(tmp_path / "runs" / name)] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [load_file(tmp_path / "runs" / name / "final" / "model.safetensors") for name in ("two", "one")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's size, so a gradient near zero may move either way by rounding.
        assert (tensor - weights[1][name]).abs().mean() < 2e-5, name


def assert_refused(done, what, where):
    assert done.returncode != 0
    (error,) = errors_in(done.stderr)
    assert re.search(what, error), done.stderr
    assert not where.exists()
    # The launcher's own report says with which status the program ended.
    assert re.search(r"exitcode *: 2 ", done.stderr), done.stderr
    assert "loading" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "config", "what"),
    slow_unless(
        lambda case: bool(case[1]),
        [
            ({**FSDP2, "fsdp_offload_params": True}, {}, "`fsdp_offload_params: true`"),
            ({**FSDP1, "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, {}, "`fsdp_auto_wrap_policy: SIZE_BASED_WRAP`"),
            (FSDP2, {"training": {"sharding": "none"}}, "`training.sharding: full`, and .* `training.sharding: none`"),
        ],
    ),
    ids=["offloaded", "wrapped by size", "a contradiction"],
)
def test_a_launch_that_cannot_be_followed_is_one_error_before_anything_is_loaded(
    write_config, tmp_path, settings, config, what
):
    file = configured(tmp_path, "FSDP", fsdp_config=settings)
    done = accelerate_launch(file, "train", "--config", write_config("two", **config))
    assert_refused(done, what, tmp_path / "runs")


def test_a_launch_with_deepspeed_is_one_error(write_config, tmp_path):
    """`accelerate launch` asks for two names of DeepSpeed's, and for no more; the program asks for none."""
    package = tmp_path / "site" / "deepspeed"
    (package / "launcher").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "launcher/__init__.py": "",
        "launcher/runner.py": "DEEPSPEED_ENVIRONMENT_NAME = ''",
    }.items():
        (package / name).write_text(text)
    described = tmp_path / "site" / "deepspeed-0.18.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.0\n")
    settings = {"zero_stage": 3, "offload_optimizer_device": "none", "offload_param_device": "none",
                "gradient_accumulation_steps": 1, "zero3_init_flag": True, "zero3_save_16bit_model": True}  # fmt: skip
    file = configured(tmp_path, "DEEPSPEED", deepspeed_config=settings)
    config = write_config("two")
    done = accelerate_launch(file, "train", "--config", config, PYTHONPATH=str(tmp_path / "site"))
    assert_refused(done, "configured for DeepSpeed", tmp_path / "runs")
    assert "training.sharding: full" in done.stderr


@pytest.mark.parametrize(("version", "wrong"), [("2.11.0+cu130", True), ("2.12.0", False), ("2.13.0+cpu", False)])
def test_quantized_weights_are_sharded_by_a_torch_that_can(launched, write_config, monkeypatch, version, wrong):
    launched({}, FOUR_OF_EIGHT)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    config = load_config(write_config(model={"quantize": "nf4"}, adapter="lora"), [])
    found = [str(error) for error in launch_errors(taken_over(config)[0])]
    assert any(f"torch {version} cannot shard" in one for one in found) == wrong, found
