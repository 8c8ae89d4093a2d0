"""Measure `dpo prepare-data` beside TRL's preparation of the same pairs: rows per second and peak memory.

    make bench-prepare
    make bench-prepare BENCH='--data FILE … --rows N … --trl-rows N --repeats N --model MODEL'

Each FILE is a data file of any shape that the program reads; by default the demo pairs. Its pairs are repeated, with
numbered prompts, until there are as many rows as asked. MODEL is a folder, a .gguf file or a Hub id whose tokenizer has
a chat template; by default the demo model.

Each count of rows is prepared by a process of its own with an empty cache. The rate is that of the preparation, its
check and its report: the time of the command less the time it takes for ten rows. The memory is the resident set of the
process and its workers together, libraries that they share counted for each of them (Linux). Where `trl` can be
imported, its preparation of the first rows, in memory and in one process, as is its default, is measured before and
after each command; the ratio is to the mean of both. The same is said of processor time, which other programs on the
machine change little: rows per second of one core, however many cores took part.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmark.runs import DEMO_MODEL, DEMO_PAIRS
from benchmark.work import model_folder
from dpo_cli.data.pairs.detection import detect
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.pairs.sources import Source, read_rows
from dpo_cli.data.records import BadRow, Message, Pair

FEW_ROWS = 10
MAX_LENGTH = 1 << 14
"""Nothing is dropped: TRL keeps pairs of any length."""

_RESIDENT = re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE)

Row = dict[str, list[dict[str, str]]]


def pairs_of(file: Path) -> list[Pair]:
    """Read the pairs of a data file; rows that become none are left out."""
    rows = list(read_rows(Source(path=str(file))))
    shape = FORMATS[detect(rows, str(file))]
    pairs: list[Pair] = []
    for row in rows:
        try:
            pairs += read_pairs(shape, row)
        except BadRow:
            continue
    return pairs


def numbered_rows(pairs: Sequence[Pair]) -> Iterator[Row]:
    """Yield rows of message lists without end: the pairs over and over, a number behind each prompt."""
    for number, pair in enumerate(itertools.cycle(pairs), 1):
        *before, last = pair.prompt
        numbered = dataclasses.replace(last, content=f"{last.text} ({number})", input="")
        yield {
            "prompt": _as_dicts([*before, numbered]),
            "chosen": _as_dicts(pair.chosen),
            "rejected": _as_dicts(pair.rejected),
        }


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]


def held_bytes(process: int) -> int:
    """Return the resident memory of a process and of all that it started."""
    folder = Path("/proc") / str(process)
    try:
        found = _RESIDENT.search((folder / "status").read_text())
        children = [int(child) for file in folder.glob("task/*/children") for child in file.read_text().split()]
    except OSError:  # It has just ended.
        return 0
    return (int(found[1]) * 1024 if found else 0) + sum(map(held_bytes, children))


@dataclass(frozen=True)
class Spent:
    """What some work took: seconds by the clock and of processors, and the largest memory held, in bytes."""

    seconds: float
    cpu_seconds: float
    memory: int = 0


def prepare(model: str, source: Path, folder: Path) -> Spent:
    """Prepare a file in a fresh process."""
    config = folder / "config.yaml"
    data = {"train": str(source), "eval": None, "max_length": MAX_LENGTH}
    config.write_text(json.dumps({"model": model, "data": data}), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        started, largest, before = time.perf_counter(), 0, children_seconds()
        command = [sys.executable, "-m", "dpo_cli", "prepare-data", "--config", str(config)]
        process = subprocess.Popen(
            command, env={**os.environ, "DPO_CACHE_DIR": cache}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            largest = max(largest, held_bytes(process.pid))
            time.sleep(0.1)
        if process.returncode:
            assert process.stdout
            sys.exit(process.stdout.read().decode())
        return Spent(time.perf_counter() - started, children_seconds() - before, largest)


def children_seconds() -> float:
    """Return the processor time of all processes that this one started and that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def prepare_by_trl(tokenizer: Any, rows: Sequence[Row]) -> Spent:
    """Let TRL's trainer prepare conversations."""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    dataset = Dataset.from_list(list(rows))
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[])
        started, before = time.perf_counter(), time.process_time()
        DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, settings, "train")
        return Spent(time.perf_counter() - started, time.process_time() - before)


class Bench:
    """Measures one data file.

    Args:
        model: A model's folder or Hub id.
        file: The data file.
        folder: Where to work.
        trl_rows: The rows that TRL prepares; 0: none.
    """

    def __init__(self, model: str, file: Path, folder: Path, trl_rows: int) -> None:
        from transformers import AutoTokenizer

        self.model, self.folder, self.pairs = model, folder, pairs_of(file)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.trl_rows = list(itertools.islice(numbered_rows(self.pairs), trl_rows))

    def prepare(self, count: int) -> Spent:
        """Prepare so many rows."""
        source = self.folder / "rows.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for row in itertools.islice(numbered_rows(self.pairs), count):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return prepare(self.model, source, self.folder)

    def line(self, count: int) -> str:
        """Measure so many rows and say what was found."""
        trl = self._trl()
        few, many = self.prepare(FEW_ROWS), self.prepare(count)
        trl += self._trl()
        found = [f"{count:>10,} rows {many.seconds:7.1f} s {many.memory / 1e6:6,.0f} MB at most"]
        for what, clock in (("by the clock", "seconds"), ("of a core", "cpu_seconds")):
            spent = getattr(many, clock) - getattr(few, clock)
            if spent <= 0:
                found.append(f"{' ' * 15} rows/s {what}: more rows took no longer, other programs were at work")
                continue
            theirs = [len(self.trl_rows) / getattr(one, clock) for one in trl]
            shown = f"{what} {count / spent:,.0f}"
            if theirs:
                shown += f", TRL {theirs[0]:,.0f} and {theirs[1]:,.0f}, ratio {count / spent * 2 / sum(theirs):.1f}"
            found.append(f"{' ' * 15} rows/s {shown}")
        return "\n".join(found)

    def _trl(self) -> list[Spent]:
        return [prepare_by_trl(self.tokenizer, self.trl_rows)] if self.trl_rows else []


def main() -> None:
    """Measure every file and every count of rows, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[DEMO_PAIRS])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--trl-rows", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    options = parser.parse_args()
    trl_rows = options.trl_rows if importlib.util.find_spec("trl") else 0
    with tempfile.TemporaryDirectory() as name:
        model = model_folder(options.model, Path(name))
        for file in options.data:
            bench = Bench(model, file, Path(name), trl_rows)
            sys.stdout.write(f"{file.name}, {len(bench.pairs):,} pairs\n")
            for count, _ in itertools.product(options.rows, range(options.repeats)):
                load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
                sys.stdout.write(f"{bench.line(count)}\n{' ' * 15} load of the machine before {load:.1f}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
