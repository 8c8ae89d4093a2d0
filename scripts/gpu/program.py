"""The whole program on the card: what the doctor says, a run that is killed and resumed, and TRL beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.doctor.resuming import compared, write_run
from gpu.clock import Check

ROOT = Path(__file__).resolve().parents[2]


def doctor(check: Check) -> None:
    """Let the doctor say what it finds beside attention, which has a stage of its own."""
    command = [sys.executable, "-m", "dpo_cli", "doctor", "device", "libraries", "logps", "products", "--json", "-"]
    ended = _run(command)
    found = json.loads(ended.stdout)
    for finding in found["findings"]:
        check.tell(**{name: finding[name] for name in ("name", "state", "detail")}, figures=finding["figures"])
    check.tell(right=found["ok"], status=ended.returncode)


def resume(check: Check) -> None:
    """Kill a run of the program and resume it beside one that goes through: both must leave the same bytes."""
    larger = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    shape = {} if check.dry else {**larger, "num_key_value_heads": 4}
    with tempfile.TemporaryDirectory() as name:
        found = compared(Path(name), write_run(Path(name), **shape))
    check.tell(state=found.state, detail=found.detail, right=found.state == "ok", **found.figures)


def beside_trl(adapter: str | None, workload: str, *, dry: bool) -> Callable[[Check], None]:
    """Return what runs the benchmark beside TRL on a model of 1B random weights.

    Args:
        adapter: As the benchmark's option.
        workload: Which of its workloads.
        dry: Whether a dry run does it too; another stage runs the same code.
    """

    def ask(check: Check) -> None:
        if check.dry and not dry:
            check.tell(skipped="in a dry run: another stage runs the same code")
            return
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmark", "--device", check.device.type, "--raw-only", "--out", folder]
            command += ["--shape", "tiny" if check.dry else "1B", "--workloads", workload, "--repeats", "1"]
            command += ["--epochs", "1", *(["--adapter", adapter] if adapter else []), *_size(check.dry, workload)]
            ended = _run(command)
            if ended.returncode != 0:
                check.tell(error=ended.stderr[-800:])
                return
            results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        for case in results["cases"]:
            figures = _figures(case)
            # What is reached on a GPU with a model of 1B says nothing of a tiny one.
            right = None if check.dry else figures["times_as_fast"] >= 2 and figures["share_of_memory"] <= 0.6
            check.tell(**figures, right=right)

    return ask


def _size(dry: bool, workload: str) -> list[str]:
    """Return how many pairs are trained on: enough that a step's time is known, and few enough for the time."""
    pairs, per_step = (2, 1) if dry else (256, 32) if workload == "short" else (64, 8)
    return [f"--{workload}-pairs", str(pairs), f"--{workload}-per-step", str(per_step)]


def _figures(case: dict[str, Any]) -> dict[str, Any]:
    """Return what the comparison of one workload comes to."""
    ours, theirs = case["ours"][0], case["theirs"][0]
    speeds = {name: case["pairs"] / run["training_seconds"] for name, run in (("dpo", ours), ("trl", theirs))}
    memory = {name: run["peak_bytes"] / 2**30 for name, run in (("dpo", ours), ("trl", theirs))}
    ratio, share = speeds["dpo"] / speeds["trl"], memory["dpo"] / memory["trl"]
    return {
        "workload": case["workload"],
        "pairs_per_second": speeds,
        "peak_gib": memory,
        "times_as_fast": ratio,
        "share_of_memory": share,
        "losses": {"dpo": ours["losses"], "trl": theirs["losses"]},
    }


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program of this checkout to its end."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
