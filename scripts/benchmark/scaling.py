"""Show that time and memory grow with nothing but the work: training on more pairs, and with larger steps.

    make bench-scaling                                                 the demo model: 64, 256 and 1,024 pairs
    make bench-scaling BENCH='--model DIR --pairs 64 1024 --per-step 8 64'

Every run is a process of its own on the same distinct pairs, the reference pass included, and prints a row of the
table: pairs, pairs a step, seconds a pair, peak memory, and how fast the machine multiplied matrices meanwhile, which
is the mean of what was measured in pauses of the run (`speed`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmark.report import Run
from benchmark.runs import DEMO_MODEL, DEMO_PAIRS, RunFailed, Work, end_when_told, environment_of, run_ours
from benchmark.speed import Gauge, GaugeFailed


def distinct_pairs(num_pairs: int, target: Path) -> None:
    """Write demo pairs, numbered so that no two have the same prompt however many there are."""
    rows = [json.loads(line) for line in DEMO_PAIRS.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for number, row in enumerate(itertools.islice(itertools.cycle(rows), num_pairs), 1):
            file.write(json.dumps({**row, "instruction": f"{number}. {row['instruction']}"}) + "\n")


def measure(model: str, num_pairs: int, per_step: int, threads: int | None) -> Run:
    """Train on so many pairs for one epoch."""
    with tempfile.TemporaryDirectory() as folder, Gauge(environment_of(threads)) as gauge:
        pairs = Path(folder) / "pairs.jsonl"
        distinct_pairs(num_pairs, pairs)
        return run_ours(Work(model, str(pairs), per_step, 1), threads, gauge)


def main() -> int:
    """Print a table of one row a run."""
    parser = argparse.ArgumentParser(description="time and memory by the number of pairs")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a model folder or a .gguf file")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--per-step", type=int, nargs="+", default=[8], help="pairs of an optimizer step")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    end_when_told()
    sys.stdout.write(
        "| pairs | pairs a step | seconds a pair | peak memory | matrix products |\n|---|---|---|---|---|\n"
    )
    for num_pairs, per_step in itertools.product(options.pairs, options.per_step):
        try:
            run = measure(options.model, num_pairs, per_step, options.threads)
        except (RunFailed, GaugeFailed) as error:
            sys.exit(f"error: {error}")
        seconds, peak = run.training_seconds / num_pairs, run.peak_bytes / 1e9
        speed = f"{statistics.fmean(run.gflops_meanwhile):.0f} GFLOP/s" if run.gflops_meanwhile else "–"
        sys.stdout.write(f"| {num_pairs:,} | {per_step} | {seconds:.3f} | {peak:.2f} GB | {speed} |\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
