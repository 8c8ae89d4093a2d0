"""A small run that is broken again and again, and what must have become of it in the end."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.system.storage import DamagedFolder, verify
from dpo_cli.training.run_folder import checkpoints_in
from tests.builders import save_adapter
from tests.conftest import differing_rows, make_config, read_rows, without_clock, write_rows
from tests.faults.launching import free_port
from tests.faults.ledger import Ledger, Outcome
from tests.faults.zygote import Ended, Running, Zygote

SAVED_EVERY = 2
SPLITS = ("train", "eval")

# Cut by a number of its own: a run with another cache would measure one anew, and round otherwise.
_TRAINING = {"epochs": 2, "pairs_per_step": 5, "micro_batch_tokens": 600}
_CHECKPOINTS = {"every_steps": SAVED_EVERY, "keep": 2}
_SETTINGS: dict[str, Any] = {
    "training": _TRAINING,
    "checkpoints": _CHECKPOINTS,
    "evaluation": {"every_steps": 3},
    # Every case has the same name for it, since the model card holds it.
    "output_dir": "run",
}

# Its held-out loss is lowest after step 2, so that patience ends it after step 5.
_BEST: dict[str, Any] = {
    "loss": {"type": "dpo", "label_smoothing": 0.3},
    "training": {**_TRAINING, "learning_rate": 1e-2},
    "evaluation": {"every_steps": 1, "best_by": "loss", "patience": 3, "samples": 1},
    "checkpoints": {**_CHECKPOINTS, "keep": 1},
}

RUNS: dict[str, dict[str, Any]] = {
    "dpo": {},
    # It remembers something from step to step, and so does its reference, which moves.
    "bco": {
        "loss": "bco",
        "reference": {"type": "synced", "every_steps": 3, "alpha": 0.5},
        "training": {**_TRAINING, "layout": "padded"},
    },
    # What it goes on from is not in its checkpoints, and each pass draws random numbers.
    "lora": {
        "adapter": {"rank": 4, "dropout": 0.2, "start": "start"},
        "reference": {"type": "synced", "every_steps": 3, "alpha": 0.5},
    },
    "nf4": {"model": {"quantize": "nf4"}, "adapter": {"rank": 4}},
    "split": {"model": {"weights": "split"}, "training": {**_TRAINING, "optimizer": "adamw_8bit"}},
    "dpo, saved in the background": {
        "checkpoints": {**_CHECKPOINTS, "background": True},
        "training": {**_TRAINING, "layout": "padded"},
    },
    "best": {**_BEST, "checkpoints": {**_BEST["checkpoints"], "keep_best": 2}},
    "best, saved in the background": {
        **_BEST,
        "checkpoints": {**_BEST["checkpoints"], "background": True},
        "training": {**_BEST["training"], "layout": "padded"},
    },
}
"""The kinds of run that are broken."""

_SHARDED: dict[str, Any] = {**_TRAINING, "sharding": "full", "rank_timeout": 30}
SHARDED_RUNS: dict[str, dict[str, Any]] = {
    "shards": {"training": _SHARDED},
    "shards of an adapter": {
        "adapter": {"rank": 4, "dropout": 0.2, "start": "start"},
        "reference": {"type": "synced", "every_steps": 3, "alpha": 0.5},
        "training": _SHARDED,
    },
    "shards, saved in the background": {
        "checkpoints": {**_CHECKPOINTS, "background": True},
        "training": {**_SHARDED, "layout": "padded"},
    },
    "shards, the best": {**_BEST, "training": {**_SHARDED, "learning_rate": 1e-2}},
}
"""Those of several processes that each have a part of all weights."""

_NUM_PAIRS = 25

Fault = tuple[str, dict[str, Any]]
"""A function as `module:name`, and its arguments."""


@dataclass(frozen=True)
class Point:
    """Where a run is ended: before a file operation, or when half of its bytes are written."""

    operation: int
    half: bool = False


class Bench:
    """One kind of run: how it goes when nothing happens, and cases in which something does.

    Args:
        zygote: Forks the runs.
        folder: Where the cases stand.
        config: The configuration, whose output folder is `run`.
        num_ranks: Processes of each run.
        background: Whether checkpoints are written while the run goes on.
    """

    def __init__(self, zygote: Zygote, folder: Path, config: Path, num_ranks: int, *, background: bool) -> None:
        self.zygote, self.folder, self.config, self.num_ranks = zygote, folder, config, num_ranks
        self.background = background
        self._num_cases = 0

    def case(self) -> Case:
        """Return a run that has not begun."""
        self._num_cases += 1
        return Case(self, self.folder / f"case-{self._num_cases}")

    @functools.cached_property
    def whole(self) -> Case:
        """The run that nothing happens to; the file operations of each process are counted."""
        case = self.case()
        faults = {
            rank: ("tests.faults.shim:count", {"root": str(case.folder), "log": str(self._log(rank))})
            for rank in range(self.num_ranks)
        }
        ended = case.wait(case.start(faults=faults))
        assert ended.status == 0, ended.said
        steps, evaluated = ([row["step"] for row in case.metrics() if row["split"] == split] for split in SPLITS)
        assert steps == list(range(1, len(steps) + 1))
        assert {row["step"] for row in read_rows(case.output / "samples.jsonl")} == set(evaluated)
        return case

    @property
    def operations(self) -> list[dict[str, Any]]:
        """The file operations of the first process: kind, path, and whether it can be done by half."""
        return self._operations(0)

    def points(self, rank: int = 0) -> list[Point]:
        """Return every point at which a process can be ended."""
        found = []
        for number, operation in enumerate(self._operations(rank), 1):
            found += [Point(number), Point(number, half=True)] if operation["halves"] else [Point(number)]
        return found

    def _operations(self, rank: int) -> list[dict[str, Any]]:
        assert self.whole
        return [json.loads(line) for line in self._log(rank).read_text(encoding="utf-8").splitlines()]

    def _log(self, rank: int) -> Path:
        return self.folder / f"operations-{rank}.jsonl"


class Case:
    """A run in a folder of its own, with a cache of its own.

    Args:
        bench: What kind of run it is.
        folder: The folder.
    """

    def __init__(self, bench: Bench, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.bench, self.folder, self.output = bench, folder, folder / "run"
        self._said = ""
        self._saved = 0

    def start(self, *arguments: object, faults: Mapping[int, Fault] | None = None) -> list[Running]:
        """Start the processes of the run; some have a fault, by their rank."""
        number, port = self.bench.num_ranks, free_port()
        return [
            self.bench.zygote.start(
                "train",
                *("--config", self.bench.config, *arguments),
                cwd=self.folder,
                env={"DPO_CACHE_DIR": str(self.folder / "cache"), **_surroundings(rank, number, port)},
                fault=(faults or {}).get(rank),
            )
            for rank in range(number)
        ]

    def wait(self, ranks: Sequence[Running], victim: int = 0, *, left: bool = False) -> Ended:
        """Wait for the end of all processes; return how the victim ended, if it failed, with all that was said.

        Args:
            ranks: The processes.
            victim: The rank of the one that something may happen to.
            left: Whether the others are left to end by themselves where it fails, not killed as by a launcher.
        """
        status = ranks[victim].wait().status
        for other in [rank for rank in ranks if rank is not ranks[victim]]:
            if status and not left:
                other.send(signal.SIGKILL)
            status = status or other.wait().status
        ended = Ended(status, "".join(rank.wait().said for rank in ranks))
        self._said += ended.said
        self._saved = max(self._saved, _saved(ended.said, SAVED_EVERY if self.bench.background else 0))
        return ended

    def run(self, *arguments: object, fault: Fault | None = None, victim: int = 0, left: bool = False) -> Ended:
        """Run to the end, whatever it is."""
        return self.wait(self.start(*arguments, faults={victim: fault} if fault else None), victim, left=left)

    def finish(self, ledger: Ledger, kind: str, *, wrong: str = "", cases: int = 1) -> str:
        """Resume the run and take down what became of it; return what is wrong, or nothing.

        Args:
            ledger: Takes it down.
            kind: The kind of fault.
            wrong: What was found to be wrong before.
            cases: How many faults there were.
        """
        saved = self._saved
        outcome, reason = self._judge(self.run("--resume"), saved)
        if wrong and outcome is Outcome.SURVIVED:
            outcome, reason = Outcome.WRONG, wrong
        ledger.record(kind, outcome, cases)
        if outcome is Outcome.SURVIVED:
            shutil.rmtree(self.folder)
        return reason and f"{kind}: {outcome.value}: {reason}\n{self._said}"

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`, but for the speed."""
        return without_clock(read_rows(self.output / "metrics.jsonl"))

    def _judge(self, ended: Ended, saved: int) -> tuple[Outcome, str]:
        """Compare a resumed run with what was promised, before which the checkpoint of a step was saved."""
        if "Traceback" in self._said:
            return Outcome.TRACEBACK, "a traceback"
        if ended.status:
            return Outcome.LOST, f"the resumed run ended with status {ended.status}"
        if (resumed := _resumed(ended.said)) < saved:
            return Outcome.LOST, f"step {saved} was saved; the run went on after step {resumed}"
        whole = self.bench.whole
        for name in ("final", *_to_compare(whole.output)):
            if differing := _differing(self.output / name, whole.output / name):
                return Outcome.WRONG, f"other bytes in {name}: {', '.join(differing)}"
        if differing := differing_rows(self.output, whole.output):
            return Outcome.WRONG, f"other rows in {', '.join(differing)}"
        kept, expected = (len(checkpoints_in(run.output / "checkpoints")) for run in (self, whole))
        if kept != expected:
            return Outcome.WRONG, f"{kept} checkpoints in place of {expected}"
        if left := self._left_behind():
            return Outcome.WRONG, f"left behind: {', '.join(left)}"
        return Outcome.SURVIVED, ""

    def _left_behind(self) -> list[str]:
        """Return what should be gone: hidden files and folders, and what is left of checkpoints."""
        # The lock of a process that ended does no harm, and stays where nobody has needed it since.
        hidden = [path for path in self.folder.rglob(".*") if not path.name.endswith(".lock")]
        damaged = [path for path in (self.output / "checkpoints").iterdir() if not _is_whole(path)]
        return [str(path.relative_to(self.folder)) for path in hidden + damaged]


