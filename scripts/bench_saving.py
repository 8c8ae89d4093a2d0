"""Time what saving a checkpoint costs, beside writing the same without any promise.

Plain is `save_pretrained` and `torch.save` of the optimizer's state. The program writes the same tensors, takes the
digest of every file, asks the disk to keep it, and renames. In the background training waits for a copy in memory.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from benchmark_runs import DEMO_MODEL, positive

from dpo_cli.modeling.loading import load_policy, load_tokenizer
from dpo_cli.training.checkpoints import CheckpointWriter
from dpo_cli.training.loop import Skips
from dpo_cli.training.optimizer import optimizer as build_optimizer
from dpo_cli.training.optimizer import schedule
from dpo_cli.training.state import TrainingParts


def training_parts(model: str) -> TrainingParts:
    """Return the state of a run after one step with gradients of 1."""
    accelerator = Accelerator(cpu=True)
    policy = load_policy(model)
    optimizer = build_optimizer("adamw", policy, 1e-6, 0.0)
    rates = schedule(optimizer, "constant", 0.0, 1)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return TrainingParts(policy, load_tokenizer(model), optimizer, rates, accelerator, None, {}, Skips(0), {})


def plain(parts: TrainingParts, folder: Path) -> None:
    """Save model and optimizer as libraries do by themselves."""
    parts.policy.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    torch.save(parts.optimizer.state_dict(), folder / "optimizer.pt")


def copied(parts: TrainingParts) -> list[torch.Tensor]:
    """Copy the same tensors in memory."""
    states = parts.optimizer.state_dict()["state"].values()
    return [t.clone() for t in (*parts.policy.parameters(), *(t for state in states for t in state.values()))]


def seconds(action: Callable[[], Any]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(parts: TrainingParts, folder: Path) -> dict[str, float]:
    """Save once in each way, the disk quiet before each; return the seconds of each."""
    found = {}
    for name, background in (("whole", False), ("background", True)):
        writer = CheckpointWriter(folder / name, 1, background=background)
        found[f"{name}: training waits"] = seconds(lambda writer=writer: writer.save(1, parts))
        found[f"{name}: until it is on the disk"] = found[f"{name}: training waits"] + seconds(writer.finish)
        shutil.rmtree(folder / name)
    found["copy in memory"] = seconds(lambda: copied(parts))
    found["plain"] = seconds(lambda: plain(parts, folder / "plain"))
    shutil.rmtree(folder / "plain")
    return found


def main() -> None:
    """Measure several times and print the medians as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", metavar="PATH", default=str(DEMO_MODEL), help="folder or .gguf file")
    parser.add_argument("--repeats", metavar="N", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="on the disk to be measured (default: temporary)")
    arguments = parser.parse_args()
    parts = training_parts(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        runs = [measure(parts, Path(name)) for _ in range(arguments.repeats)]
    medians = {what: statistics.median(run[what] for run in runs) for what in runs[0]}
    print("| | seconds (median) | least – most | × plain |\n|---|--:|--:|--:|")
    for what, median in medians.items():
        times = [run[what] for run in runs]
        print(f"| {what} | {median:.2f} | {min(times):.2f} – {max(times):.2f} | {median / medians['plain']:.2f} |")


if __name__ == "__main__":
    main()
