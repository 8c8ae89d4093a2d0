"""Search all targets for inputs that break them: `python -m tests.fuzz SECONDS [TARGET …]`, as `make fuzz` does.

What breaks one is kept in `.fuzz/TARGET`, beside what was drawn and the traceback; `.fuzz/journal.jsonl` counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.journal import code_digest
from tests.faults.ledger import Outcome
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".fuzz"

_STARTING_SECONDS = 120
"""How long a search may take beyond its time: to import the program, and for a last input."""


def search(name: str, seconds: float) -> Counter[str]:
    """Search one target and return how many inputs were tried, how many broke it, and for how many seconds.

    A process that an input ends is started again for the rest of the time.
    """
    folder, found = FOLDER / name.replace(" ", "-"), Counter[str]()
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "found.json"
    while found["seconds"] < seconds:
        report.unlink(missing_ok=True)
        rest, started = seconds - found["seconds"], time.monotonic()
        ended = _search_once(name, rest, folder)
        tried = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"inputs": 0, "broken": 0}
        found += Counter(inputs=tried["inputs"], broken=tried["broken"])
        # Where a process ended early, all the time counts that it took.
        found["seconds"] += tried["seconds"] if ended else max(1, time.monotonic() - started)
        found["broken"] += not ended
    return found


def _search_once(name: str, seconds: float, folder: Path) -> bool:
    """Search in a process of its own; tell whether it went on to its end."""
    command = [sys.executable, "-m", "tests.fuzz.search", name, str(seconds), str(folder)]
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as place, (folder / "log.txt").open("w") as log:
        env = {**os.environ, "TMPDIR": place, "OMP_NUM_THREADS": "1"}
        try:
            ended = subprocess.run(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=seconds + _STARTING_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return False
    return ended.returncode == 0


def main(seconds: str, *names: str) -> int:
    """Search, print a line for each target and note it with the code that was searched; return the exit status."""
    if importlib.util.find_spec("atheris") is None:
        print("fuzzing is left out: there is no atheris for this Python here (`pip install 'dpo-cli[fuzz]'`)")
        return 0
    code, broken = code_digest("tests/fuzz"), 0
    FOLDER.mkdir(exist_ok=True)
    for name in names or TARGETS:
        found = search(name, float(seconds))
        broken += found["broken"]
        print(
            f"{name:<20} {found['inputs']:>9,} inputs {found['seconds']:>6.0f} s {found['broken']:>4} broke it",
            flush=True,
        )
        survived = found["inputs"] - found["broken"]
        cases = [[f"fuzzing {name}", Outcome.SURVIVED.value, survived]]
        cases += [[f"fuzzing {name}", Outcome.TRACEBACK.value, found["broken"]]] if found["broken"] else []
        with (FOLDER / "journal.jsonl").open("a", encoding="utf-8") as journal:
            line = {"test": f"tests/fuzz::{name}", "code": code, "round": 1, "cases": cases}
            journal.write(json.dumps(line) + "\n")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
