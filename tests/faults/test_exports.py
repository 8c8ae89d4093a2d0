"""Exports that end at any file operation or moment, or find the disk full: every form is whole or absent."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_config, write_rows
from tests.faults.conftest import FULL
from tests.faults.ledger import Ledger, Outcome
from tests.faults.power import KEPT
from tests.faults.runs import Point
from tests.faults.shares import SHARES, chosen, report
from tests.faults.shim import CRASHED
from tests.faults.trials import Broken, Fault, Gate, change_disk, content, disk, judged, named, require_error
from tests.faults.zygote import Ended, Running, Zygote

KINDS = {
    "a model": ("whole",),
    "an adapter": ("adapted",),
    "a merged model": ("adapted", "--merge"),
    "a GGUF file": ("adapted", "--merge", "--gguf", "q8_0"),
}
"""What is written, by the run that it is taken out of and the options."""

NUM_KILLS = 3 if FULL else 2
"""Of each kind and share."""

ADAPTERS = {"whole": None, "adapted": {"rank": 4}}


@dataclass
class Bench:
    """Exports of one kind.

    Attributes:
        zygote: Starts them.
        folder: Holds the runs.
        arguments: What is exported, and how.
        expected: The files of an export that nothing happens to.
        points: Where an export can be ended.
        before: The files of the runs, as they were.
    """

    zygote: Zygote
    folder: Path
    arguments: tuple[str, ...]
    expected: dict[str, bytes] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    before: dict[str, bytes] = field(default_factory=dict)

    @property
    def target(self) -> Path:
        """Where exports are written that share a disk with the runs."""
        return self.folder / "made" / "out"

    def start(self, target: Path, fault: Fault | None = None) -> Running:
        """Start an export."""
        arguments = ("export", *self.arguments, "--to", target, "--quiet")
        return self.zygote.start(*arguments, cwd=self.folder, fault=fault)

    def run(self, target: Path, fault: Fault | None = None) -> Ended:
        """Export to the end, whatever it is."""
        return self.start(target, fault).wait()

    def count(self, log: Path) -> None:
        """Export once with nothing in the way, and note what is written and where it can be ended."""
        self.before = self.runs()
        shutil.rmtree(self.target.parent, ignore_errors=True)
        ended = self.run(self.target, ("tests.faults.shim:count", {"root": str(self.folder), "log": str(log)}))
        assert ended.status == 0, ended.said
        self.expected = content(self.target)
        for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
            self.points += [Point(number), *([Point(number, half=True)] if json.loads(line)["halves"] else [])]
        shutil.rmtree(self.target.parent)

    def runs(self) -> dict[str, bytes]:
        """Return the files of the runs, and of what they read."""
        return {name: data for name, data in content(self.folder).items() if not name.startswith("made/")}

    def require(self, target: Path) -> None:
        """Require a target that is whole or absent, and runs as they were."""
        if self.runs() != self.before:
            raise Broken(Outcome.LOST, "the runs have other bytes")
        if target.exists() and content(target) != self.expected:
            raise Broken(Outcome.WRONG, f"{target} has other bytes")

    def require_next(self, target: Path) -> None:
        """Require that the next export succeeds, and leaves nothing beside what it writes."""
        shutil.rmtree(target, ignore_errors=True)
        ended = self.run(target)
        if ended.status:
            raise Broken(Outcome.LOST, ended.said)
        self.require(target)
        if [*target.parent.iterdir()] != [target]:
            raise Broken(Outcome.LOST, f"not the target alone: {[*target.parent.iterdir()]}")
        shutil.rmtree(target.parent)


@pytest.fixture(scope="module")
def benches(tmp_path_factory, zygote, tiny_llama, demo_rows) -> Callable[[str], Bench]:
    """Return the bench of a kind; all have the same runs."""
    folder = tmp_path_factory.mktemp("exports")
    shutil.copytree(tiny_llama, folder / "base")
    pairs = write_rows(folder / "pairs.jsonl", demo_rows[:28])
    for run, adapter in ADAPTERS.items():
        training = {"max_steps": 2, "learning_rate": 1e-2}
        config = make_config(folder, folder / "base", pairs, run, adapter=adapter, training=training, output_dir=run)
        ended = zygote.run("train", "--config", config, "--quiet", cwd=folder)
        assert ended.status == 0, ended.said

    @functools.cache
    def find(kind: str) -> Bench:
        bench = Bench(zygote, folder, KINDS[kind])
        bench.count(tmp_path_factory.mktemp("operations") / "log.jsonl")
        return bench

    return find


def crash(bench: Bench, point: Point, aside: Path) -> Fault:
    return "tests.faults.shim:crash_at", {"root": str(bench.folder), "operation": point.operation, "half": point.half}


def power_cut(bench: Bench, point: Point, aside: Path) -> Fault:
    """What is kept of what was not synced is a matter of chance."""
    where = {"root": str(bench.folder), "aside": str(aside / str(point)), "operation": point.operation}
    kept = random.Random(point.operation).choice([*KEPT])
    return "tests.faults.shim:cut_power_at", where | {"kept": kept, "seed": point.operation}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fault", "few"), [(crash, 3), (power_cut, 1)])
def test_the_target_is_whole_or_absent_wherever_an_export_ends(
    benches: Callable[[str], Bench], ledger: Ledger, tmp_path: Path, fault: Any, few: int, kind: str, share: int
) -> None:
    """Each begins without what the others left, which would be operations more; all of that the next one removes."""
    bench, troubles, strays = benches(kind), [], tmp_path / "strays"
    points = [point for point in bench.points if fault is crash or not point.half]
    for point in chosen(points, share, 1, few):
        ended = bench.run(bench.target, fault(bench, point, tmp_path / "aside"))
        try:
            with judged(ledger, f"{fault.__name__.replace('_', ' ')} at a file operation: export of {kind}"):
                if ended.status != CRASHED:
                    raise Broken(Outcome.WRONG, f"status {ended.status}:\n{ended.said}")
                bench.require(bench.target)
        except Broken as broken:
            troubles.append(f"{point}: {broken}")
        if bench.target.parent.exists():
            shutil.copytree(bench.target.parent, strays, dirs_exist_ok=True)
            shutil.rmtree(bench.target.parent)
    shutil.copytree(strays, bench.target.parent)
    bench.require_next(bench.target)
    report(troubles)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_killed_at_any_moment_leaves_a_target_that_is_whole_or_absent(
    benches: Callable[[str], Bench], ledger: Ledger, kind: str, share: int
) -> None:
    """One after the other, each beside what those before it left."""
    bench, chance, kills = benches(kind), random.Random(share), 0
    before = bench.zygote.cpu_seconds()
    bench.require_next(bench.target)
    cpu_seconds = bench.zygote.cpu_seconds() - before
    while kills < NUM_KILLS:
        # One that was quicker is finished.
        if bench.start(bench.target).kill_after(chance.uniform(0, cpu_seconds)):
            kills += 1
            with judged(ledger, f"SIGKILL at a random moment: export of {kind}"):
                bench.require(bench.target)
        shutil.rmtree(bench.target, ignore_errors=True)
    bench.require_next(bench.target)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Another disk than the one of the runs."""
    with disk(tmp_path / "disk", 2**30) as folder:
        yield folder


