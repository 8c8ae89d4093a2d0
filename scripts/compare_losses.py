"""Train the quickstart's model with every loss for a few steps and write a page that sets the results side by side.

    python scripts/compare_losses.py                              every loss, 20 steps of 4 pairs each
    python scripts/compare_losses.py --losses dpo ipo --steps 40  some of them, longer

A loss has its own defaults and the learning rate of its example in configs/losses. Every run is a process of its own;
all share one cache, so that data is prepared and the reference is asked once. Exit status 1 where an objective did not
fall, or a run failed; nothing is written where one failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from benchmark.runs import ROOT, RunFailed, environment_of, positive, run_process
from write_losses_page import kind, members

from dpo_cli.config import load_config
from dpo_cli.preference.losses import Loss

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
EXAMPLES = ROOT / "configs" / "losses"
PAGE = ROOT / "docs" / "losses-trained.md"
TYPES = [kind(model) for model in members(Loss)]
ENDS = 3
"""Steps at either end over which an objective is averaged."""
HEAD = """# Losses, trained

What {steps} steps of {pairs_per_step} pairs with each loss make of {model} on the demo pairs, all else as in
`configs/quickstart.yaml`. Every loss has its own defaults and the learning rate of its example in `configs/losses`
(`dpo` and `sft` that of the quickstart).

- **objective** is the loss's own value, no measure for other losses: in training as a mean over the first and the last
  {ends} steps, which are of different pairs; on {held_out} held-out pairs before and after, which are the same.
- **accuracy** (with its 95 % interval) and **margin** are those of rewards on the held-out pairs. Losses without a
  reference reward log-probability itself, so that they do not begin at 50 %.

It shows that every loss lowers its own value on held-out pairs, not which is best: the pairs are simple and the steps
are few. What there is to watch of each: [losses](losses.md).

| loss | β | learning rate | objective in training, first → last | held out, before → after | accuracy | margin |
|---|---|---|---|---|---|---|
"""
TAIL = "\nThis page is written by `make compare-losses`.\n"


@dataclass(frozen=True)
class Trained:
    """What a run with one loss came to.

    Attributes:
        loss: Its type.
        beta: Its β, or None where it has none.
        learning_rate: The highest.
        objective: The loss of each step.
        before: The loss of the held-out pairs before step 1.
        held_out: The figures of the held-out pairs after the last step.
    """

    loss: str
    beta: float | None
    learning_rate: float
    objective: list[float]
    before: float
    held_out: dict[str, Any]

    @property
    def ends(self) -> tuple[float, float]:
        """The objective as training began and as it ended."""
        return statistics.fmean(self.objective[:ENDS]), statistics.fmean(self.objective[-ENDS:])

    @property
    def after(self) -> float:
        """The loss of the held-out pairs after the last step."""
        return float(self.held_out["loss"])

    @property
    def fell(self) -> bool:
        """Whether the run lowered its own objective, on the same pairs."""
        return self.after < self.before


def learning_rate(loss: str) -> float:
    """Return the learning rate of a loss's example, or the quickstart's where it has none of its own."""
    example = EXAMPLES / f"{loss}.yaml"
    return load_config(example if example.exists() else QUICKSTART).training.learning_rate


def configuration(loss: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the quickstart's configuration with another loss."""
    settings: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    training = {
        "pairs_per_step": options.pairs_per_step,
        "max_steps": options.steps,
        "learning_rate": learning_rate(loss),
    }
    settings["training"] |= training
    changes = {"loss": loss, "output_dir": str(folder / "run")}
    return settings | changes | ({"model": str(options.model.resolve())} if options.model else {})


def train(loss: str, options: argparse.Namespace, cache: Path) -> Trained:
    """Train with one loss in a process of its own.

    Raises:
        RunFailed: The run failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "compare.yaml"
        config.write_text(yaml.safe_dump(configuration(loss, options, folder)), encoding="utf-8")
        settings, figures = load_config(config), folder / "before.json"
        environment = environment_of(options.threads, DPO_CACHE_DIR=str(cache))
        dpo, named = [sys.executable, "-m", "dpo_cli"], ["--config", str(config)]
        run_process([*dpo, "eval", *named, "--model", settings.model.name, "--json", str(figures)], environment)
        run_process([*dpo, "train", *named], environment)
        before = json.loads(figures.read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return Trained(
        loss=loss,
        beta=getattr(settings.loss, "beta", None),
        learning_rate=settings.training.learning_rate,
        objective=[row["loss"] for row in rows if row["split"] == "train"],
        before=before["loss"],
        held_out=next(row for row in reversed(rows) if row["split"] == "eval"),
    )


def row(run: Trained) -> str:
    """Return a loss's line of the table."""
    low, high = (100 * bound for bound in run.held_out["accuracy_interval"])
    cells = (
        f"[{run.loss}](losses.md#{run.loss})",
        "–" if run.beta is None else f"{run.beta:g}",
        f"{run.learning_rate:g}",
        "{:.4g} → {:.4g}".format(*run.ends),
        f"{run.before:.4g} → {run.after:.4g}" + ("" if run.fell else " (did not fall)"),
        f"{100 * run.held_out['rewards/accuracies']:.1f} % ({low:.1f} – {high:.1f})",
        f"{run.held_out['rewards/margins']:+.4g}",
    )
    return f"| {' | '.join(cells)} |\n"


def page(runs: list[Trained], options: argparse.Namespace) -> str:
    """Return the whole page."""
    model = options.model or Path(load_config(QUICKSTART).model.name)
    head = HEAD.format(
        steps=options.steps,
        pairs_per_step=options.pairs_per_step,
        model=model.stem if model.suffix == ".gguf" else model.name,
        ends=ENDS,
        held_out=runs[0].held_out["pairs"],
    )
    return head + "".join(map(row, runs)) + TAIL


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train with every loss and set the results side by side.")
    add = parser.add_argument
    add("--losses", nargs="+", choices=TYPES, default=TYPES, metavar="TYPE", help="which (default: all)")
    add("--steps", type=positive, default=20, metavar="N", help="optimizer steps (default: %(default)s)")
    add("--pairs-per-step", type=positive, default=4, metavar="N", help="(default: %(default)s)")
    add("--model", type=Path, metavar="PATH", help="folder or .gguf file (default: the quickstart's)")
    add("--threads", type=positive, metavar="N", help="of every process (default: what torch takes by itself)")
    add("--out", type=Path, default=PAGE, metavar="FILE", help="(default: docs/losses-trained.md)")
    return parser.parse_args()


def main() -> int:
    """Train with each loss, write the page, return the exit status."""
    options, runs = read_options(), []
    try:
        with tempfile.TemporaryDirectory() as cache:
            for loss in options.losses:
                runs.append(train(loss, options, Path(cache)))
                sys.stderr.write(row(runs[-1]))
                sys.stderr.flush()
    except RunFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    options.out.write_text(page(runs, options), encoding="utf-8")
    if rose := [run.loss for run in runs if not run.fell]:
        sys.stderr.write(f"error: the objective did not fall: {', '.join(rose)}\n")
    return 1 if rose else 0


if __name__ == "__main__":
    sys.exit(main())
