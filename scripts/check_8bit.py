"""Train the real model with moments of 8 bits and of float32, and compare the loss of every step.

    python scripts/check_8bit.py                     40 steps of one short demo pair each, float32 weights
    python scripts/check_8bit.py --weights split     the same with split weights, which are computed in bfloat16

On a CPU a step takes half a minute, nearly all of it in the kernels of 8 bits. Exit status 1 where one loss differs by
more than 1e-3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from check_losses import DEMO_PAIRS, read_rows, trained_losses

TOLERANCE = 1e-3
PAIRS_PER_STEP = 1
OPTIMIZERS = "adamw", "adamw_8bit"
HELD = {"float32": (), "split": ("model.weights=split", "model.dtype=bfloat16")}
"""Settings by how weights are held."""


def compared(num_steps: int, weights: str, rate: str) -> tuple[list[float], list[float]]:
    """Return the loss of every step, with moments of float32 and of 8 bits."""
    by_length = sorted(read_rows(DEMO_PAIRS), key=lambda row: len(row["chosen"]) + len(row["rejected"]))
    rows = by_length[: PAIRS_PER_STEP * num_steps]
    settings = [*HELD[weights], f"training.pairs_per_step={PAIRS_PER_STEP}", f"training.learning_rate={rate}"]
    found = []
    for optimizer in OPTIMIZERS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(trained_losses(rows, Path(folder), *settings, f"training.optimizer={optimizer}"))
    return found[0], found[1]


def main() -> int:
    """Compare, and print the largest difference."""
    parser = argparse.ArgumentParser(description="Compare moments of 8 bits with those of float32.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--weights", choices=HELD, default="float32")
    parser.add_argument("--rate", default="5e-6", help="the learning rate")
    options = parser.parse_args()
    whole, few = compared(options.steps, options.weights, options.rate)
    differences = [abs(ours - theirs) for ours, theirs in zip(few, whole, strict=True)]
    for step, (ours, theirs) in enumerate(zip(few, whole, strict=True), 1):
        sys.stdout.write(f"step {step}  8 bits {ours:.6f}  float32 {theirs:.6f}  difference {ours - theirs:+.6f}\n")
    sys.stdout.write(f"{len(few)} steps, loss {few[0]:.4f} to {few[-1]:.4f}\n")
    sys.stdout.write(f"largest difference {max(differences):.1e}, allowed {TOLERANCE:.0e}\n")
    return 0 if max(differences) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
