"""Of several processes one is gone: the others end in time and say which, and `--resume` finishes the run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.system.storage import verify
from tests.conftest import differing_rows, make_config, read_metrics, write_rows
from tests.faults.conftest import FULL
from tests.faults.launching import start_ranks
from tests.faults.strokes import STRUCK, WORK_SECONDS
from tests.faults.trials import Gate, named
from tests.waiting import PATIENCE

TIMEOUT = 3.0
"""`training.rank_timeout` of runs that something happens to, in seconds; the others wait as long as by default."""
LIMIT = 20 * TIMEOUT
"""How long the others may take, in seconds: the time-out, and what a busy machine is slow; by default it is longer."""

WHEREVER = r"(before step 1|at step \d)"
"""The last sign of life may be a few of these quick steps old."""

LOADING = "dpo_cli.modeling.folders.loading:load_policy"
STEP = "dpo_cli.training.learner:Learner._add_up_gradients"


@dataclass(frozen=True)
class Moment:
    """Where a rank is struck.

    Attributes:
        where: The function, as `strike` takes it.
        at: What the others have to say of it where it hangs.
        call: At which of its calls.
        fresh: Whether the run has a cache of its own, so that there is a reference to be computed.
        then: A function that is called from there, where the rank is struck.
    """

    where: str
    at: str
    call: int = 1
    fresh: bool = False
    then: str = ""


MOMENTS = {
    "load": Moment(LOADING, "before step 1"),
    "reference": Moment(
        "dpo_cli.preference.cache:ReferenceCache._compute",
        "s, while the reference was asked, before step 1",
        fresh=True,
    ),
    "step": Moment(STEP, "s, at step 4", call=4),
    "backward": Moment("accelerate:Accelerator.backward", r"s, at step \d", call=5),
    "save": Moment(
        "dpo_cli.training.checkpoints:CheckpointWriter.save", "s, while a checkpoint was saved, at step 4", call=2
    ),
    "evaluation": Moment(
        "dpo_cli.evaluation.evaluate:evaluate", "s, while held-out pairs were scored, at step 3", call=2
    ),
}

GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup"
LAYER, GRADIENTS = f"{GROUP}.post_forward", f"{GROUP}.post_backward"

WITHIN = {
    **{name: replace(MOMENTS[name], then=LAYER) for name in ("reference", "evaluation")},
    "forward": replace(MOMENTS["step"], then=LAYER),
    "backward": replace(MOMENTS["step"], then=GRADIENTS),
    "save": replace(MOMENTS["save"], then="dpo_cli.training.sharded_state:ShardedSnapshot.write_own"),
}
"""Where a rank is struck that has a shard of each weight: in the middle of a pass, which the others cannot finish."""


@dataclass
class Runs:
    """Starts runs of several processes and holds one that nothing disturbed."""

    zygote: Any
    folder: Path
    file: Path
    whole: Path
    count: int = 0
    started: list[Any] = field(default_factory=list)

    def start(
        self,
        run: Path,
        num_ranks: int,
        *arguments: object,
        fault: tuple[int, dict[str, Any]] | None = None,
        **more: Any,
    ) -> list[Any]:
        if fault:
            more["faults"] = {fault[0]: ("tests.faults.strokes:strike", fault[1])}
        # What other tests put into a cache was computed in other batches, and is rounded otherwise.
        more["env"] = {"DPO_CACHE_DIR": str(self.folder / "cache"), **(more.get("env") or {})}
        command = ["train", "--config", self.file, *arguments, f"output_dir={run}"]
        command += [f"training.rank_timeout={TIMEOUT:g}"] * bool(fault)
        ranks = start_ranks(self.zygote, num_ranks, *command, **more)
        self.started += ranks
        return ranks

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"run-{self.count}"

    def end(self) -> None:
        for rank in self.started:
            if rank.runs:
                rank.send(signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, zygote, tiny_llama, demo_rows):
    """Runs whose ranks have all weights."""
    yield from build_runs(tmp_path_factory.mktemp("ranks"), zygote, tiny_llama, demo_rows)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, zygote, tiny_llama, demo_rows):
    """Runs whose ranks have a shard of each weight."""
    yield from build_runs(tmp_path_factory.mktemp("shards"), zygote, tiny_llama, demo_rows, sharding="full")


def build_runs(folder, zygote, model, rows, **training):
    pairs = write_rows(folder / "pairs.jsonl", rows[:40])
    settings = {
        "training": {"epochs": 2, "pairs_per_step": 8, "micro_batch_tokens": 400, **training},
        "checkpoints": {"every_steps": 2, "keep": 100},
        "evaluation": {"every_steps": 3},
    }
    runs = Runs(zygote, folder, make_config(folder, model, pairs, **settings), folder / "whole")
    for rank in runs.start(runs.whole, 2):
        ended = rank.wait()
        assert ended.status == 0, ended.said
    yield runs
    runs.end()


def assert_resumes(runs, run, num_ranks=2, env=None):
    ranks = runs.start(run, num_ranks, "--resume", env=env)
    said = "".join(ended.said for ended in (rank.wait() for rank in ranks) if not ended.status)
    assert all(rank.wait().status == 0 for rank in ranks), [rank.said for rank in ranks]
    return said


def assert_same(run, whole):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run / "final" / name).read_bytes() == (whole / "final" / name).read_bytes(), name
    assert not differing_rows(run, whole)


def assert_checkpoints_whole(run):
    for checkpoint in (run / "checkpoints").glob("step-*"):
        verify(checkpoint)


def assert_named(said, rank, at, word="is gone", *, loading=False):
    line = next((line for line in said.splitlines() if line.startswith("error: ")), "")
    named = rf"error: rank {rank} \(process \d+ on {re.escape(socket.gethostname())}\) {word}.*{at}"
    # One that is gone while it loads may not have been seen by anybody before.
    unseen = rf"error: rank {rank} {word}: it never gave a sign of life"
    assert re.match(named, line) or (loading and re.match(unseen, line)), said
    assert "Traceback" not in said
    assert "hint: " in said


def seconds_to_end(survivors, since):
    for survivor in survivors:
        survivor.wait()
    return time.monotonic() - since


def struck_run(runs, num_ranks, victim, moment, how):
    """Start a run whose victim is struck; return run, survivors, victim, environment, and when it was struck."""
    run = runs.new()
    env = {"DPO_CACHE_DIR": str(runs.folder / f"cache-{runs.count}")} if moment.fresh else None
    fault = victim, {"where": moment.where, "how": how, "call": moment.call, "then": moment.then}
    ranks = runs.start(run, num_ranks, fault=fault, env=env)
    ranks[victim].until(STRUCK)
    since = time.monotonic()
    return run, [rank for rank in ranks if rank is not ranks[victim]], ranks[victim], env, since


KILLED = [(2, 1, name) for name in MOMENTS] + [(2, 0, name) for name in MOMENTS] + [(3, 1, "reference"), (3, 2, "save")]
FEW_KILLED = [(2, 1, "reference"), (2, 0, "save")]


@pytest.mark.parametrize(("num_ranks", "victim", "name"), KILLED if FULL else FEW_KILLED)
def test_one_is_killed_and_the_others_name_it(runs, ledger, num_ranks, victim, name):
    moment = MOMENTS[name]
    run, survivors, _, env, since = struck_run(runs, num_ranks, victim, moment, "kill")
    seconds = seconds_to_end(survivors, since)
    assert [survivor.wait().status for survivor in survivors] == [1] * len(survivors), survivors[0].said
    assert seconds < LIMIT, f"{seconds:.1f} s"
    assert_named(survivors[0].said, victim, WHEREVER, loading=name == "load")
    # One line is enough for one machine.
    assert not any("error: " in survivor.said for survivor in survivors[1:])
    assert_checkpoints_whole(run)
    assert_resumes(runs, run, env=env)
    if num_ranks == 2:
        assert_same(run, runs.whole)
    ledger.record("a rank killed")


@pytest.mark.parametrize(("victim", "name"), [(1, "step"), (0, "step"), (1, "evaluation")] if FULL else [(1, "step")])
def test_memory_runs_out_on_one_and_the_other_does_not_wait_for_it(runs, ledger, victim, name):
    run, (survivor,), struck, _, since = struck_run(runs, 2, victim, MOMENTS[name], "memory")
    assert seconds_to_end([survivor, struck], since) < LIMIT
    assert [survivor.wait().status, struck.wait().status] == [1, 1], survivor.said
    said = survivor.said + struck.said
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "memory ran out" in error
    assert error.startswith(f"error: rank {victim} ") or not victim
    assert_checkpoints_whole(run)
    assert_resumes(runs, run)
    assert_same(run, runs.whole)
    ledger.record("a rank whose memory runs out")


@pytest.mark.skipif(not FULL, reason="the same watch as that of `dpo train`")
def test_an_evaluation_of_several_ranks_does_not_wait_for_one_that_is_gone(runs, ledger):
    fault = "tests.faults.strokes:strike", {"where": MOMENTS["evaluation"].where, "how": "kill"}
    command = ["eval", "--config", runs.file, "--model", runs.whole / "final"]
    main, struck = start_ranks(runs.zygote, 2, *command, faults={1: fault})
    assert struck.wait().status == -signal.SIGKILL
    since = time.monotonic()
    assert seconds_to_end([main], since) < LIMIT
    assert main.wait().status == 1
    assert_named(main.said, 1, WHEREVER)
    ledger.record("a rank killed")


QUIET = [("stop", 1, "step"), ("stop", 0, "step"), ("stop", 1, "load"), ("stop", 1, "save"), *(
         ("hang", victim, name) for victim in (0, 1) for name in ("reference", "step", "backward", "save", "evaluation")
)]  # fmt: skip
FEW_QUIET = [("stop", 0, "step"), ("hang", 1, "step"), ("hang", 0, "save")]


@pytest.mark.parametrize(("how", "victim", "name"), QUIET if FULL else FEW_QUIET)
def test_one_is_stopped_or_hangs_and_the_others_do_not_wait_for_it(runs, ledger, how, victim, name):
    moment = MOMENTS[name]
    run, survivors, struck, env, since = struck_run(runs, 2, victim, moment, how)
    seconds = seconds_to_end(survivors, since)
    assert survivors[0].wait().status == 1, survivors[0].said
    assert TIMEOUT * 0.8 < seconds < LIMIT, f"{seconds:.1f} s"
    if how == "stop":
        # One that was stopped finds the others gone when it goes on.
        struck.send(signal.SIGCONT)
    assert struck.wait().status == 1, struck.said
    at, word = (f"{moment.at}$", "hangs") if how == "hang" else (WHEREVER, "is gone")
    assert_named(survivors[0].said, victim, at, word)
    assert_checkpoints_whole(run)
    assert_resumes(runs, run, env=env)
    assert_same(run, runs.whole)
    ledger.record(f"a rank that {how}s")


QUIET_WITHIN = [(how, name) for how in ("hang", "stop") for name in WITHIN]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "name"), QUIET_WITHIN if FULL else [*QUIET_WITHIN[: len(WITHIN)], ("stop", "forward")])
@pytest.mark.parametrize("victim", [0, 1] if FULL else [1])
def test_one_of_shards_that_stops_within_a_pass_is_named(sharded, ledger, how, victim, name):
    moment = WITHIN[name]
    run, (other,), struck, env, since = struck_run(sharded, 2, victim, moment, how)
    seconds = seconds_to_end([other], since)
    assert TIMEOUT * 0.8 < seconds < LIMIT, f"{seconds:.1f} s"
    if how == "stop":
        struck.send(signal.SIGCONT)
    assert [other.wait().status, struck.wait().status] == [1, 1], other.said + struck.said
    at, word = (f"{moment.at}$", "hangs") if how == "hang" else (WHEREVER, "is gone")
    assert_named(other.said, victim, at, word)
    assert_checkpoints_whole(run)
    assert_resumes(sharded, run, env=env)
    assert_same(run, sharded.whole)
    ledger.record(f"a rank with shards that {how}s")


@pytest.mark.slow
def test_one_of_shards_whose_thread_hangs_in_a_save_is_named_at_the_next(sharded, ledger):
    """The main threads take two more steps meanwhile."""
    run = sharded.new()
    fault = 1, {"where": WITHIN["save"].then, "how": "hang"}
    main, struck = sharded.start(run, 2, "checkpoints.background=true", fault=fault)
    assert [main.wait().status, struck.wait().status] == [1, 1], main.said + struck.said
    assert_named(main.said, 1, "s, while a checkpoint was saved, at step 4$", "hangs")
    assert not list((run / "checkpoints").glob("step-*"))
    assert_resumes(sharded, run)
    assert_same(run, sharded.whole)
    ledger.record("a rank with shards that hangs")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("victim", [0, 1] if FULL else [1])
def test_one_of_shards_that_is_killed_within_a_pass_is_named(sharded, ledger, victim, name):
    run, (other,), _, env, since = struck_run(sharded, 2, victim, WITHIN[name], "kill")
    assert seconds_to_end([other], since) < LIMIT
    assert other.wait().status == 1, other.said
    assert_named(other.said, victim, WHEREVER)
    assert_checkpoints_whole(run)
    assert_resumes(sharded, run, env=env)
    assert_same(run, sharded.whole)
    ledger.record("a rank with shards killed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "save"])
def test_one_of_shards_that_works_for_longer_than_the_time_out_is_waited_for(sharded, ledger, name):
    run, (other,), worker, _, _ = struck_run(sharded, 2, 1, WITHIN[name], "work")
    assert [rank.wait().status for rank in (other, worker)] == [0, 0], other.said + worker.said
    assert_same(run, sharded.whole)
    ledger.record("a rank with shards that works for long")


@pytest.mark.slow
def test_shards_that_wait_for_different_operations_say_for_which(sharded, ledger):
    run, (main,), stray, _, _ = struck_run(sharded, 2, 1, WITHIN["forward"], "stray")
    assert [main.wait().status, stray.wait().status] == [1, 1]
    assert re.search(r"error: the ranks wait for different operations: .* for barrier, .*at step 4$", main.said, re.M)
    assert "Traceback" not in main.said + stray.said
    assert_checkpoints_whole(run)
    assert_resumes(sharded, run)
    assert_same(run, sharded.whole)
    ledger.record("ranks that wait for different operations")


WORKING = [(1, "step"), (0, "save"), (1, "evaluation"), (0, "reference")]


@pytest.mark.parametrize(("victim", "name"), WORKING if FULL else WORKING[1:2])
def test_one_that_works_for_longer_than_the_time_out_is_waited_for(runs, ledger, victim, name):
    assert WORK_SECONDS > 2 * TIMEOUT
    run, (other,), worker, _, _ = struck_run(runs, 2, victim, MOMENTS[name], "work")
    assert [rank.wait().status for rank in (other, worker)] == [0, 0], other.said + worker.said
    assert_same(run, runs.whole)
    ledger.record("a rank that works for long")


@pytest.mark.parametrize("name", ["step", "evaluation", "save"] if FULL else ["step"])
def test_ranks_that_wait_for_different_operations_end_and_say_for_which(runs, ledger, name):
    run, (main,), stray, _, since = struck_run(runs, 2, 1, MOMENTS[name], "stray")
    seconds = seconds_to_end([main, stray], since)
    assert TIMEOUT * 0.8 < seconds < LIMIT, f"{seconds:.1f} s"
    assert [main.wait().status, stray.wait().status] == [1, 1]
    (error,) = [line for line in (main.said + stray.said).splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the ranks wait for different operations: rank 0 (process "), main.said
    assert re.search(r"; rank 1 \(process \d+ on \S+\) for barrier, operation \d+ of default_pg, ", error), main.said
    assert "hint: start all ranks with the same version" in main.said
    assert "Traceback" not in main.said + stray.said
    assert_checkpoints_whole(run)
    assert_resumes(runs, run)
    assert_same(run, runs.whole)
    ledger.record("ranks that wait for different operations")


def test_a_checkpoint_that_a_rank_is_writing_is_finished_before_it_ends(runs, ledger, tmp_path):
    """The other one is killed, and the disk takes longer than the time-out."""
    run, gate = runs.new(), Gate(tmp_path / "gate")
    main, other = runs.start(
        run, 2, f"training.rank_timeout={TIMEOUT:g}", faults={0: named(gate.at_flush("/checkpoints/"))}
    )
    gate.wait_for(main)
    other.send(signal.SIGKILL)
    time.sleep(2 * TIMEOUT)
    assert main.runs
    gate.open()
    assert main.wait().status == 1
    assert_named(main.said, 1, WHEREVER)
    verify(run / "checkpoints" / "step-000002")
    ledger.record("a rank killed")


@pytest.mark.skipif(not FULL, reason="it takes longer than the time-out, of course")
def test_all_stopped_together_go_on_together(runs, ledger):
    """As a job scheduler suspends a job, for longer than the time-out."""
    run = runs.new()
    ranks = runs.start(run, 2, f"training.rank_timeout={TIMEOUT:g}")
    ranks[0].until("step 2/")
    for rank in ranks:
        rank.send(signal.SIGSTOP)
    time.sleep(TIMEOUT + 1)
    for rank in ranks:
        rank.send(signal.SIGCONT)
    assert [rank.wait().status for rank in ranks] == [0, 0], ranks[0].said
    assert_same(run, runs.whole)
    ledger.record("all ranks suspended")


def test_one_that_never_comes_is_not_waited_for(runs, ledger):
    run = runs.new()
    fault = 1, {"where": "dpo_cli.pipeline.session:start_accelerator", "how": "kill"}
    main, struck = runs.start(run, 2, fault=fault)
    struck.wait()
    since = time.monotonic()
    assert main.wait().status == 1
    assert time.monotonic() - since < LIMIT
    assert "not all 2 ranks have come within 3 s" in main.said
    assert "Traceback" not in main.said
    ledger.record("a rank that never comes")


@pytest.mark.parametrize("victim", [0, 1] if FULL else [1])
def test_one_that_fails_takes_the_others_with_it(runs, ledger, victim):
    """Only the main process has a console: it says what another failed of."""
    run, survivors, struck, _, since = struck_run(runs, 2, victim, MOMENTS["save"], "fail")
    assert seconds_to_end(survivors, since) < LIMIT
    assert [rank.wait().status for rank in (*survivors, struck)] == [1, 1]
    main, other = (survivors[0], struck) if victim else (struck, survivors[0])
    assert re.search("^error: .*no space left on device", main.said, re.MULTILINE | re.IGNORECASE), main.said
    assert "error: " not in other.said
    assert "Traceback" not in main.said + other.said
    assert_checkpoints_whole(run)
    ledger.record("a rank that fails")


def test_one_that_is_told_to_stop_while_loading_takes_the_others_with_it(runs, ledger):
    run = runs.new()
    main, other = runs.start(run, 2, fault=(1, {"where": LOADING, "how": "terminate"}))
    assert other.wait().status == 143
    assert main.wait().status == 143
    assert_named(main.said, 1, "stopped by SIGTERM", "ended")
    ledger.record("a rank told to stop while loading")


SIGNALS = [(signal.SIGUSR1, 138), (signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "status"), SIGNALS if FULL else SIGNALS[:1])
@pytest.mark.parametrize("victim", [0, 1] if FULL else [1])
def test_one_alone_is_told_to_stop_and_all_save(runs, ledger, tmp_path, number, status, victim):
    run, gate = runs.new(), Gate(tmp_path / "gate")
    ranks = runs.start(run, 2, faults={0: named(gate.at_step(2))})
    gate.wait_for(ranks[0])
    ranks[victim].send(number)
    gate.open()
    assert [rank.wait().status for rank in ranks] == [status] * 2, ranks[0].said
    assert "saved" in ranks[0].said
    done = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    assert f"resuming after step {done}" in assert_resumes(runs, run)
    assert_same(run, runs.whole)
    ledger.record("a rank told to stop")


def test_with_another_number_of_processes_it_goes_on_at_the_right_pair_and_says_so(runs, ledger):
    run = shutil.copytree(runs.whole, runs.new())
    shutil.rmtree(run / "final")
    for checkpoint in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    said = assert_resumes(runs, run, num_ranks=1)
    assert "at the right pair, but perhaps not bit for bit: processes 2 → 1" in said
    ours, theirs = read_metrics(run), read_metrics(runs.whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-5)
    ledger.record("another number of ranks")


@pytest.mark.skipif(not FULL, reason="three processes that import torch; `make faults` runs it")
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_under_torchrun_no_traceback_of_ours_is_shown(runs, ledger, sharding):
    """The launcher ends the others itself."""
    run = runs.new()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "dpo_cli", "train", "--config", str(runs.file), f"output_dir={run}"]
    command += ["training.epochs=50", f"training.sharding={sharding}"]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=surroundings) as launched:
        said = ""
        for line in launched.stderr:
            said += line
            if line.startswith("step 2/"):
                os.kill(_child(launched.pid, rank=1), signal.SIGKILL)
        assert launched.wait(PATIENCE) == 1
    # The launcher shows one of its own.
    assert "dpo_cli/" not in said, said
    assert_checkpoints_whole(run)
    ledger.record("a rank killed under torchrun")


def _child(launcher: int, rank: int) -> int:
    """Return the process of a rank that a launcher started."""
    import psutil

    children = psutil.Process(launcher).children(recursive=True)
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))
