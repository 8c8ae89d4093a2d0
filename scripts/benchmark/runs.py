"""One run of this program, of TRL, or of a helper: each a process of its own, timed by what it says meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmark.report import Run
from benchmark.speed import Gauge, GaugeFailed, Holder, Pause

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_PAIRS = ROOT / "configs" / "demo" / "pairs.jsonl"
FOLDER = Path(__file__).parent
LINES_OF_A_FAILURE = 20
SEED = 42
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""What both sides compute in, by device."""
ADAPTERS: Mapping[str, dict[str, Any]] = {"lora": {"rank": 16, "alpha": 32}}
"""Adapters that both sides can train, by name; on every linear layer, without dropout."""
ADAPTER_TITLES = {"lora": "LoRA of rank 16"}

StampedLines = list[tuple[float, str]]


class RunFailed(Exception):
    """A process failed, or did not say what it was to say."""


@dataclass(frozen=True)
class Clock:
    """By which lines on standard error one tells when training began and ended."""

    begins: re.Pattern[str]
    ends: re.Pattern[str]

    def seconds(self, lines: StampedLines, pauses: Sequence[Pause] = ()) -> float:
        """Return the seconds from the first line that begins to the last one that ends, without pauses.

        Raises:
            RunFailed: There is no such line.
        """
        begun = [stamp for stamp, line in lines if self.begins.match(line)]
        ended = [stamp for stamp, line in lines if self.ends.match(line)]
        if not begun or not ended:
            raise RunFailed(f"no line says when training {'ended' if begun else 'began'}\n{_tail(lines)}")
        held = sum(max(0.0, min(one.ended, ended[-1]) - max(one.began, begun[0])) for one in pauses)
        return ended[-1] - begun[0] - held


# A line of progress such as `32/64` comes when part of the reference pass is over: too late to start a clock.
OUR_CLOCK = Clock(re.compile(r"reference log-probabilities(?!: \d+/\d+)"), re.compile(r"step (\d+)/\1\b"))
THEIR_CLOCK = Clock(re.compile(r"benchmark: training begins"), re.compile(r"benchmark: training ended"))


@dataclass(frozen=True)
class Ended:
    """What a process left."""

    output: str
    lines: StampedLines
    seconds: float
    """Without pauses."""
    peak_bytes: int
    pauses: list[Pause]


@dataclass(frozen=True)
class Work:
    """The same work for both sides.

    Attributes:
        model: A folder.
        pairs: A file.
        pairs_per_step: Pairs of a step.
        epochs: Passes over the pairs.
        adapter: Which of `ADAPTERS` trains; None: all weights.
        device: `cpu` or `cuda`.
        recomputed: Whether both compute activations again in the backward pass.
        precomputed: Whether TRL asks the reference for all pairs before step 1, instead of in every step.
    """

    model: str
    pairs: str
    pairs_per_step: int
    epochs: int
    adapter: str | None = None
    device: str = "cpu"
    recomputed: bool = False
    precomputed: bool = False

    @property
    def dtype(self) -> str:
        """What both compute in."""
        return DTYPES[self.device]

    @property
    def learning_rate(self) -> float:
        """An adapter moves too little at the rate of all weights: losses would agree whatever was computed."""
        return 5e-5 if self.adapter else 5e-6


def run_process(
    command: list[str], environment: dict[str, str], gauged: tuple[Clock, Callable[[], float]] | None = None
) -> Ended:
    """Run a command to its end, noting when each line of its standard error came.

    Args:
        command: What to run.
        environment: Of the process.
        gauged: Tells when training is under way, and measures the machine's speed meanwhile, for which the process is
            held every few seconds.

    Raises:
        RunFailed: It ended with another status than 0.
        GaugeFailed: The speed could not be measured.
    """
    lines: StampedLines = []
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, cwd=ROOT, env=environment)
        clock, holder = (gauged[0], Holder(child.pid, gauged[1])) if gauged else (None, None)
        try:
            with child.stderr as stream:
                for line in stream:
                    text = line.decode(errors="replace").rstrip().rsplit("\r")[-1]
                    lines.append((time.monotonic(), text))
                    if holder and clock.begins.match(text):
                        holder.begin()
                    elif holder and clock.ends.match(text):
                        holder.end()
            pauses = holder.end() if holder else []
            # Of this child alone; RUSAGE_CHILDREN would be the largest of all that ever ran.
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if child.returncode is None:
                if holder:
                    with contextlib.suppress(GaugeFailed):
                        holder.end()
                child.kill()
                child.wait()
        seconds = time.monotonic() - started - sum(one.ended - one.began for one in pauses)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    if child.returncode != 0:
        program = next(Path(word).name for word in command[1:] if not word.startswith("-"))
        raise RunFailed(f"`{program} …` ended with status {child.returncode}\n{_tail(lines)}")
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Ended(printed, lines, seconds, peak_bytes, pauses)


