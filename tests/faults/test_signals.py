"""Asked to stop, a run stops with the status that is documented and is finished by `--resume`."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import FULL
from tests.faults.ledger import Ledger
from tests.faults.runs import SAVED_EVERY, Bench, Case
from tests.faults.shares import SHARES, SOME, chosen, report, thinned
from tests.faults.shim import HELD

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGHUP: 129}

PHASES = {
    "load": "loading …",
    "reference pass": "reference log-probabilities: ",
    "step": "step 3/",
    "evaluation": "evaluating: ",
}
"""By what it says as it begins."""

MOST_SECONDS_LATER = 0.05


def stopped(case: Case, status: int, expected: int) -> str:
    """Say what is wrong with the status of a run that was asked to stop."""
    # Asked while the trained model is saved, it has nothing left to stop.
    fine = status == expected or (status == 0 and (case.output / "final").is_dir())
    return "" if fine else f"ended with status {status} instead of {expected}"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", STATUS if FULL else [signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_in_any_phase_stops_and_loses_nothing(
    bench: Callable[[str, int], Bench], ledger: Ledger, number: signal.Signals, phase: str
) -> None:
    run, chance, troubles = bench("dpo", 1), random.Random(phase), []
    for attempt in range(10 if FULL else 1):
        case = run.case()
        [process] = case.start()
        process.until(PHASES[phase])
        time.sleep(chance.uniform(0, MOST_SECONDS_LATER) * bool(attempt))
        process.send(number)
        wrong = stopped(case, case.wait([process]).status, STATUS[number])
        troubles.append(case.finish(ledger, f"{number.name} during {phase}", wrong=wrong))
    report(troubles)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("number", list(STATUS)[:3] if FULL else [signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("name", SOME)
def test_a_signal_at_any_file_operation_stops_and_loses_nothing(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, number: signal.Signals, share: int
) -> None:
    run, troubles = bench(name, 1), []
    for point in chosen([point for point in run.points() if not point.half], share, 8 * thinned(name), 1):
        case = run.case()
        where = {"root": str(case.folder), "operation": point.operation, "number": int(number)}
        ended = case.run(fault=("tests.faults.shim:signal_at", where))
        wrong = stopped(case, ended.status, STATUS[number])
        trouble = case.finish(ledger, f"{number.name} at a file operation: {name}", wrong=wrong)
        troubles.append(trouble and f"{point}: {trouble}")
    report(troubles)


@pytest.mark.parametrize("attempt", range(10 if FULL else 1))
def test_a_second_interrupt_during_the_save_stops_at_once(
    bench: Callable[[str, int], Bench], ledger: Ledger, attempt: int
) -> None:
    """It stands still where it syncs the second checkpoint, and would for ever; the first is whole by then."""
    run, second = bench("dpo", 1), f"step-{2 * SAVED_EVERY:06d}"
    syncs = [number for number, found in enumerate(run.operations, 1)
             if found["kind"] == "fsync" and second in found["path"]]  # fmt: skip
    case = run.case()
    where = {"root": str(case.folder), "operation": syncs[attempt * len(syncs) // 10]}
    [process] = case.start(faults={0: ("tests.faults.shim:hold_at", where)})
    process.until(HELD)
    process.send(signal.SIGINT)
    process.until("press Ctrl-C again")
    process.send(signal.SIGINT)
    status = case.wait([process]).status
    assert [path.name for path in (case.output / "checkpoints").iterdir()] == [f"step-{SAVED_EVERY:06d}"]
    wrong = "" if status == 130 else f"ended with status {status}"
    report([case.finish(ledger, "a second SIGINT during a save", wrong=wrong)])
