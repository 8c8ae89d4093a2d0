"""Try every fault of the bench and write docs/faults.md: what each kind is, and what became of its cases.

    python scripts/write_faults_page.py            what is not known of this code yet; the page when all of it is
    python scripts/write_faults_page.py crash      one part: `tests/faults/test_crash.py`

Each part is a run of its own, whose ledger stays in `.faults`: what was broken off goes on where it was. A part counts
for the code that it was run with, program and its own tests, and for no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.ledger import table

ROOT = Path(__file__).parent.parent
FUZZED = ROOT / ".fuzz" / "ledger.json"
LEDGERS = ROOT / ".faults"
PARTS = sorted(file.stem.removeprefix("test_") for file in (ROOT / "tests" / "faults").glob("test_*.py"))
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# Faults

`make faults` breaks runs of a tiny model in every way that the project knows of and looks at what became of each.
`make test` tries a few cases of every kind. [Runs](runs.md) says what is promised.

A case has **survived** if everything went as promised. Where the run can go on, `dpo train --resume` finishes it: it
goes on from what it had saved, `final/` is that of a run that nothing happened to, byte for byte, `metrics.jsonl`,
`held_out.jsonl` and `samples.jsonl` have each step once with the same values, and nothing is left behind.
Where it cannot go on, an error says what happened, and the last checkpoint is whole. Something is **lost** if it was
promised to be kept and is gone. A **wrong result** is one that the run gives as if all were well. A **traceback** is
one that the user is shown.

- **Crash at a file operation.** A run with a cache of its own prepares its data, scores the reference, takes eight
  steps, evaluates, saves four checkpoints and drops the older two. The process is ended at every file operation: before
  it opens, writes, syncs, renames or removes a file or makes a folder, and when half of the bytes of a write are
  written. The kinds of run: `dpo`; `bco`, which remembers something and has a reference that moves; `lora`, an adapter
  with dropout that goes on from another and has such a reference; `nf4`, an adapter beside a base of 4 bits; `split`,
  weights held as halves; one that saves in the background; and `best`, which stops when it gets no better and whose
  trained model is the best evaluated step, saving at once and in the background. Where two processes train, the other
  one is killed, as a launcher does, and every eighth operation is tried. Of one process, every twelfth is followed by
  two more crashes while resuming. Where two processes each have a part of all weights (`training.sharding: full`), one
  or the other is ended at every second of its own operations, of four kinds of run: `dpo`, `lora`, one that saves in
  the background, and `best`. In half of the cases the other one is killed, in half it is left to find out and to end by
  itself.
- **Power cut at a file operation**, every tenth. What was not synced is lost by the rules of POSIX, which promise less
  than any one file system: bytes are kept when their file was synced, names when their folder was. Of the rest nothing
  remains; or all names, and files are short; or all names, and files hold zeros; or a part of it, by chance. With
  shards, the power of one of two machines that share a disk.
- **SIGKILL at a random moment.** Up to six in a row on one run; of two processes with shards, one or the other.
- **SIGINT, SIGTERM, SIGUSR1, SIGHUP** while the run loads, scores the reference, takes a step or evaluates, and at
  every eighth file operation (SIGHUP not there). A second SIGINT during a save stops it at once.
- **Disk.** Full (a small tmpfs, a limit on the size of files), read-only, slow, failing to flush, refusing each kind of
  file with each error; a folder removed under the run.
- **Exports** as a model, an adapter, a merged model and a GGUF file: ended at every file operation, by a crash or a
  power cut; on another disk that is full or fails to flush; with a target that another process makes meanwhile. What
  is exported is whole or absent, the runs keep every byte, and the next export to the same place removes what was left.
- **Damage.** Every file of a checkpoint, of prepared data, of the reference cache, of the trained model and of the run
  truncated, emptied, with a flipped byte, missing, a folder in its place, or from another run; and those of a run that
  trains an adapter.
- **Numbers.** A loss, a gradient or a weight that is NaN or infinite at every step, from data or made so; overflow in
  float16; learning rates far too high; steps skipped, too often and with a resume between.
- **Two at once.** On one output folder, on one prepared folder, on one reference cache; holders and waiters killed and
  interrupted.
- **Ranks.** One of two or three processes killed, stopped, hanging or failing while it loads, scores the reference,
  takes a step, saves or evaluates; with shards in the middle of a forward pass and of a backward pass. One that
  exchanges something else than the others, and one that works for longer than the time-out, which is no fault.
- **Resume.** After every step, with every loss, reference, optimizer, kind of adapter and option.
- **Fuzzing.** Inputs that atheris makes up for everything that reads files: each gives a result or an error. It stands
  in the table where it was run before.

"""
TAIL = """

Program and bench are those of commit {commit}. This page is written by `make faults`.
"""


def code_digest(part: str) -> str:
    """Digest the program and what a part of the bench is made of: what was tried holds of them alone."""
    whole = hashlib.sha256()
    bench = [file for file in (ROOT / "tests" / "faults").glob("*.py") if not file.name.startswith("test_")]
    own = ROOT / "tests" / "faults" / f"test_{part}.py"
    for file in sorted([*(ROOT / "dpo_cli").rglob("*.py"), *bench, own]):
        whole.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def commit() -> str:
    """Return the last commit that changed the program or the bench."""
    command = ["git", "log", "-1", "--format=%h", "--", "dpo_cli", "tests/faults"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def ledger_of(part: str) -> Path:
    """Return where the cases of a part are kept."""
    return LEDGERS / f"{part}-{code_digest(part)}.json"


def run(part: str, ledger: Path) -> int:
    """Try all cases of a part and return the status of its tests; only what was not broken off leaves a ledger."""
    unfinished = ledger.with_suffix(".unfinished")
    # Where no case is taken down, as by the tests of the bench itself, it stays as it is.
    unfinished.write_text("[]", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--numprocesses", "auto", "--dist", "worksteal"]
    tests = [*command, "--faults-ledger", str(unfinished), f"tests/faults/test_{part}.py"]
    status = subprocess.run(tests, cwd=ROOT, env={**os.environ, "DPO_FAULTS": "full"}, check=False).returncode
    if status in (0, 1):
        unfinished.replace(ledger)
    return status


def main(*names: str) -> int:
    """Run what is missing, write the page if nothing is any more, and return the worst status of the tests."""
    if unknown := set(names) - set(PARTS):
        sys.exit(f"error: there is no part {', '.join(sorted(unknown))}\n\nhint: the parts are {', '.join(PARTS)}")
    LEDGERS.mkdir(exist_ok=True)
    status = 0
    for part in names or PARTS:
        if names or not ledger_of(part).exists():
            print(f"{part} …", flush=True)
            status = max(status, run(part, ledger_of(part)))
    ledgers = [ledger_of(part) for part in PARTS]
    if missing := [part for part, ledger in zip(PARTS, ledgers, strict=True) if not ledger.exists()]:
        print(f"no page yet: {', '.join(missing)} not tried with this code")
        return status
    files = [*ledgers, *([FUZZED] if FUZZED.exists() else [])]
    entries = [entry for file in files for entry in json.loads(file.read_text(encoding="utf-8"))]
    PAGE.write_text(HEAD + table(entries) + TAIL.format(commit=commit()), encoding="utf-8")
    print(table(entries))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
