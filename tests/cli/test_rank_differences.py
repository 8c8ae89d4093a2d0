"""Processes of one run that have not all the same: one error names the one that differs and in what, and all end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from dpo_cli.modeling.folders.model_files import NO_TRUST
from dpo_cli.modeling.folders.samples import sampled_adapter_digest, sampled_digest
from dpo_cli.pipeline.surroundings import Surroundings, differences
from tests.builders import save_adapter
from tests.conftest import CHATML, build_llama, make_config, write_rows
from tests.faults.launching import free_port
from tests.marks import slow_unless
from tests.waiting import PATIENCE, wait_until

HOST = socket.gethostname()


class Machines:
    """Two folders in which everything is the same, each that of a process: paths are relative to them."""

    def __init__(self, zygote, folder, model, rows):
        self.zygote, self.env = zygote, ({}, {})
        self.folders = folder / "rank-0", folder / "rank-1"
        self.faults, self.arguments = [None, None], ([], [])
        for one in self.folders:
            one.mkdir()
            shutil.copytree(model, one / "model")
            write_rows(one / "pairs.jsonl", rows)
            make_config(one, "model", "pairs.jsonl", output_dir="runs/run", training={"max_steps": 1})

    def start(self, *arguments, **env):
        start = self.starter(*arguments, **env)
        return [start(0), start(1)]

    def start_second_late(self, *arguments):
        """Start the second process when the first one listens: it waits for that no longer than a user would."""
        port = free_port()
        start = self.starter(*arguments, MASTER_PORT=str(port))
        first = start(0)

        def listens():
            assert first.runs, first.said
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True

        wait_until(listens, lambda: f"does not listen:\n{first.said}")
        return [first, start(1)]

    def starter(self, *arguments, **env):
        """Return the function that starts the process of a rank."""
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", **env}
        return lambda rank: self.zygote.start(
            *arguments,
            *self.arguments[rank],
            cwd=self.folders[rank],
            env={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), **self.env[rank]},
            fault=self.faults[rank],
        )


@pytest.fixture
def machines(zygote, tmp_path, tiny_llama, demo_rows):
    return Machines(zygote, tmp_path, tiny_llama, demo_rows[:20])


def errors_in(said):
    return [line for line in said.splitlines() if line.startswith("error: ")]


def assert_ends(ranks, error, statuses=(2, 2)):
    """Assert how processes end, and that exactly one error is shown."""
    ended = [rank.wait() for rank in ranks]
    said = "\n".join(one.said for one in ended)
    assert [one.status for one in ended] == list(statuses), said
    assert len(errors_in(said)) == 1, said
    assert re.search(error, errors_in(said)[0]), said
    assert "hint: " in said
    assert "Traceback" not in said


TRAIN, EVAL = ("train", "--config", "run.yaml"), ("eval", "--config", "run.yaml", "--model", "model")


def options(*arguments):
    return lambda machines: machines.arguments[1].extend(arguments)


def variables(**env):
    return lambda machines: machines.env[1].update(env)


def other_pairs(machines):
    rows = [json.loads(line) for line in (machines.folders[1] / "pairs.jsonl").read_text().splitlines()]
    write_rows(machines.folders[1] / "pairs.jsonl", rows[:-1])


def other_weights(name="model"):
    def change(machines):
        from transformers import AutoTokenizer

        build_llama(machines.folders[1] / name, AutoTokenizer.from_pretrained(machines.folders[1] / name), seed=1)

    return change


def other_settings(machines):
    file = machines.folders[1] / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))


def with_a_reference(machines):
    for one in machines.folders:
        shutil.copytree(one / "model", one / "reference")
    other_weights("reference")(machines)
    for arguments in machines.arguments:
        arguments.append("reference.model=reference")


def with_an_adapter(machines):
    for rank, one in enumerate(machines.folders):
        save_adapter(one / "model", one / "start", seed=rank)
        machines.arguments[rank].append("adapter.start=start")


def with_an_adapter_of_a_lost_base(machines):
    for one in machines.folders:
        save_adapter(one / "model", one / "start")
        file = one / "start" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/old/path"}))


def with_a_template(machines):
    for rank, one in enumerate(machines.folders):
        (one / "template.jinja").write_text(CHATML + ("{# #}\n " if rank else ""))
        machines.arguments[rank].append("model.chat_template=template.jinja")


def say_version(package, version):
    """Let a package of this process have another version."""
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == package else real(name)


def another_version(package):
    def change(machines):
        machines.faults[1] = f"{__name__}:say_version", {"package": package, "version": "0.0.7"}

    return change


HAS = rf"error: rank 1 \(on {re.escape(HOST)}\) has "
DIFFERENT = {
    "another configuration": (
        options("training.learning_rate=0.5"), TRAIN,
        HAS + r"another configuration than rank 0: training.learning_rate 0.5, not 0.001$",
    ),
    "two settings": (
        options("training.seed=1", "loss.beta=0.5"), TRAIN, HAS + r".*loss.beta 0.5, not 0.1; training.seed 1, not 42"
    ),
    "another way to shard": (
        options("training.sharding=full"), TRAIN, HAS + r'another configuration.*: training.sharding "full", not "none"'
    ),
    "a launcher of its own": (
        variables(ACCELERATE_USE_FSDP="true"), TRAIN, HAS + r'another configuration.*: training.sharding "full"'
    ),
    "another command": (options("--resume"), TRAIN, HAS + r"other options than rank 0: --resume True, not False"),
    "another version of the program": (
        another_version("dpo-cli"), TRAIN, HAS + r"other versions than rank 0: dpo-cli 0.0.7, not \d"
    ),
    "another version of torch": (
        another_version("torch"), TRAIN, HAS + r"other versions than rank 0: torch 0.0.7, not \d"
    ),
    "other pairs": (other_pairs, TRAIN, HAS + r"other pairs than rank 0"),
    "another template": (with_a_template, TRAIN, HAS + r"other pairs than rank 0"),
    "other weights": (other_weights(), TRAIN, HAS + r"another model than rank 0"),
    "other settings of the model": (other_settings, TRAIN, HAS + r"another model than rank 0"),
    "another reference": (with_a_reference, TRAIN, HAS + r"another model than rank 0"),
    "another adapter to start from": (with_an_adapter, TRAIN, HAS + r"another model than rank 0"),
    "another model to score": (other_weights(), (*EVAL, "reference=none", "loss=simpo"), HAS + r"another model than"),
    "other pairs to score": (other_pairs, EVAL, HAS + r"other pairs than rank 0"),
    "an output on another disk": (
        lambda machines: None, (*TRAIN, "training.sharding=full"),
        r"in shards need a folder that all processes share: rank 1 \(on .*\) cannot see the files of rank 0",
    ),
    "an output on another disk, to be resumed": (
        lambda machines: None, (*TRAIN, "--resume"),
        r"resuming needs a folder that all processes share: rank 1 \(on .*\) cannot see the files of rank 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_process_that_has_something_else_is_named_in_one_error(machines, name):
    spoil, command, error = DIFFERENT[name]
    spoil(machines)
    assert_ends(machines.start(*command), error)
    for one in machines.folders:
        assert not [path for path in (one / "runs").rglob("*") if path.is_file()]


def test_processes_that_have_the_same_train(machines):
    """Each from a folder of its own, as two machines that share no disk."""
    ranks = machines.start(*TRAIN)
    assert [rank.wait().status for rank in ranks] == [0, 0], ranks[0].said
    assert (machines.folders[0] / "runs/run/final/model.safetensors").is_file()


@pytest.mark.slow
def test_processes_start_from_an_adapter_whose_base_is_gone(machines):
    with_an_adapter_of_a_lost_base(machines)
    ranks = machines.start(*TRAIN, "adapter.start=start")
    assert [rank.wait().status for rank in ranks] == [0, 0], ranks[0].said
    assert (machines.folders[0] / "runs/run/final/adapter_model.safetensors").is_file()


LONE = {
    "a rank without the data": (lambda machines: (machines.folders[1] / "pairs.jsonl").unlink(), r"pairs\.jsonl"),
    "a rank without the model": (lambda machines: shutil.rmtree(machines.folders[1] / "model"), r"model"),
    "a rank without the configuration": (lambda machines: (machines.folders[1] / "run.yaml").unlink(), r"run\.yaml"),
}


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "a rank without the data", LONE))
def test_what_one_process_alone_finds_wrong_it_says_itself(machines, name):
    spoil, what = LONE[name]
    spoil(machines)
    ranks = machines.start_second_late(*TRAIN)
    lone = ranks[1].wait()
    assert lone.status == 2, lone.said
    (error,) = errors_in(lone.said)
    assert re.match(rf"error: rank 1 \(on {re.escape(HOST)}\): .*{what}", error)
    # The other one waits to be found; a launcher ends it.
    assert ranks[0].runs
    ranks[0].send(signal.SIGTERM)
    assert ranks[0].wait().status == -signal.SIGTERM
    assert not errors_in(ranks[0].said)


MISNUMBERED = [
    ({"RANK": "2"}, 1, "RANK is 2, and WORLD_SIZE is 2"),
    ({"LOCAL_RANK": "two"}, 1, "LOCAL_RANK is not a whole number"),
    ({"WORLD_SIZE": ""}, 1, "WORLD_SIZE is not a whole number"),
]


@pytest.mark.parametrize(("env", "rank", "error"), MISNUMBERED)
def test_a_process_that_is_wrongly_numbered_says_so_itself(machines, env, rank, error):
    machines.env[rank].update(env)
    ranks = machines.start(*TRAIN)
    wrong = ranks[rank].wait()
    assert wrong.status == 2
    assert error in errors_in(wrong.said)[0]
    ranks[1 - rank].send(signal.SIGTERM)
    ranks[1 - rank].wait()


def test_a_port_that_another_program_has_is_one_error(machines):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ranks = machines.start(*TRAIN, "training.rank_timeout=5", MASTER_PORT=str(taken.getsockname()[1]))
        assert_ends(ranks, r"error: the ranks did not find each other: .*address already in use", (1, 1))


def test_processes_that_do_not_agree_on_their_number_end_in_time(machines):
    machines.env[1]["WORLD_SIZE"] = "3"
    assert_ends(machines.start(*TRAIN, "training.rank_timeout=5"), r"error: not all 2 ranks have come", (1, 1))


@pytest.mark.slow
def test_what_all_find_wrong_is_said_once(machines):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dpo_cli"]
    done = subprocess.run(
        [*command, *TRAIN, "training.epochs=-1"], cwd=machines.folders[0], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert len(errors_in(done.stderr)) == 1, done.stderr
    assert re.search(r"exitcode *: 2 ", done.stderr), done.stderr


# What takes several machines, or GPUs

ONE = Surroundings("node1", {"torch": "2.13"}, {"training.sharding": '"none"'}, "cuda", "GPU-1", "2")
ON_A_CPU = replace(ONE, device="cpu", card=None)
OLDER = [replace(ONE, host="node2", card=f"GPU-{number}", versions={"torch": "2.12"}) for number in (2, 3)]
ELSEWHERE = replace(ONE, host="node2", card="GPU-2", local_size="4")
HYBRID = [replace(one, settings={"training.sharding": '"hybrid"'}) for one in (ONE, ELSEWHERE)]


@pytest.mark.parametrize(
    ("everywhere", "error"),
    [
        ([ONE, ON_A_CPU], "rank 1 (on node1) has another kind of device than rank 0: device cpu, not cuda"),
        ([ONE, ONE], "ranks 0 and 1 compute on the same GPU of node1"),
        ([ONE, *OLDER], "ranks 1, 2 (on node2) have other versions than rank 0: torch 2.12, not 2.13"),
        (HYBRID, "rank 1 (on node2) has another number of processes than rank 0: LOCAL_WORLD_SIZE 4, not 2"),
    ],
    ids=["CPU beside GPU", "one GPU", "versions", "machines of other sizes"],
)
def test_processes_on_several_machines_and_gpus(everywhere, error):
    (found,) = differences(everywhere)
    assert found.what == error
    assert found.hint


def test_gpus_of_several_machines_are_as_many_as_processes():
    others = [replace(ONE, card="GPU-3"), ELSEWHERE]
    assert not list(differences([ONE, *others]))


def test_a_sample_of_a_model_is_another_where_any_of_its_layers_is(tmp_path, tiny_llama):
    from safetensors.torch import load_file, save_file

    before = sampled_digest(str(tiny_llama), NO_TRUST)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    assert sampled_digest(str(copy), NO_TRUST) == before
    weights = load_file(copy / "model.safetensors")
    for name in weights:
        save_file({**weights, name: weights[name] + 1}, copy / "model.safetensors", {"format": "pt"})
        assert sampled_digest(str(copy), NO_TRUST) != before, name


def changed_adapter(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    last = list(weights)[-1]
    save_file({**weights, last: weights[last] + 1}, folder / "adapter_model.safetensors", {"format": "pt"})


def test_a_sample_of_a_start_adapter_does_not_look_for_the_base_it_names(tmp_path, tiny_llama):
    """It goes on upon `model.name`: its own base may be on another machine."""
    start = save_adapter(tiny_llama, tmp_path / "start")
    file = start / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/old/path"}))
    before = sampled_adapter_digest(str(start))
    assert sampled_adapter_digest(str(shutil.copytree(start, tmp_path / "copy"))) == before
    changed_adapter(start)
    assert sampled_adapter_digest(str(start)) != before


def test_a_sample_of_an_adapter_in_the_hubs_cache_has_its_weights(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--adapter"
    snapshot = save_adapter(tiny_llama, cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    before = sampled_adapter_digest("some/adapter"), sampled_digest("some/adapter", NO_TRUST)
    assert before[0] == sampled_adapter_digest(str(snapshot))
    changed_adapter(snapshot)
    assert sampled_adapter_digest("some/adapter") != before[0]
    assert sampled_digest("some/adapter", NO_TRUST) != before[1]