def _tail(lines: StampedLines) -> str:
    return "\n".join(f"  {line}" for _, line in lines[-LINES_OF_A_FAILURE:])


def environment_of(threads: int | None, device: str = "cpu", **more: str) -> dict[str, str]:
    """Return the surroundings of a child: this checkout's package, no network, the device alone, so many threads."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
    fixed = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        fixed |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    if threads:
        fixed |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**os.environ, **fixed, **more}


def ask(threads: int | None, device: str, *arguments: str) -> dict[str, Any]:
    """Let a process of its own do what needs torch, and return its answer."""
    ended = run_process([sys.executable, str(FOLDER / "work.py"), *arguments], environment_of(threads, device))
    answer: dict[str, Any] = json.loads(ended.output.splitlines()[-1])
    return answer


def run_ours(work: Work, threads: int | None, gauge: Gauge) -> Run:
    """Train with this program, in a cache of its own so that the reference pass is part of the run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "model": {"name": work.model, "dtype": work.dtype},
            "data": {"train": work.pairs, "eval": None, "max_length": 1024},
            "adapter": {"type": work.adapter, **ADAPTERS[work.adapter]} if work.adapter else None,
            "loss": {"type": "dpo", "beta": 0.1},
            "training": {
                "seed": SEED,
                "epochs": work.epochs,
                "pairs_per_step": work.pairs_per_step,
                "shuffle": False,
                "learning_rate": work.learning_rate,
                "schedule": "constant",
                "warmup_ratio": 0,
                "weight_decay": 0,
                "max_grad_norm": 1.0,
                "gradient_checkpointing": work.recomputed,
            },
            "checkpoints": {"every_steps": 1_000_000, "at_end": False},
            "output_dir": str(folder / "run"),
        }
        config = folder / "benchmark.yaml"
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        environment = environment_of(threads, work.device, DPO_CACHE_DIR=str(folder / "cache"))
        command = [sys.executable, str(FOLDER / "metered.py"), str(folder / "peak"), "train", "--config", str(config)]
        ended = _gauged(command, environment, OUR_CLOCK, gauge, work.device)
        device_bytes = _device_bytes(folder / "peak")
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    return as_run(ended, OUR_CLOCK, losses, device_bytes)


def run_theirs(work: Work, threads: int | None, gauge: Gauge) -> Run:
    """Train with TRL."""
    with tempfile.TemporaryDirectory() as folder:
        of_adapter = ["--adapter", json.dumps(ADAPTERS[work.adapter])] if work.adapter else []
        of_adapter += ["--device", work.device, "--peak", str(Path(folder) / "peak")]
        of_adapter += ["--recomputed"] * work.recomputed + ["--precomputed"] * work.precomputed
        numbers = (work.pairs_per_step, work.epochs, work.learning_rate, SEED)
        arguments = [work.model, work.pairs, *map(str, numbers), folder, *of_adapter]
        command = [sys.executable, str(FOLDER / "peer.py"), *arguments]
        ended = _gauged(command, environment_of(threads, work.device), THEIR_CLOCK, gauge, work.device)
        device_bytes = _device_bytes(Path(folder) / "peak")
    return as_run(ended, THEIR_CLOCK, json.loads(ended.output.splitlines()[-1]), device_bytes)


def _gauged(command: list[str], environment: dict[str, str], clock: Clock, gauge: Gauge, device: str) -> Ended:
    """Run a command and measure the machine's speed: of a CPU meanwhile; of a GPU, which nobody shares, around it."""
    if device == "cpu":
        return run_process(command, environment, (clock, gauge))
    before = gauge()
    ended = run_process(command, environment)
    now = time.monotonic()
    return replace(ended, pauses=[Pause(now, now, speed) for speed in (before, gauge())])


def _device_bytes(file: Path) -> int | None:
    """Read the largest memory that a process took of a GPU, where it had one."""
    return int(file.read_text()) if file.is_file() else None


def as_run(ended: Ended, clock: Clock, losses: list[float], device_bytes: int | None = None) -> Run:
    """Make a run of what a process left, the losses it logged, and the memory that it took of a GPU.

    Raises:
        RunFailed: It did not say when training began or ended.
    """
    return Run(
        training_seconds=clock.seconds(ended.lines, ended.pauses),
        command_seconds=ended.seconds,
        peak_bytes=device_bytes or ended.peak_bytes,
        losses=losses,
        gflops_meanwhile=[pause.gflops for pause in ended.pauses],
    )


def end_when_told() -> None:
    """Let SIGTERM and SIGHUP end this program as an error does: a run that is held must not be left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *received: sys.exit(128 + received[0]))


def positive(text: str) -> int:
    """Read a whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
