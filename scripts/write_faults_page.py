"""Break runs as the bench does and write docs/faults.md: what each kind of fault is, and what became of its cases.

    python scripts/write_faults_page.py                    the next round, or what is left of one that was broken off
    python scripts/write_faults_page.py --all              all rounds that are left
    python scripts/write_faults_page.py crash --round 3    one part of one round: `tests/faults/test_crash.py`
    python scripts/write_faults_page.py --page             the page alone, of what was tried

Each test is taken down in `.faults/journal.jsonl` as it ends: what was broken off goes on where it was, and rounds add
up. What was tried counts for the code that it was run with, program and bench, and for no other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.journal import read_journal
from tests.faults.ledger import table
from tests.faults.shares import ROUNDS
from tests.faults.zygote import ROUND

ROOT = Path(__file__).parent.parent
FUZZED = ROOT / ".fuzz" / "ledger.json"
JOURNAL = ROOT / ".faults" / "journal.jsonl"
PARTS = sorted(file.stem.removeprefix("test_") for file in (ROOT / "tests" / "faults").glob("test_*.py"))
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# Faults

`make faults` breaks runs of tiny models in every way that the project knows of and looks at what became of each.
`make test` tries a few cases of every kind. [Runs](runs.md) says what is promised.

File operations and random moments are divided over {rounds} rounds, each of which tries others, from the beginning of a
run to its end; all else is tried in the first. `make faults` runs the next round, in about an hour on two cores by what
single cases take. What was tried with the same code adds up, and {rounds} rounds are every operation named below
(`FAULTS=--all`).

A case has **survived** if everything went as promised. Where the run can go on, `dpo train --resume` finishes it: it
goes on from what it had saved, `final/` is that of a run that nothing happened to, byte for byte, `metrics.jsonl`,
`held_out.jsonl` and `samples.jsonl` have each step once with the same values, and nothing is left behind.
Where it cannot go on, an error says what happened, and the last checkpoint is whole. Something is **lost** if it was
promised to be kept and is gone. A **wrong result** is one that the run gives as if all were well. A **traceback** is
one that the user is shown.

- **Crash at a file operation.** A run with a cache of its own prepares its data, scores the reference, takes eight
  steps, evaluates, saves four checkpoints and drops the older two. The process is ended at every file operation: before
  it opens, writes, syncs, renames or removes a file or makes a folder, and when half of the bytes of a write are
  written. The kinds of run: `bco`, which remembers something and has a reference that moves; `lora`, an adapter with
  dropout that goes on from another and has such a reference; `split`, weights held as halves; `dpo` that saves in the
  background; and `best`, which stops when it gets no better and whose trained model is the best evaluated step. At
  every fourth operation, since they save as others do: `dpo`; `nf4`, an adapter beside a base of 4 bits; and `best`
  that saves in the background. Where two processes train, the other one is killed, as a launcher does, and every eighth
  operation is tried. Of one process, every twelfth is followed by two more crashes while resuming. Where two processes
  each have a part of all weights (`training.sharding: full`), one or the other is ended at every second of its own
  operations; with an adapter, saving in the background, or with `best`, at every eighth. In half of the cases the other
  one is killed, in half it is left to find out and to end by itself.
- **Power cut at a file operation**, every tenth, and every fortieth of kinds that save as others do. What was not
  synced is lost by the rules of POSIX, which promise less than any one file system: bytes are kept when their file was
  synced, names when their folder was. Of the rest nothing remains; or all names, and files are short; or all names, and
  files hold zeros; or a part of it, by chance. With shards, the power of one of two machines that share a disk.
- **SIGKILL at a random moment.** Up to six in a row on one run; of two processes with shards, one or the other.
- **SIGINT, SIGTERM, SIGUSR1, SIGHUP** while the run loads, scores the reference, takes a step or evaluates, and at
  every eighth file operation (SIGHUP not there). A second SIGINT during a save stops it at once.
- **Disk.** Full (a small tmpfs, a limit on the size of files), read-only, slow, failing to flush, refusing each kind of
  file with each error; a folder removed under the run.
- **Exports** as a model, an adapter, a merged model and a GGUF file: ended at every file operation, by a crash or a
  power cut; killed at random moments; on another disk that is full or fails to flush; with a target that another
  process makes meanwhile. What is exported is whole or absent, the runs keep every byte, and the next export to the
  same place removes what was left.
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
TAIL = "A line holds for program and bench of the commit behind it. With those of {commit}: {rounds}"
NOTHING_LEFT = 5
"""How pytest ends where no test is left."""


def commit() -> str:
    """Return the last commit that changed the program or the bench."""
    command = ["git", "log", "-1", "--format=%h", "--", "dpo_cli", "tests/faults"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_round(number: int, parts: Iterable[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Let pytest run what is left of a round, or do with it what options say."""
    files = [f"tests/faults/test_{part}.py" for part in parts]
    command = [sys.executable, "-m", "pytest", "--faults-journal", str(JOURNAL), *options, *files]
    captured = subprocess.PIPE if "--collect-only" in options else None
    env = {**os.environ, ROUND: str(number)}
    return subprocess.run(command, cwd=ROOT, env=env, stdout=captured, text=True, check=False)


