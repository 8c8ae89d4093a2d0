"""Train the real model for a few steps and compare every loss with an independent trainer's.

    python scripts/check_losses.py                    the demo pairs
    python scripts/check_losses.py polite_pairs.json  the first 64 pairs of rasbt/LLMs-from-scratch, chapter 7
    python scripts/check_losses.py --adapter dora     the first 32 pairs, of any file, with lora, rslora or dora

The expected numbers were logged by TRL 1.16.0 on the same model in float32, with the same settings, pairs
and order; with an adapter, TRL runs beside. Exit status 1 where one differs by more than 2e-4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark.runs import environment_of
from benchmark.work import model_folder

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_PAIRS = ROOT / "configs" / "demo" / "pairs.jsonl"
TOLERANCE = 2e-4
PAIRS_PER_STEP = 8
EXPECTED = {
    "demo": [0.6931472, 0.6621466, 0.6311139],
    "polite": [0.6931, 0.6902, 0.6802, 0.6780, 0.6847, 0.6641, 0.6678, 0.6569],
}
_SIZE = {"rank": 16, "alpha": 32}
ADAPTERS = {"lora": _SIZE, "rslora": {**_SIZE, "rslora": True}, "dora": {**_SIZE, "dora": True}}
NUM_WITH_ADAPTER = 32
ADAPTER_RATE = "5e-5"
"""Ten times that of all weights: what is learned has to show in the losses of four steps."""
SEED = 42
"""What both sides draw an adapter's first weights with."""


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
        # Nobody goes on from there.
        f"checkpoints: {{at_end: false}}\n"
        f"output_dir: {folder / 'run'}\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, "-m", "dpo_cli", "train", "--config", str(config), *overrides], check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def peer_losses(rows: list[dict[str, str]], folder: Path, adapter: dict[str, Any]) -> list[float]:
    """Train an adapter on the same rows with TRL and PEFT, which draws its first weights itself."""
    pairs = folder / "pairs.jsonl"
    model = model_folder(str(MODEL), folder)
    arguments = [model, pairs, PAIRS_PER_STEP, 1, ADAPTER_RATE, SEED, folder / "peer", "--adapter", json.dumps(adapter)]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark" / "peer.py"), *map(str, arguments)]
    surroundings = environment_of(threads=None)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings).stdout
    losses: list[float] = json.loads(output.splitlines()[-1])
    return losses


def adapter_losses(source: Path, folder: Path, adapter: str) -> tuple[list[float], list[float]]:
    """Train an adapter on the first rows of a file; return the losses of every step, ours and theirs."""
    rows, settings = read_rows(source)[:NUM_WITH_ADAPTER], ADAPTERS[adapter]
    overrides = [f"adapter.{name}={json.dumps(value)}" for name, value in settings.items()]
    overrides += [f"training.learning_rate={ADAPTER_RATE}", f"training.seed={SEED}"]
    found = trained_losses(rows, folder, "adapter.type=lora", *overrides)
    return found, peer_losses(rows, folder, settings)


def logged_losses(name: str, source: Path, folder: Path) -> tuple[list[float], list[float]]:
    """Train all weights on as many pairs as losses were logged; return the losses of every step, ours and theirs."""
    expected = EXPECTED[name]
    return trained_losses(read_rows(source)[: PAIRS_PER_STEP * len(expected)], folder), expected


def read_rows(source: Path) -> list[dict[str, str]]:
    """Read the rows of a file of JSON, or of lines of it."""
    text = source.read_text(encoding="utf-8")
    return json.loads(text) if source.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Print the losses of every step; return the largest difference."""
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        sys.stdout.write(f"step {step}  dpo {ours:.6f}  independent {theirs:.4f}  difference {ours - theirs:+.6f}\n")
    return max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare every loss of a few steps with an independent trainer's.")
    parser.add_argument("pairs", nargs="?", type=Path, metavar="PAIRS", help="pairs (default: the demo's)")
    parser.add_argument("--adapter", choices=ADAPTERS, help="train an adapter (default: all weights)")
    return parser.parse_args()


def main() -> int:
    """Compare on the demo pairs, or on the file that is named."""
    options = read_options()
    source = options.pairs or DEMO_PAIRS
    with tempfile.TemporaryDirectory() as folder:
        if options.adapter:
            losses = adapter_losses(source, Path(folder), options.adapter)
        else:
            losses = logged_losses("polite" if options.pairs else "demo", source, Path(folder))
    difference = largest_difference(*losses)
    sys.stdout.write(f"largest difference {difference:.1e}, allowed {TOLERANCE:.0e}\n")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
