"""What other programs leave in the environment never changes a run in silence, nor costs it its exit status."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import dpo_cli
from dpo_cli.errors import UserError
from dpo_cli.reporting.console import Console
from dpo_cli.system import lone_ranks
from dpo_cli.system.launchers import environment_errors, is_main_process, settle_environment
from tests.cli.in_process import call
from tests.conftest import dpo_command, read_metrics, run_dpo
from tests.faults.launching import free_port
from tests.marks import slow_unless

MEETING = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SECOND_OF_TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **MEETING}
FOUR_HERE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", **MEETING}
FOLLOWED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "ACCELERATE_", "FSDP_", "PARALLELISM_")
"""How the names of variables begin that a launcher sets."""
ONE_STEP = {"training": {"max_steps": 1}, "data": {"eval": 0.2}, "evaluation": {}}


@pytest.fixture
def left(monkeypatch):
    """Return the function that puts variables into an environment without any of a launcher's."""
    for name in [name for name in os.environ if name.startswith((*FOLLOWED, "CUDA_VISIBLE_DEVICES"))]:
        monkeypatch.delenv(name)

    def leave(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return leave


def refused() -> list[str]:
    return [error.what for error in environment_errors()]


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "3", "LOCAL_RANK": "3"},
        {"LOCAL_RANK": "1", "MASTER_ADDR": "node7"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_a_process_that_is_alone_speaks_and_says_what_it_ignores(left, variables):
    left(**variables)
    (line,) = settle_environment()
    for name in variables.keys() - {"MASTER_ADDR"}:
        assert f"{name}={variables[name]}" in line
    assert is_main_process()
    assert not refused()
    assert settle_environment() == []


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_memory_of_a_gpu_is_taken_in_segments_that_grow_unless_the_user_has_said_how(monkeypatch, name):
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    settle_environment()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:64")
    settle_environment()
    assert {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")} == {
        name: "max_split_size_mb:64"
    }


@pytest.mark.parametrize("world", ["1", "2"])
def test_what_torchrun_says_is_taken_as_it_is(left, world):
    left(RANK="0", LOCAL_RANK="0", WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT="29500")
    assert (settle_environment(), refused()) == ([], [])


WHERE_RANKS_MEET = ["train", "eval --model m"]
WHERE_NONE_MEET = ["prepare-data", "export runs/none --to out", "doctor nothing", "init --out /dev/null/no.yaml"]


@pytest.mark.parametrize("command", [*WHERE_RANKS_MEET, *WHERE_NONE_MEET])
def test_only_a_rank_that_would_meet_others_waits_to_be_found_before_it_ends(left, capsys, monkeypatch, command):
    """The first of another machine, whose main process is gone: it has to say what is wrong."""
    now = iter(range(1000))
    waits: list[float] = []
    monkeypatch.setattr(lone_ranks, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: next(now)))
    left(**{**SECOND_OF_TWO, "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    config = " --config none.yaml" if command.split()[0] in ("train", "eval", "prepare-data") else ""
    assert call(command + config) == 2
    said = capsys.readouterr().err
    assert bool(waits) == (command in WHERE_RANKS_MEET)
    assert said.startswith("error: rank 1 (on ") if waits else not said


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", **MEETING}, "RANK, LOCAL_RANK are not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", **MEETING}, "ranks count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2", **MEETING}, "LOCAL_RANK is 2, and WORLD_SIZE is 2"),
        ({**SECOND_OF_TWO, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, and LOCAL_WORLD_SIZE is 1"),
        ({**SECOND_OF_TWO, "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, and WORLD_SIZE is 2"),
        ({**SECOND_OF_TWO, "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is not a whole number"),
        ({**SECOND_OF_TWO, "MASTER_PORT": "http"}, "MASTER_PORT is not the number of a port: `http`"),
        ({**SECOND_OF_TWO, "MASTER_PORT": "65536"}, "MASTER_PORT is not the number of a port"),
        ({**FOUR_HERE, "CUDA_VISIBLE_DEVICES": "0,1"}, "4 processes are started on a machine, and .* shows 2 GPUs"),
        ({"WORLD_SIZE": "0"}, "a run has at least one process"),
        ({"WORLD_SIZE": "two"}, "not a whole number: `two`"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "True"}, "parallelism"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "to compile models"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "to accumulate gradients"),
    ],
)
def test_what_cannot_be_meant_is_one_error(left, variables, reason):
    left(**variables)
    settle_environment()
    (what,) = refused()
    assert re.search(reason, what)


@pytest.mark.parametrize(
    ("name", "value", "ignored"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", True),
        ("ACCELERATE_MIXED_PRECISION", "no", False),
    ],
)
def test_what_accelerate_would_do_beside_the_configuration_is_ignored_with_a_line(left, name, value, ignored):
    left(**{name: value})
    lines = settle_environment()
    assert [name in line for line in lines] == [True] * ignored
    assert not refused()


def test_a_run_beside_the_traces_of_a_launcher_is_one_of_its_own(write_config, tmp_path):
    traces = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    done = run_dpo("train", "--config", write_config(**ONE_STEP), env=traces)
    assert done.returncode == 0, done.stderr
    assert "ignoring RANK=0, LOCAL_RANK=0, WORLD_SIZE=1" in done.stderr
    assert "ACCELERATE_MIXED_PRECISION=bf16" in done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / "run")] == [1]


ENCODINGS = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]


@pytest.mark.parametrize("encoding", slow_unless(lambda encoding: "LC_ALL" in encoding, ENCODINGS))
def test_a_terminal_that_cannot_show_a_character_costs_no_run(write_config, tmp_path, encoding):
    done = run_dpo("train", "--config", write_config(**ONE_STEP), env=encoding)
    assert done.returncode == 0, done.stderr
    assert "95 % interval" in done.stdout
    assert "?" in done.stdout
    assert (tmp_path / "runs" / "run" / "final" / "manifest.json").is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "schema"], ["prepare-data"]])
def test_an_output_that_is_full_is_one_error(write_config, arguments, tmp_path):
    named = [str(write_config())] if arguments == ["prepare-data"] else []
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            dpo_command(*arguments, *named), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "no space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("job", [dpo_cli.train, dpo_cli.evaluate, dpo_cli.prepare])
@pytest.mark.parametrize("console", [None, Console(quiet=True)], ids=["no console", "own console"])
@pytest.mark.parametrize("world", ["", "two"])
def test_a_program_is_told_what_is_wrong_with_the_environment(left, write_config, job, console, world):
    left(WORLD_SIZE=world)
    with pytest.raises(UserError, match=f"WORLD_SIZE is not a whole number: `{world}`"):
        # Training begins when its first step is asked for.
        list(job(write_config(**ONE_STEP), console=console))


def test_a_program_with_a_console_of_its_own_sees_what_is_ignored(left, write_config, capsys):
    left(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    list(dpo_cli.train(write_config(**ONE_STEP), dry_run=True, console=Console()))
    assert "ignoring RANK=0, LOCAL_RANK=0, WORLD_SIZE=1" in "".join(capsys.readouterr())