def tests_left(number: int) -> dict[str, int]:
    """Return how many tests of a round are left, by part."""
    listed = test_round(number, PARTS, "--collect-only").stdout
    left = {part: listed.count(f"tests/faults/test_{part}.py::") for part in PARTS}
    return {part: count for part, count in left.items() if count}


def said_of(left: Mapping[int, Mapping[str, int]]) -> str:
    """Say which of the rounds that were begun are whole, and which tests of the others were not run, or failed."""
    whole = ", ".join(str(number) for number, parts in left.items() if not parts) or "none"
    said = [f"rounds tried whole: {whole} of {ROUNDS}."]
    for number, parts in left.items():
        tests = ", ".join(f"{count} of `test_{part}.py`" for part, count in parts.items())
        said += [f"Of round {number} these tests were not run, or failed: {tests}."] if parts else []
    return " ".join(said)


def with_commits(found: str, commit: str, page: str) -> str:
    """Add to a table the commit that each line holds for, and the lines of a page of kinds that are not in it."""
    head, rule, *rows, _ = found.splitlines()
    older = [row for row in page.splitlines() if row.startswith("| ") and not row.startswith(("| kind", "| **"))]
    lines = {row.split(" | ")[0]: row for row in [*older, *(f"{row} {commit} |" for row in rows)]}
    cells = [[int(cell.replace(",", "")) for cell in row.split(" | ")[1:6]] for row in lines.values()]
    whole = " | ".join(f"{sum(column):,}" for column in zip(*cells, strict=True))
    return "\n".join(
        [f"{head} commit |", f"{rule}---|", *map(lines.__getitem__, sorted(lines)), f"| **all** | {whole} | |"]
    )


def write_page() -> None:
    """Write the page of what was tried with the code that is there now, and of other kinds what it said before."""
    tried = read_journal(JOURNAL)
    fuzzed = json.loads(FUZZED.read_text(encoding="utf-8")) if FUZZED.exists() else []
    found = table([*(entry for test in tried for entry in test.cases), *fuzzed])
    left, now = {number: tests_left(number) for number in sorted({1, *(test.round for test in tried)})}, commit()
    # Once the first round is whole, what only the page before has is not tried any more.
    older = PAGE.read_text(encoding="utf-8") if left[1] else ""
    tail = textwrap.fill(TAIL.format(rounds=said_of(left), commit=now), 120)
    text = f"{HEAD.replace('{rounds}', str(ROUNDS))}{with_commits(found, now, older)}\n\n{tail}\n"
    PAGE.write_text(text, encoding="utf-8")
    print(found, f"\n{sum(test.cpu_seconds for test in tried):.0f} seconds of the processors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left, write the page, and return the status of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--round", type=int, choices=range(1, ROUNDS + 1), help="this round, not the next one")
    parser.add_argument("--all", action="store_true", help="all rounds that are left, not the next one alone")
    parser.add_argument("--page", action="store_true", help="run nothing")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    status = 0
    for number in [] if asked.page else [asked.round] if asked.round else range(1, ROUNDS + 1):
        print(f"round {number} of {ROUNDS} …", flush=True)
        ended = test_round(number, asked.parts or PARTS, "--numprocesses", "auto", "--dist", "worksteal").returncode
        if ended == NOTHING_LEFT:
            continue
        status = max(status, ended)
        if ended not in (0, 1) or not asked.all:
            break
    write_page()
    return status


if __name__ == "__main__":
    sys.exit(main())
