"""Try every fault of the bench and write docs/faults.md: what each kind is, and what became of its cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.ledger import table

ROOT = Path(__file__).parent.parent
FUZZED = ROOT / ".fuzz" / "ledger.json"
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# Faults

`make faults` breaks runs of a tiny model in every way that the project knows of and looks at what became of each.
`make test` tries a few cases of every kind. What is promised stands in [runs](runs.md).

A case has **survived** if everything went as promised. Where the run can go on, `dpo train --resume` finishes it: it
goes on from what it had saved, `final/` is that of a run that nothing happened to, byte for byte, `metrics.jsonl` has
each step once with the same numbers, and nothing is left behind. Where it cannot go on, an error says what happened,
and the last checkpoint is whole. Something is **lost** if it was promised to be kept and is gone. A **wrong result** is
one that the run gives as if all were well. A **traceback** is one that the user is shown.

- **Crash at a file operation.** A run with a cache of its own prepares its data, scores the reference, takes eight
  steps, evaluates, saves four checkpoints and drops the older two. The process is ended at every file operation: before
  it opens, writes, syncs, renames or removes a file or makes a folder, and when half of the bytes of a write are
  written. Three kinds of run: `dpo`; `bco`, which remembers something and has a reference that moves; and one that
  saves in the background. Where two processes train, the other one is killed, as a launcher does, and every fourth
  operation is tried. Of one process, every sixth is followed by two more crashes while resuming.
- **Power cut at a file operation**, every fifth. What was not synced is lost by the rules of POSIX, which promise less
  than any one file system: bytes are kept when their file was synced, names when their folder was. Of the rest nothing
  remains; or all names, and files are short; or all names, and files hold zeros; or a part of it, by chance.
- **SIGKILL at a random moment.** Up to six in a row on one run.
- **SIGINT, SIGTERM, SIGUSR1** while the run loads, scores the reference, takes a step or evaluates, and at every eighth
  file operation. A second SIGINT during a save stops it at once.
- **Disk.** Full (a small tmpfs, a limit on the size of files), read-only, slow, failing to flush, refusing each kind of
  file with each error; a folder removed under the run.
- **Damage.** Every file of a checkpoint, of prepared data, of the reference cache, of the trained model and of the run
  truncated, emptied, with a flipped byte, missing, a folder in its place, or from another run.
- **Numbers.** A loss, a gradient or a weight that is NaN or infinite at every step, from data or made so; overflow in
  float16; learning rates far too high; steps skipped, too often and with a resume between.
- **Two at once.** On one output folder, on one prepared folder, on one reference cache; holders and waiters killed and
  interrupted.
- **Ranks.** One of two or three processes killed, stopped, hanging or failing while it loads, scores the reference,
  takes a step, saves or evaluates.
- **Resume.** After every step, with every loss, reference, optimizer and option.
- **Fuzzing.** Inputs that atheris makes up for everything that reads files: each gives a result or an error.

"""
TAIL = """

This page is written by `make faults`.
"""


def main() -> int:
    """Run the bench, write the page and return the status of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.json"
        command = [sys.executable, "-m", "pytest", "--numprocesses", "auto", "--dist", "worksteal"]
        tests = [*command, "--faults-ledger", str(ledger), "tests/faults"]
        status = subprocess.run(tests, cwd=ROOT, env={**os.environ, "DPO_FAULTS": "full"}, check=False).returncode
        # Tests that were broken off tell nothing of the cases that are missing.
        if status in (0, 1) and ledger.exists():
            entries = [entry for file in (ledger, FUZZED) if file.exists() for entry in json.loads(file.read_text())]
            PAGE.write_text(HEAD + table(entries) + TAIL, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
