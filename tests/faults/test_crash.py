"""A run that ends at any file operation, or with the power, is finished by `--resume` as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import FULL
from tests.faults.ledger import Ledger
from tests.faults.power import KEPT
from tests.faults.runs import Bench, Case, Point
from tests.faults.shares import MOST, SHARDED, SHARES, SOME, chosen, report, thinned
from tests.faults.shim import CRASHED

KINDS = [*((name, 1) for name in MOST), ("dpo", 2), ("bco", 2), *([("best", 2)] if FULL else [])]
NAMES = {1: "one process", 2: "two processes"}


def crash(case: Case, point: Point, *arguments: str, victim: int = 0, left: bool = False) -> bool:
    """Run until a process ends at a point; tell whether it got there."""
    where = {"root": str(case.folder), "operation": point.operation, "half": point.half}
    ended = case.run(*arguments, fault=("tests.faults.shim:crash_at", where), victim=victim, left=left)
    assert ended.status in (CRASHED, 0), ended.said
    return ended.status == CRASHED


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("name", "num_ranks"), KINDS)
def test_a_crash_at_any_file_operation_costs_nothing(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, num_ranks: int, share: int
) -> None:
    run, troubles = bench(name, num_ranks), []
    every, few = (thinned(name), 3) if num_ranks == 1 else (8, 1)
    for point in chosen(run.points(), share, every, few):
        case = run.case()
        assert crash(case, point)
        trouble = case.finish(ledger, f"crash at a file operation: {name}, {NAMES[num_ranks]}")
        troubles.append(trouble and f"{point}: {trouble}")
    report(troubles)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("name", SHARDED)
def test_a_crash_of_one_process_that_has_a_part_of_the_weights_costs_nothing(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, victim: int, share: int
) -> None:
    """After every second point the other process is left to end by itself; after the others a launcher kills it."""
    run, troubles = bench(name, 2), []
    for place, point in enumerate(chosen(run.points(victim), share, 2 * thinned(name), 2)):
        case = run.case()
        assert crash(case, point, victim=victim, left=place % 2 == 0)
        trouble = case.finish(ledger, f"crash at a file operation: {name}, rank {victim} of two")
        troubles.append(trouble and f"{point}: {trouble}")
    report(troubles)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kept", KEPT if FULL else ["nothing"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_power_cut_of_one_of_two_machines_that_share_a_disk_costs_nothing_that_was_saved(
    bench: Callable[[str, int], Bench], ledger: Ledger, victim: int, kept: str, share: int
) -> None:
    """What the other machine has written is on the disk: the one whose power fails loses what it had not synced."""
    run, troubles = bench("shards", 2), []
    for point in chosen([point for point in run.points(victim) if not point.half], share, 10, 1):
        case = run.case()
        cut_power(case, point, kept, seed=point.operation, victim=victim)
        trouble = case.finish(ledger, f"power cut at a file operation: shards, rank {victim} of two")
        troubles.append(trouble and f"{point}, kept {kept}: {trouble}")
    report(troubles)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SOME)
def test_a_resume_that_crashes_as_well_costs_nothing(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, share: int
) -> None:
    """Twice one after the other, wherever: while it loads what the first left, or long after."""
    run, troubles = bench(name, 1), []
    points, chance = run.points(), random.Random(share)
    for first in chosen(points, share, 12 * thinned(name), 1):
        case = run.case()
        assert crash(case, first)
        again = [chance.choice(points[: len(points) // 3]) for _ in range(2)]
        reached = [crash(case, point, "--resume") for point in again]
        trouble = case.finish(ledger, f"crash at a file operation, and again while resuming: {name}")
        troubles.append(trouble and f"{first}, {again} {reached}: {trouble}")
    report(troubles)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", SOME)
def test_a_power_cut_at_any_file_operation_costs_nothing_that_was_saved(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, kept: str, share: int
) -> None:
    run, troubles = bench(name, 1), []
    for point in chosen([point for point in run.points() if not point.half], share, 10 * thinned(name), 1):
        case = run.case()
        cut_power(case, point, kept, seed=point.operation)
        trouble = case.finish(ledger, f"power cut at a file operation: {name}")
        troubles.append(trouble and f"{point}, kept {kept}: {trouble}")
    report(troubles)


def cut_power(case: Case, point: Point, kept: str, seed: int, victim: int = 0) -> None:
    aside = case.folder.with_name(f"{case.folder.name}-aside")
    where: dict[str, Any] = {"root": str(case.folder), "aside": str(aside)}
    where |= {"operation": point.operation, "kept": kept, "seed": seed}
    ended = case.run(fault=("tests.faults.shim:cut_power_at", where), victim=victim)
    assert ended.status == CRASHED, ended.said


def test_the_bench_sees_what_a_run_writes(bench: Callable[[str, int], Bench]) -> None:
    """Every file that a run leaves was opened or written, and every folder made, before the eyes of the shim."""
    run = bench("dpo", 1)
    seen = {operation["path"] for operation in run.operations} | {
        operation["target"] for operation in run.operations if operation["kind"] == "rename"
    }
    for path in run.whole.folder.rglob("*"):
        assert any(Path(name).name == path.name for name in seen), path
    assert {operation["kind"] for operation in run.operations} >= {"open", "write", "fsync", "rename", "remove"}