@pytest.mark.parametrize("number", range(1, 13) if FULL else [5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_does_not_keep_what_is_written_is_an_error(
    benches: Callable[[str], Bench], ledger: Ledger, tmp_path: Path, kind: str, number: int
) -> None:
    """A flush that fails, whichever it is, but for those of what is only kept to be quicker the next time."""
    bench, target = benches(kind), tmp_path / "made" / "out"
    with judged(ledger, f"disk: failing flush of an export of {kind}"):
        ended = bench.run(target, named(("failing_flush", {"number": number})))
        if ended.status or not target.exists():
            require_error(ended, "failed: input/output error")
        bench.require(target)
        if left := [*tmp_path.rglob(".*")]:
            raise Broken(Outcome.LOST, f"left behind: {left}")


@pytest.mark.parametrize("share", [place / 12 for place in range(12)] if FULL else [0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_an_error_and_leaves_nothing(
    small_disk: Path, benches: Callable[[str], Bench], ledger: Ledger, kind: str, share: float
) -> None:
    """On a disk that is not that of the runs, where nothing can be renamed from one to the other."""
    bench, target = benches(kind), small_disk / "made" / "out"
    change_disk(small_disk, f"size={4096 + int(share * sum(map(len, bench.expected.values())))}")
    with judged(ledger, f"disk: full for an export of {kind}"):
        require_error(bench.run(target), "(writing|locking) .* failed: no space left")
        bench.require(target)
        if left := [*small_disk.iterdir()]:
            raise Broken(Outcome.LOST, f"left behind: {left}")
        change_disk(small_disk, f"size={2**30}")
        bench.require_next(target)


def folder_with_notes(target: Path) -> None:
    target.mkdir()
    (target / "notes.txt").touch()


MADE: dict[str, Callable[[Path], object]] = {
    "a folder": folder_with_notes,
    "an empty folder": Path.mkdir,
    "a file": Path.touch,
    "a link": lambda target: target.symlink_to("nowhere"),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("kind", KINDS if FULL else ["a merged model"])
def test_a_target_that_another_process_makes_meanwhile_stays(
    tmp_path: Path, benches: Callable[[str], Bench], ledger: Ledger, kind: str, made: str
) -> None:
    """Made while what was written is flushed, when it has been proved."""
    bench, gate, target = benches(kind), Gate(tmp_path / "gate"), tmp_path / "there" / "out"
    with judged(ledger, "export: the target is made by another process"):
        exporting = bench.start(target, named(gate.at_flush(f"/.{target.name}.tmp-")))
        gate.wait_for(exporting)
        MADE[made](target)
        before = target.lstat()
        gate.open()
        require_error(exporting.wait(), "failed: file exists")
        assert target.lstat() == before
        assert list(target.parent.rglob("*")) == ([target, target / "notes.txt"] if made == "a folder" else [target])
