"""Run this program and TRL in turn on the same work and write a page that sets them side by side.

    make bench                                                     the demo model and pairs, about 100 minutes
    make bench BENCH='--repeats 1 --epochs 1'                      the same in 10 to 20 minutes
    make bench BENCH='--adapter lora --repeats 1 --epochs 1'       an adapter beside TRL's with PEFT
    make bench BENCH='--model DIR --short a.json --long b.jsonl'
    make bench BENCH='--device cuda --shape 8B --adapter lora --recomputed'   on a GPU, in bfloat16, with random weights
    make bench BENCH='--shape tiny --repeats 1 --epochs 1 --out DIR'          to see that it runs
    make bench BENCH='--from docs/benchmark/results.json'          page and plot again, without running
    make bench BENCH='--from a/results.json b/results.json'        one page of what was run in parts

Exit status 1 where the losses of both differ by more than 2e-4 at any step (in bfloat16 0.05), or a run fails.
`make bench` installs what is needed first.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmark.report import (
    ADAPTER_PACKAGES,
    PACKAGES,
    TOLERANCES,
    Case,
    Disagreement,
    Machine,
    Results,
    Run,
    check_losses,
    joined,
    write_report,
)
from benchmark.runs import (
    ADAPTER_TITLES,
    ADAPTERS,
    DEMO_MODEL,
    DEMO_PAIRS,
    DTYPES,
    ROOT,
    RunFailed,
    Work,
    ask,
    end_when_told,
    environment_of,
    positive,
    run_ours,
    run_theirs,
)
from benchmark.shapes import SHAPES
from benchmark.speed import Gauge, GaugeFailed

WORKLOADS = ("short", "long")


def say(text: str) -> None:
    """Say at once how far the benchmark is."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_in_turn(work: Work, what: str, repeats: int, threads: int | None) -> tuple[list[Run], list[Run]]:
    """Run both sides several times, who goes first changing, and compare the losses at once.

    Raises:
        RunFailed: A run failed.
        GaugeFailed: The machine's speed could not be measured.
        Disagreement: The losses differ.
    """
    ours: list[Run] = []
    theirs: list[Run] = []
    with Gauge(environment_of(threads, work.device), work.device) as gauge:
        for number in range(1, repeats + 1):
            sides = [("dpo", run_ours, ours), ("TRL", run_theirs, theirs)]
            for name, side, runs in sides if number % 2 else reversed(sides):
                run = side(work, threads, gauge)
                runs.append(run)
                speeds = (
                    f"{statistics.fmean(run.gflops_meanwhile):.0f} GFLOP/s"
                    if run.gflops_meanwhile
                    else "too short to hold"
                )
                figures = f"{run.training_seconds:.1f} s, {run.peak_bytes / 1e9:.1f} GB, {speeds}"
                say(f"{what}, run {number}/{repeats}: {name} {figures}")
            difference = check_losses(ours[-1], theirs[-1], f"{what}, run {number}", TOLERANCES[work.dtype])
            say(f"{what}, run {number}/{repeats}: the losses differ by {difference:.0e} at most")
    return ours, theirs


def measure(options: argparse.Namespace) -> Results:
    """Do all the work and return what was measured.

    Raises:
        RunFailed: A run failed.
        GaugeFailed: The machine's speed could not be measured.
        Disagreement: The losses differ.
    """
    threads, of_code = options.threads, versions(options.adapter)
    with tempfile.TemporaryDirectory() as folder:
        say("preparing model and pairs …")
        workloads = {name: _wanted(options, name) for name in options.workloads}
        rank = ADAPTERS[options.adapter]["rank"] if options.adapter else 0
        named = {"model": str(options.model.resolve()), "shape": options.shape}
        request = {**named, "folder": folder, "rank": rank, "workloads": workloads}
        prepared = ask(threads, options.device, "prepare", json.dumps(request))
        cases = [
            _measured_case(options, name, epochs, prepared["model"], dict(found))
            for name, found in prepared["workloads"].items()
            for epochs in options.epochs
        ]
    return Results(
        date=datetime.date.today(),
        model=_title(options),
        dtype=DTYPES[options.device],
        machine=machine(prepared["threads"], prepared["gpu"] if options.device == "cuda" else None),
        versions=of_code,
        not_counted=prepared["not_counted"],
        cases=cases,
    )


def _title(options: argparse.Namespace) -> str:
    """Return what the model is called."""
    if options.shape:
        return f"a Llama of {options.shape} random weights"
    return options.model.resolve().stem if options.model.suffix == ".gguf" else options.model.resolve().name


