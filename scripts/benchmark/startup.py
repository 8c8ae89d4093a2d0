"""Print how long the program takes to answer where it need not think: `--help`, and a wrong configuration."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 9


def median_seconds(*arguments: str, status: int) -> float:
    """Return the median time of a command in seconds; the command must end with a status."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        done = subprocess.run(
            [str(Path(sys.executable).with_name("dpo")), *arguments], capture_output=True, check=False
        )
        times.append(time.perf_counter() - started)
        if done.returncode != status:
            sys.exit(f"`dpo {' '.join(arguments)}` ended with {done.returncode} instead of {status}")
    return statistics.median(times)


def main() -> None:
    """Measure both and print them beside what is meant."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text("modle: a/b\ntraining: {learning_rat: 1}\n", encoding="utf-8")
        rows = (
            ("dpo --help", median_seconds("--help", status=0), 0.3),
            ("report of a wrong configuration", median_seconds("train", "--config", str(wrong), status=2), 0.5),
        )
    for name, seconds, meant in rows:
        sys.stdout.write(f"{name:<34} {seconds:.2f} s  (meant: under {meant} s; median of {RUNS})\n")


if __name__ == "__main__":
    main()
