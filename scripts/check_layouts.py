"""Train the real model under both layouts and compare the loss of every step.

    python scripts/check_layouts.py [STEPS]     50 steps of two demo pairs by default; about five minutes

Exit status 1 where one differs by more than 2e-4.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from check_losses import DEMO_PAIRS, TOLERANCE, trained_losses

PAIRS_PER_STEP = 2


def main() -> int:
    """Compare, and print the largest difference."""
    num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    lines = DEMO_PAIRS.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: PAIRS_PER_STEP * num_steps]]
    losses = []
    for layout in ("packed", "padded"):
        with tempfile.TemporaryDirectory() as folder:
            settings = f"training.layout={layout}", f"training.pairs_per_step={PAIRS_PER_STEP}"
            losses.append(trained_losses(rows, Path(folder), *settings))
    difference = max(abs(packed - padded) for packed, padded in zip(*losses, strict=True))
    sys.stdout.write(f"{len(losses[0])} steps, loss {losses[0][0]:.4f} to {losses[0][-1]:.4f}\n")
    sys.stdout.write(f"largest difference of the layouts {difference:.1e}, allowed {TOLERANCE:.0e}\n")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
