"""Measure `dpo prepare-data`: rows per second, and the peak memory of the program and its workers.

    python scripts/bench_prepare.py [--model MODEL] [--pairs FILE.jsonl] [--rows 10000 100000 1000000] [--trl-rows 4000]

MODEL is a folder, a .gguf file or a Hub id whose tokenizer has a chat template; by default the demo model. The rows
are made from the demo pairs, joined until a pair has about 200 tokens, or taken from a file, over and over. Each
count is prepared by a process of its own with an empty cache. The rate is that of the preparation: the time of the
command less the time it takes for ten rows.
The memory is the resident set of the process and its workers together, libraries that they share counted for each
of them (Linux). Where `trl` can be imported, its preparation of the same rows, in memory, is measured beside it: before
and after, for a machine has better and worse minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from benchmark.runs import DEMO_MODEL, DEMO_PAIRS
from benchmark.work import model_folder

_RESIDENT = re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE)


def rows_like_dialogues() -> Iterator[dict[str, str]]:
    """Yield rows of several demo pairs each, without end: prompt and longer response have 200 tokens and some."""
    demo = [json.loads(line) for line in DEMO_PAIRS.read_text(encoding="utf-8").splitlines()]
    generator = random.Random(0)
    while True:
        some = generator.sample(demo, 7)
        yield {
            "instruction": " ".join(row["instruction"] for row in some[:4]),
            "chosen": " ".join(row["chosen"] for row in some),
            "rejected": " ".join(row["rejected"] for row in some[:4]),
        }


def rows_of(pairs: Path | None) -> Iterator[dict[str, str]]:
    """Yield rows without end: a file's, over and over, or made ones."""
    if pairs is None:
        return rows_like_dialogues()
    return itertools.cycle([json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()])


def held_bytes(process: int) -> int:
    """Return the resident memory of a process and of all that it started."""
    folder = Path("/proc") / str(process)
    try:
        found = _RESIDENT.search((folder / "status").read_text())
        children = [int(child) for file in folder.glob("task/*/children") for child in file.read_text().split()]
    except OSError:  # It has just ended.
        return 0
    return (int(found[1]) * 1024 if found else 0) + sum(map(held_bytes, children))


def prepare(model: str, source: Path, folder: Path) -> tuple[float, float]:
    """Prepare a file in a fresh process; return the seconds it took and the largest memory held, in MB."""
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model": model, "data": {"train": str(source), "eval": None}}), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        started, largest = time.perf_counter(), 0
        command = [sys.executable, "-m", "dpo_cli", "prepare-data", "--config", str(config)]
        process = subprocess.Popen(
            command, env={**os.environ, "DPO_CACHE_DIR": cache}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            largest = max(largest, held_bytes(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        if process.returncode:
            assert process.stdout
            sys.exit(process.stdout.read().decode())
    return seconds, largest / 1e6


def trl_rate(model: str, rows: list[dict[str, str]]) -> float:
    """Return the rows per second at which TRL's trainer prepares the same conversations."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    roles = {"instruction": "user", "chosen": "assistant", "rejected": "assistant"}
    names = {"instruction": "prompt"}
    dataset = Dataset.from_list(
        [{names.get(k, k): [{"role": role, "content": row[k]}] for k, role in roles.items()} for row in rows]
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[])
        started = time.perf_counter()
        DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, settings, "train")
        return len(rows) / (time.perf_counter() - started)


def main() -> None:
    """Measure every count of rows and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--trl-rows", type=int, default=4_000)
    options = parser.parse_args()
    compares = options.trl_rows and importlib.util.find_spec("trl")
    some = list(itertools.islice(rows_of(options.pairs), options.trl_rows))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_folder(options.model, folder)
        trl = [trl_rate(model, some)] if compares else []
        source, start_seconds = folder / "rows.jsonl", 0.0
        for count in (10, *options.rows):
            with source.open("w", encoding="utf-8") as file:
                for row in itertools.islice(rows_of(options.pairs), count):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            seconds, megabytes = prepare(model, source, folder)
            start_seconds = start_seconds or seconds
            rate = f"{count / (seconds - start_seconds):8,.0f} rows/s" if seconds > start_seconds else " " * 15
            sys.stdout.write(f"{count:>10,} rows {seconds:8.1f} s {rate} {megabytes:8.0f} MB at most\n")
            sys.stdout.flush()
        if compares:
            trl.append(trl_rate(model, some))
    if compares:
        sys.stdout.write(f"TRL, {len(some):,} rows: {trl[0]:,.0f} and {trl[1]:,.0f} rows/s\n")


if __name__ == "__main__":
    main()
