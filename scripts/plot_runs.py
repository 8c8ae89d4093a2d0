"""Train three runs of the demo model and draw their curves, docs/runs.png: `make plot-runs`, about half an hour.

What is drawn, and how to read it, is in docs/first-run.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "runs.png"
DEMO = ROOT / "configs" / "demo" / "pairs.jsonl"
DPI = 100


@dataclass(frozen=True)
class Curves:
    """What one run logged: its rows of steps and of evaluations, the latter with what was known before step 1."""

    title: str
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def mislabelled(file: Path) -> str:
    """Write the demo pairs with every third label the wrong way round; return the file's name."""
    rows = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    for row in rows[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:60]), encoding="utf-8")
    return str(file)


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the three runs as changes to the quickstart's configuration."""
    few = {"train": {"path": mislabelled(folder / "mislabelled.jsonl")}, "eval": 0.4, "max_length": 256}
    return {
        "healthy": {"data": {"eval": 0.05}, "evaluation": {"every_steps": 5}},
        "over-fitted: few pairs, wrong labels, many epochs": {
            "data": few,
            "training": {"epochs": 5, "max_steps": None, "learning_rate": 2.0e-5},
            "evaluation": {"every_steps": 5},
        },
        "diverged: learning rate 1e-3": {
            "data": {"eval": 0.05},
            "training": {"learning_rate": 1.0e-3, "max_steps": 20},
            "evaluation": {"every_steps": 2},
        },
    }


def train(title: str, changes: dict[str, Any], folder: Path) -> Curves:
    """Train one run and read what it logged."""
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    for group, values in changes.items():
        settings[group] = {**settings.get(group, {}), **values}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = folder / title.partition(":")[0]
    command = [sys.executable, "-m", "dpo_cli", "train", "--config", str(file), f"output_dir={run}"]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Curves(title, *([row for row in rows if row["split"] == split] for split in ("train", "eval")))


def draw(runs: list[Curves], file: Path) -> None:
    """Draw a column for each run: loss, rewards, log-probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(3, len(runs), figsize=(15, 9), dpi=DPI, layout="constrained", sharex="col")
    for column, run in zip(panels.T, runs, strict=True):
        column[0].set_title(run.title)
        column[0].plot(*points(run.steps, "loss"), color="#999999", linewidth=1, label="loss of each step")
        column[0].plot(*points(run.held_out, "loss"), color="tab:blue", marker="o", label="held-out loss")
        for panel, name in ((column[1], "rewards"), (column[2], "logps")):
            for side, colour in (("chosen", "tab:green"), ("rejected", "tab:red")):
                values = points(run.held_out, f"{name}/{side}")
                panel.plot(*values, color=colour, marker="o", label=f"{name}/{side}, held out")
        column[2].set_xlabel("step")
        column[2].xaxis.get_major_locator().set_params(integer=True)
        for panel in column:
            panel.axhline(0, color="#dddddd", linewidth=0.8, zorder=0)
    for panel in panels[:, 0]:
        panel.legend(frameon=False)
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)


def points(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric."""
    return [row["step"] for row in rows], [row[name] for row in rows]


def main() -> int:
    """Train the runs and draw the picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [train(title, changes, folder) for title, changes in configurations(folder).items()]
    draw(runs, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
