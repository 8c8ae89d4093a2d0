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
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from benchmark.runs import DEMO_MODEL, positive
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses import SFT
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import NoReference
from dpo_cli.training.checkpoints import CheckpointWriter
from dpo_cli.training.learner import Learner
from dpo_cli.training.optimizer import AdamW, schedule
from dpo_cli.training.state import RunNotes


class Saved(NamedTuple):
    """What is saved: a run after its first step, and its tokenizer."""

    learner: Learner
    tokenizer: PreTrainedTokenizerBase


def after_one_step(model: str) -> Saved:
    """Return the state of a run after one step with gradients of 1."""
    accelerator, policy = Accelerator(cpu=True), Policy.load(model)
    policy.place(accelerator, trained=True)
    optimizer = AdamW().over(policy.weights.trained(), 1e-6, 0.0)
    rates = schedule(optimizer, "constant", 0.0, 1)
    for parameter in policy.weights.trained():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    rates.step()
    optimizer.zero_grad()
    reference = NoReference().open()
    return Saved(Learner(policy, Objective.of(SFT()), reference, optimizer, rates, accelerator), load_tokenizer(model))


def plain(saved: Saved, folder: Path) -> None:
    """Save model and optimizer as libraries do by themselves."""
    saved.learner.policy.model.save_pretrained(folder)
    saved.tokenizer.save_pretrained(folder)
    torch.save(saved.learner.optimizer.state_dict(), folder / "optimizer.pt")


def flush(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copied(saved: Saved) -> list[torch.Tensor]:
    """Copy the same tensors in memory."""
    states = saved.learner.optimizer.state_dict()["state"].values()
    return [
        t.clone()
        for t in (*saved.learner.policy.weights.tensors().values(), *(t for state in states for t in state.values()))
    ]


def seconds(action: Callable[[], Any]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def time_plain(saved: Saved, folder: Path) -> dict[str, float]:
    """Save as libraries do."""
    in_memory = seconds(lambda: plain(saved, folder))
    return {PLAIN: in_memory, PLAIN_ON_DISK: in_memory + seconds(lambda: flush(folder))}


def time_whole(saved: Saved, folder: Path) -> dict[str, float]:
    """Save as the program does, while training waits."""
    writer = CheckpointWriter(folder, saved.tokenizer, 1, background=False)
    return {"whole": seconds(lambda: writer.save(saved.learner, RunNotes({})))}


def time_background(saved: Saved, folder: Path) -> dict[str, float]:
    """Save as the program does while training goes on, which it does not here."""
    writer = CheckpointWriter(folder, saved.tokenizer, 1, background=True)
    waits = seconds(lambda: writer.save(saved.learner, RunNotes({})))
    return {"background: training waits": waits, "background: on the disk": waits + seconds(writer.finish)}


def time_copy(saved: Saved, folder: Path) -> dict[str, float]:
    """Copy in memory alone."""
    return {"copy in memory": seconds(lambda: copied(saved))}


PLAIN, PLAIN_ON_DISK = "plain: in the system's memory", "plain: on the disk"
WAYS = (time_plain, time_whole, time_background, time_copy)


def measure(saved: Saved, folder: Path, repeat: int) -> dict[str, float]:
    """Save once in each way, the disk quiet before each and every other time in reverse; return the seconds of each."""
    found = {}
    for way in WAYS if repeat % 2 else reversed(WAYS):
        os.sync()
        found |= way(saved, folder / "saved")
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
    saved = after_one_step(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        runs = [measure(saved, Path(name), repeat) for repeat in range(arguments.repeats)]
    print(table(runs))


if __name__ == "__main__":
    main()
