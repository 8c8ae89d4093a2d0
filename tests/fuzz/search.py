"""Search one target for inputs that break it, for a while: `python -m tests.fuzz.search TARGET SECONDS FOLDER`.

Inputs are bytes that libFuzzer changes; hypothesis makes of them what the target draws, and what of the program they
reach decides which are changed further. An input that breaks something is kept and the search goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import atheris
from hypothesis import given, settings

_PADDING = bytes(4096)
"""Stands behind every input: what is still to be drawn then is as small as can be."""

_MAX_BYTES = 2048
_NUM_SEEDS = 64
_SECONDS_BETWEEN_REPORTS = 1.0


class Search:
    """What libFuzzer calls with every input.

    Args:
        target: The target.
        seconds: How long to search.
        folder: Where the inputs that break it are kept, and `found.json`: what was done so far.
    """

    def __init__(self, target: Any, seconds: float, folder: Path) -> None:
        from tests.fuzz.targets import check

        @settings(database=None)
        @given(value=target.inputs)
        def read(value: object) -> None:
            self._value = value
            check(target, value)

        self._read = read.hypothesis.fuzz_one_input
        self._folder, self._value = folder, None
        self._num_inputs = self._num_broken = 0
        self._started = self._reported = time.monotonic()
        self._end = self._started + seconds

    def __call__(self, data: bytes) -> None:
        """Try one input; end the process when the time is over."""
        try:
            self._read(data + _PADDING)
        except Exception as error:
            self._num_broken += 1
            self._keep(data, error)
        self._num_inputs += 1
        now = time.monotonic()
        if now - self._reported > _SECONDS_BETWEEN_REPORTS or now > self._end:
            self._reported = now
            self._report(now - self._started)
        if now > self._end:
            os._exit(0)

    def _keep(self, data: bytes, error: Exception) -> None:
        """Keep the smallest input of those that break the same lines in the same way."""
        lines = "\n".join(f"{frame.filename} {frame.line}" for frame in traceback.extract_tb(error.__traceback__))
        name = f"{type(error).__name__}-{hashlib.sha256(lines.encode()).hexdigest()[:8]}"
        file = self._folder / name
        if not file.exists() or len(data) < file.stat().st_size:
            said = "".join(traceback.format_exception(error))
            file.with_suffix(".txt").write_text(f"{self._value!r}\n\n{said}", encoding="utf-8", errors="replace")
            file.write_bytes(data)

    def _report(self, seconds: float) -> None:
        found = {"inputs": self._num_inputs, "broken": self._num_broken, "seconds": seconds}
        (self._folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def main(name: str, seconds: str, place: str) -> None:
    """Search."""
    with atheris.instrument_imports(include=["dpo_cli"]):
        from tests.fuzz import parts

        parts.rooms()
        from tests.fuzz.targets import TARGETS
    for make in TARGETS[name].parts:
        make()
    folder = Path(place)
    seeds = folder / "corpus"
    seeds.mkdir(parents=True, exist_ok=True)
    for number in range(_NUM_SEEDS):
        (seeds / f"seed-{number}").write_bytes(random.Random(number).randbytes(8 * (number + 1)))
    # Hangs are noticed by the targets themselves, by the same timer.
    options = ["-timeout=0", "-rss_limit_mb=0", "-len_control=0", f"-max_len={_MAX_BYTES}"]
    options += ["-print_funcs=0", "-verbosity=0", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], Search(TARGETS[name], float(seconds), folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
