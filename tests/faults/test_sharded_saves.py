"""What strikes a process while a model that is sharded over several is saved: nothing is lost, none waits for it."""

from __future__ import annotations

import re
import shutil
import signal
import time

import pytest
from transformers import AutoModelForCausalLM

from dpo_cli.modeling.folders import saved_weights
from dpo_cli.system.storage import verify
from tests.conftest import differing_rows, make_config, write_rows
from tests.faults.conftest import FULL
from tests.faults.launching import start_ranks

TIMEOUT, LIMIT = 3.0, 60.0
"""`training.rank_timeout` of runs that are struck, in seconds, and how long the others may take on a busy machine."""

OWN = "dpo_cli.training.sharded_state:write_part"
SEAL = "dpo_cli.training.checkpoints:finish_folder"
ATTEND = "dpo_cli.modeling.folders.saved_weights:SavedWeights.attend"


def small_files() -> None:
    """Let a model be saved in many files."""
    saved_weights.LARGEST_BYTES = 40_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory, zygote, tiny_llama, demo_rows):
    """Return what starts runs of two processes on one configuration, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("sharded-saves")
    settings = {
        "training": {"pairs_per_step": 8, "micro_batch_tokens": 400, "sharding": "full"},
        "checkpoints": {"every_steps": 2, "keep": 100},
    }
    file = make_config(folder, tiny_llama, write_rows(folder / "pairs.jsonl", demo_rows[:40]), **settings)
    started = []

    def start(run, *arguments, faults=None):
        command = ["train", "--config", file, *arguments, f"output_dir={run}"]
        command += [f"training.rank_timeout={TIMEOUT:g}"] * bool(faults)
        ranks = start_ranks(zygote, 2, *command, env={"DPO_CACHE_DIR": str(folder / "cache")}, faults=faults)
        started.extend(ranks)
        return ranks

    whole = folder / "whole"
    assert [rank.wait().status for rank in start(whole)] == [0, 0], started[0].said
    yield start, whole
    for rank in started:
        if rank.runs:
            rank.send(signal.SIGKILL)


def assert_finishes(start, run, whole):
    """What there is is whole, and the run ends with the same bytes."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        verify(checkpoint)
    ranks = start(run, "--resume")
    assert [rank.wait().status for rank in ranks] == [0, 0], ranks[0].said
    ours, theirs = (folder / "final" / "model.safetensors" for folder in (run, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not differing_rows(run, whole)


DEATHS = [
    (OWN, "kill", 1),
    (OWN, "hang", 1),
    (SEAL, "kill", 0),
    (OWN, "kill", 0),
    (OWN, "stop", 0),
    (ATTEND, "hang", 1),
]


@pytest.mark.parametrize(("where", "how", "victim"), DEATHS if FULL else DEATHS[1:3])
def test_one_that_is_gone_is_named_and_the_older_checkpoint_is_whole(runs, ledger, tmp_path, where, how, victim):
    """In the second save; in the first call of all where the trained model is gathered."""
    start, whole = runs
    call = {OWN: 5, SEAL: 2, ATTEND: 1}[where]
    ranks = start(tmp_path / "run", faults={victim: ("tests.faults.strokes:strike", stroke(where, how, call))})
    ranks[victim].until("struck")
    since = time.monotonic()
    survivor = ranks[1 - victim].wait()
    assert time.monotonic() - since < LIMIT
    assert survivor.status == 1 and "Traceback" not in survivor.said, survivor.said
    assert f"error: rank {victim} " in survivor.said
    ranks[victim].send(signal.SIGKILL)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    assert_finishes(start, tmp_path / "run", whole)
    ledger.record("a rank with shards that is gone during a save")


def stroke(where, how, call):
    return {"where": where, "how": how, "call": call}


@pytest.mark.parametrize(("where", "victim"), [(OWN, 1), (SEAL, 0)] if FULL else [(OWN, 1)])
def test_what_the_disk_refuses_one_process_is_one_error(runs, ledger, tmp_path, where, victim):
    start, whole = runs
    fault = "tests.faults.strokes:strike", stroke(where, "fail", {OWN: 5, SEAL: 2}[where])
    ended = [rank.wait() for rank in start(tmp_path / "run", faults={victim: fault})]
    assert [one.status for one in ended] == [1, 1], ended[0].said
    said = ended[0].said + ended[1].said
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert re.search(rf"error: rank {victim} \(on \S+\): saving a checkpoint failed: no space left on device", said)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert_finishes(start, tmp_path / "run", whole)
    ledger.record("disk: a checkpoint of shards refused one rank")


def test_a_trained_model_of_many_files_is_an_ordinary_folder(runs, tmp_path):
    start, whole = runs
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    small = (f"{__name__}:small_files", {})
    ranks = start(run, "--resume", faults={0: small, 1: small})
    assert [rank.wait().status for rank in ranks] == [0, 0], ranks[0].said
    assert len(list((run / "final").glob("model-*.safetensors"))) > 2
    assert (run / "final" / "model.safetensors.index.json").is_file()
    models = [AutoModelForCausalLM.from_pretrained(folder / "final") for folder in (run, whole)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
