"""Measure and prove on a GPU what tests cannot on a CPU, in under eight minutes; each answer is a line of JSON at once.

    make check-gpu                                 all stages; results.jsonl in .gpu/results
    make check-gpu CHECK_GPU='--only attention'    the stages whose names begin so
    make check-gpu CHECK_GPU='--dry'               tiny sizes, to see that everything runs; so it is without a GPU

The stages run in a process of their own, each with its own clock: one that hangs, or breaks the card's context, costs
its own time and no other's answers. Exit status 1 where an answer is wrong or a stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 20
"""How much longer than its own time a stage may take before its process is killed: to import and to end."""
DRY_TIMES = 5
"""How many times as long a stage may take in a dry run, which is to get through on a slow and busy machine."""


def main() -> int:
    """Run the stages, write every answer down, and return the exit status."""
    options = read_options()
    if options.worker is not None:
        work(options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
        for answer in answers(options):
            line = json.dumps({"t": round(time.monotonic() - options.began, 1), **answer})
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            file.write(line + "\n")
            file.flush()
            wrong += "error" in answer or answer.get("right") is False
    return int(wrong > 0)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure and prove on a GPU what tests cannot on a CPU.")
    add = parser.add_argument
    add("--dry", action="store_true", help="tiny sizes, to see that every stage runs (without a GPU always)")
    add("--limit", type=float, default=440, metavar="SECONDS", help="of the whole (default: %(default)s)")
    add("--only", nargs="+", default=[""], metavar="NAME", help="the stages whose names begin so")
    add("--out", type=Path, default=ROOT / ".gpu" / "results", metavar="DIR", help="(default: .gpu/results)")
    add("--worker", type=int, help=argparse.SUPPRESS)
    add("--ends", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.began = time.monotonic()
    options.ends = options.ends or options.began + options.limit
    return options


def answers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run worker after worker until all stages were asked, yielding what they answer."""
    following = 0
    while following is not None:
        following = yield from _worker_answers(options, following)


def _worker_answers(options: argparse.Namespace, first: int) -> Iterator[dict[str, Any]]:
    """Run one worker from a stage on; return the stage to go on from where it broke, or None."""
    name, stage, until = "start", first, time.monotonic() + 120
    with _worker(options, first) as worker, selectors.DefaultSelector() as ready:
        assert worker.stdout is not None
        ready.register(worker.stdout, selectors.EVENT_READ)
        while ready.select(max(0.0, until - time.monotonic())):
            # Unbuffered, so that no line waits behind one that was read.
            line = worker.stdout.readline()
            if not line:
                break
            answer = _as_answer(line)
            if "begins" in answer:
                name, stage, until = (
                    answer["stage"],
                    answer["begins"],
                    time.monotonic() + answer["seconds"] + GRACE_SECONDS,
                )
            elif "all" in answer:
                return None
            else:
                yield answer
        else:
            yield {"stage": name, "error": "it did not end in its time, and was killed"}
            return stage + 1
        yield {"stage": name, "error": f"its process ended with status {worker.wait()}"}
        return stage + 1


def _as_answer(line: bytes) -> dict[str, Any]:
    """Read a line of a worker; what a library printed is an answer of its own."""
    with contextlib.suppress(ValueError):
        answer = json.loads(line)
        if isinstance(answer, dict) and "stage" in answer:
            return answer
    return {"stage": "printed", "text": line.decode(errors="replace").rstrip()[:400]}


@contextlib.contextmanager
def _worker(options: argparse.Namespace, first: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that runs the stages from one on; it and what it started are gone behind the context."""
    command = [sys.executable, __file__, "--worker", str(first), "--ends", str(options.ends), "--only", *options.only]
    command += ["--out", str(options.out), *(["--dry"] if options.dry else [])]
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as worker:
        try:
            yield worker
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def work(options: argparse.Namespace) -> None:
    """Run the stages in this process, from one on."""
    import torch
    from gpu.clock import Check
    from gpu.stages import STAGES

    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    check = Check(device, options.dry or not on_cuda, str(options.out))
    for number, stage in enumerate(STAGES):
        if number < options.worker or not any(stage.name.startswith(name) for name in options.only):
            continue
        left = options.ends - time.monotonic()
        check = dataclasses.replace(check, stage=stage.name)
        # A dry run is to run every stage, however slow the machine.
        if not check.dry and left < min(stage.seconds, 15):
            check.tell(skipped="no time is left")
            continue
        seconds = DRY_TIMES * stage.seconds if check.dry else max(1, int(min(stage.seconds, left)))
        check.tell(begins=number, seconds=seconds)
        stage.run(check, seconds)
    check.tell(all=True)


if __name__ == "__main__":
    sys.exit(main())