def build_bench(
    zygote: Zygote, folder: Path, model: Path, rows: Sequence[dict[str, str]], name: str, num_ranks: int
) -> Bench:
    """Write the configuration of a kind of run, a name of `RUNS` or `SHARDED_RUNS`.

    Its two epochs are eight steps; it saves in their middle, evaluates in between and drops old checkpoints.
    """
    short = sorted(rows, key=lambda row: sum(map(len, row.values())))[:_NUM_PAIRS]
    pairs, settings = write_rows(folder / "pairs.jsonl", short), {**_SETTINGS, **{**RUNS, **SHARDED_RUNS}[name]}
    config = make_config(folder, model, pairs, "run", **with_start(settings, model, folder))
    return Bench(zygote, folder, config, num_ranks, background="background" in settings["checkpoints"])


def with_start(settings: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """Save in a folder the adapter that settings name to go on from, if one; return settings that name it there."""
    adapter = settings.get("adapter")
    if not isinstance(adapter, dict) or "start" not in adapter:
        return settings
    start = save_adapter(model, folder / adapter["start"], rank=adapter["rank"])
    return {**settings, "adapter": {**adapter, "start": str(start)}}


def _surroundings(rank: int, number: int, port: int) -> dict[str, str]:
    """Return the environment variables by which a launcher tells a process which one it is."""
    if number == 1:
        return {}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _saved(said: str, delay: int) -> int:
    """Return the last step whose checkpoint stood whole by what a run said: it went on after it, or named it.

    Args:
        said: What the run said.
        delay: Steps that it may have gone on for while the checkpoint was written.
    """
    shown = [int(number) for number in re.findall(r"^step (\d+)/", said, re.MULTILINE)]
    named = [int(number) for number in re.findall(r"; saved .*/step-(\d+)$", said, re.MULTILINE)]
    return max([0, *named, *((step - 1) // SAVED_EVERY * SAVED_EVERY - delay for step in shown)])


def _resumed(said: str) -> int:
    """Return the step after which a resumed run went on."""
    found = re.search(r"^resuming after step (\d+):", said, re.MULTILINE)
    # One that is finished has nothing left to lose.
    return int(found[1]) if found else 10**9 if "is finished: " in said else 0


def _to_compare(output: Path) -> list[str]:
    """Return the newest checkpoint and those of the best steps; where a signal stopped a run, it saved others."""
    *_, newest = checkpoints_in(output / "checkpoints")
    settings = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    losses = {}
    if settings["evaluation"]["best_by"]:
        rows = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses = {row["step"]: row["loss"] for row in rows if row["split"] == "eval" and row["step"]}
    kept = sorted(losses, key=losses.__getitem__)[: max(settings["checkpoints"]["keep_best"], 1)]
    return [f"checkpoints/{name}" for name in {newest.name, *(f"step-{step:06d}" for step in kept)}]


def _is_whole(folder: Path) -> bool:
    try:
        return bool(verify(folder))
    except DamagedFolder:
        return False


def _differing(ours: Path, theirs: Path) -> list[str]:
    """Return the files that two folders do not have in common, byte for byte."""
    a, b = ({path.relative_to(folder): path.read_bytes() for path in _files(folder)} for folder in (ours, theirs))
    return sorted(str(name) for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
