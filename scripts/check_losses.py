"""Train the real model for a few steps and compare every loss with an independent trainer's.

    python scripts/check_losses.py                    the demo pairs
    python scripts/check_losses.py polite_pairs.json  the first 64 pairs of rasbt/LLMs-from-scratch, chapter 7

The expected numbers were logged by TRL 1.16.0 on the same model in float32, with the same settings, pairs
and order. Exit status 1 where one differs by more than 2e-4.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_PAIRS = ROOT / "configs" / "demo" / "pairs.jsonl"
TOLERANCE = 2e-4
PAIRS_PER_STEP = 8
EXPECTED = {
    "demo": [0.6931472, 0.6621466, 0.6311139],
    "polite": [0.6931, 0.6902, 0.6802, 0.6780, 0.6847, 0.6641, 0.6678, 0.6569],
}


def trained_losses(rows: list[dict[str, str]], folder: Path, *overrides: str) -> list[float]:
    """Train on the rows in their order, under further settings, and return the loss of every step."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = folder / "check.yaml"
    config.write_text(
        f"model: {MODEL}\n"
        f"data: {{train: {pairs}, eval: null, max_length: 1024}}\n"
        f"training: {{shuffle: false, schedule: constant, warmup_ratio: 0, learning_rate: 5e-6, "
        f"pairs_per_step: {PAIRS_PER_STEP}}}\n"
        f"output_dir: {folder / 'run'}\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, "-m", "dpo_cli", "train", "--config", str(config), *overrides], check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def largest_difference(name: str, source: Path, folder: Path) -> float:
    """Train on as many pairs as losses are expected; return the largest difference from them."""
    text = source.read_text(encoding="utf-8")
    rows = json.loads(text) if source.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    expected = EXPECTED[name]
    found = trained_losses(rows[: PAIRS_PER_STEP * len(expected)], folder)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        sys.stdout.write(f"step {step}  dpo {ours:.6f}  independent {theirs:.4f}  difference {ours - theirs:+.6f}\n")
    return max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))


def main() -> int:
    """Compare on the demo pairs, or on the file that is named."""
    name, source = ("polite", Path(sys.argv[1])) if len(sys.argv) > 1 else ("demo", DEMO_PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        difference = largest_difference(name, source, Path(folder))
    sys.stdout.write(f"largest difference {difference:.1e}, allowed {TOLERANCE:.0e}\n")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
