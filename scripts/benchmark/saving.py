"""Time what saving a checkpoint costs, beside writing the same without any promise.

Plain is `save_pretrained` and `torch.save` of the optimizer's state: once as it is, which ends when everything is in
the system's memory, and once until it is on the disk. The program writes the same tensors, takes the digest of every
file, asks the disk to keep it, and renames. In the background training waits for a copy in memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmark.runs import DEMO_MODEL, positive
from dpo_cli.modeling.loading import load_policy, load_tokenizer
from dpo_cli.training.checkpoints import CheckpointWriter
from dpo_cli.training.loop import Skips
from dpo_cli.training.optimizer import AdamW, schedule
from dpo_cli.training.state import TrainingParts


def training_parts(model: str) -> TrainingParts:
    """Return the state of a run after one step with gradients of 1."""
    accelerator = Accelerator(cpu=True)
    policy = load_policy(model)
    optimizer = AdamW().over(policy, 1e-6, 0.0)
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


def flush(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copied(parts: TrainingParts) -> list[torch.Tensor]:
    """Copy the same tensors in memory."""
    states = parts.optimizer.state_dict()["state"].values()
    return [t.clone() for t in (*parts.policy.parameters(), *(t for state in states for t in state.values()))]


def seconds(action: Callable[[], Any]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def time_plain(parts: TrainingParts, folder: Path) -> dict[str, float]:
    """Save as libraries do."""
    in_memory = seconds(lambda: plain(parts, folder))
    return {PLAIN: in_memory, PLAIN_ON_DISK: in_memory + seconds(lambda: flush(folder))}


def time_whole(parts: TrainingParts, folder: Path) -> dict[str, float]:
    """Save as the program does, while training waits."""
    writer = CheckpointWriter(folder, 1, background=False)
    return {"whole": seconds(lambda: writer.save(1, parts))}


def time_background(parts: TrainingParts, folder: Path) -> dict[str, float]:
    """Save as the program does while training goes on, which it does not here."""
    writer = CheckpointWriter(folder, 1, background=True)
    waits = seconds(lambda: writer.save(1, parts))
    return {"background: training waits": waits, "background: on the disk": waits + seconds(writer.finish)}


def time_copy(parts: TrainingParts, folder: Path) -> dict[str, float]:
    """Copy in memory alone."""
    return {"copy in memory": seconds(lambda: copied(parts))}


PLAIN, PLAIN_ON_DISK = "plain: in the system's memory", "plain: on the disk"
WAYS = (time_plain, time_whole, time_background, time_copy)


def measure(parts: TrainingParts, folder: Path, repeat: int) -> dict[str, float]:
    """Save once in each way, the disk quiet before each and every other time in reverse; return the seconds of each."""
    found = {}
    for way in WAYS if repeat % 2 else reversed(WAYS):
        os.sync()
        found |= way(parts, folder / "saved")
        shutil.rmtree(folder / "saved", ignore_errors=True)
    return found


def table(runs: Sequence[dict[str, float]]) -> str:
    """Return the medians as a Markdown table, beside both kinds of plain."""
    medians = {what: statistics.median(run[what] for run in runs) for what in sorted(runs[0])}
    lines = ["| | seconds (median) | least – most | × plain in memory | × plain on the disk |", "|---|--:|--:|--:|--:|"]
    for what, median in medians.items():
        times = [run[what] for run in runs]
        ratios = " | ".join(f"{median / medians[to]:.2f}" for to in (PLAIN, PLAIN_ON_DISK))
        lines.append(f"| {what} | {median:.2f} | {min(times):.2f} – {max(times):.2f} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measure several times and print the medians as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", metavar="PATH", default=str(DEMO_MODEL), help="folder or .gguf file")
    parser.add_argument("--repeats", metavar="N", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="on the disk to be measured (default: temporary)")
    arguments = parser.parse_args()
    parts = training_parts(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        runs = [measure(parts, Path(name), repeat) for repeat in range(arguments.repeats)]
    print(table(runs))


if __name__ == "__main__":
    main()