def _wanted(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Say which pairs a workload is made of; where no file of long pairs is named, they are made from the demo's."""
    file = getattr(options, name)
    return {
        "file": str((file or DEMO_PAIRS).resolve()),
        "pairs": getattr(options, f"{name}_pairs"),
        "join": name == "long" and file is None,
    }


def _measured_case(options: argparse.Namespace, name: str, epochs: int, model: str, found: dict[str, Any]) -> Case:
    """Run both sides on a workload and set the runs beside what the workload is."""
    per_step = getattr(options, f"{name}_per_step")
    how = {"device": options.device, "recomputed": options.recomputed, "precomputed": options.precomputed}
    work = Work(model, found.pop("file"), per_step, epochs, options.adapter, **how)
    ours, theirs = run_in_turn(work, f"{name}, epochs {epochs}", options.repeats, options.threads)
    file = getattr(options, name)
    return Case(
        workload=name,
        source=file.name if file else "demo pairs" if name == "short" else "demo pairs, joined",
        epochs=epochs,
        pairs=getattr(options, f"{name}_pairs"),
        pairs_per_step=per_step,
        adapter=ADAPTER_TITLES[options.adapter] if options.adapter else None,
        recomputed=options.recomputed,
        precomputed=options.precomputed,
        ours=ours,
        theirs=theirs,
        **found,
    )


def machine(threads: int, gpu: str | None = None) -> Machine:
    """Describe processor, memory and GPU, and nothing that names this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cpu = names[0] if names else platform.processor() or platform.machine()
    return Machine(cpu=cpu, cpus=os.cpu_count() or 1, threads=threads, memory_gb=round(memory, 1), gpu=gpu)


def versions(adapter: str | None = None) -> dict[str, str]:
    """Return what is installed; of this program the commit as well, where that is known, and whether it was changed."""
    packages = PACKAGES | ADAPTER_PACKAGES if adapter else PACKAGES
    found = {name: importlib.metadata.version(package) for name, package in packages.items()}
    if commit := _git("log", "-1", "--format=%h", "--", "dpo_cli"):
        found["dpo"] += f" ({commit}{', changed' if _git('status', '--porcelain', '--', 'dpo_cli') else ''})"
    return found


def _git(*arguments: str) -> str:
    """Return what git says of this checkout; nothing where there is none."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Set this program and TRL side by side on the same work.")
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, metavar="PATH", help="folder or .gguf file (default: the demo's)")
    add("--short", type=Path, metavar="FILE", help=".json or .jsonl of pairs (default: the demo's)")
    add("--long", type=Path, metavar="FILE", help="the same of long pairs (default: the demo's, joined)")
    add("--short-pairs", type=positive, default=64, metavar="N", help="how many of them (default: %(default)s)")
    add("--short-per-step", type=positive, default=8, metavar="N", help="pairs of a step (default: %(default)s)")
    add("--long-pairs", type=positive, default=16, metavar="N", help="how many of them (default: %(default)s)")
    add("--long-per-step", type=positive, default=2, metavar="N", help="pairs of a step (default: %(default)s)")
    add("--adapter", choices=ADAPTERS, help="train an adapter beside a frozen base (default: all weights train)")
    add("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="which to run (default: both)")
    add("--epochs", type=positive, nargs="+", default=[1, 3], metavar="N", help="(default: 1 3)")
    add("--repeats", type=positive, default=3, metavar="N", help="runs of each side (default: %(default)s)")
    add("--device", choices=DTYPES, default="cpu", help="where both compute (default: %(default)s)")
    add("--shape", choices=SHAPES, help="a model of this shape with random weights, with the tokenizer of --model")
    add("--recomputed", action="store_true", help="compute activations again in the backward pass, both alike")
    add("--precomputed", action="store_true", help="let TRL ask the reference before step 1, as dpo does")
    add("--raw-only", action="store_true", help="write the raw figures alone, without page and plot")
    add("--threads", type=positive, metavar="N", help="of every process (default: what torch takes by itself)")
    add("--out", type=Path, metavar="DIR", help="(default: docs/benchmark, of an adapter a folder of its name in it)")
    add("--from", type=Path, nargs="+", dest="sources", metavar="FILE", help="page of these results.json; run nothing")
    options = parser.parse_args()
    on_gpu = (
        ["gpu", options.shape or "", "-".join(filter(None, (options.adapter,)))] if options.device == "cuda" else []
    )
    options.out = options.out or ROOT.joinpath("docs", "benchmark", *on_gpu or [options.adapter or ""])
    if options.shape and options.model == DEMO_MODEL and not DEMO_MODEL.exists():
        options.model = ROOT / ".gpu" / "tokenizer"
    return options


def missing(options: argparse.Namespace) -> str | None:
    """Say what the benchmark lacks, before it has run for an hour."""
    packages = () if options.raw_only else ("matplotlib",)
    packages += () if options.sources else ("trl", "peft")
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking:
        return f"{' and '.join(lacking)} missing; hint: `make bench` installs the extra `bench`"
    named = options.sources or [options.model, options.short, options.long]
    lost = [file for file in named if file is not None and not file.exists()]
    return f"there is no `{lost[0]}`" + ("; hint: `make model`" * (lost[0] == DEMO_MODEL)) if lost else None


def read_results(files: Sequence[Path]) -> Results:
    """Read what earlier runs measured, and put it together.

    Raises:
        RunFailed: A file holds something else.
        Disagreement: They were measured on different machines, models or versions.
    """
    parts = []
    for file in files:
        try:
            parts.append(Results.model_validate_json(file.read_bytes()))
        except (OSError, ValidationError) as error:
            raise RunFailed(f"`{file}` holds no results of the benchmark: {error}") from error
    return joined(parts)


def main() -> int:
    """Measure, or read what was measured; write the report; return the exit status."""
    options = read_options()
    end_when_told()
    if lack := missing(options):
        say(f"error: {lack}")
        return 2
    try:
        results = read_results(options.sources) if options.sources else measure(options)
        write_report(results, options.out, raw_only=options.raw_only)
    except (RunFailed, GaugeFailed, Disagreement) as error:
        say(f"error: {error}")
        return 1
    say(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
