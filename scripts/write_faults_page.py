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
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.journal import Tried, read_journal
from tests.faults.kinds import PRINTED
from tests.faults.ledger import table
from tests.faults.shares import ROUNDS
from tests.faults.zygote import ROUND

ROOT = Path(__file__).parent.parent
FUZZED = ROOT / ".fuzz" / "journal.jsonl"
JOURNAL = ROOT / ".faults" / "journal.jsonl"
OF_THE_BENCH = {"journal", "power"}
"""What is tested there of the bench itself: nothing is broken."""
PARTS = sorted(
    {file.stem.removeprefix("test_") for file in (ROOT / "tests" / "faults").glob("test_*.py")} - OF_THE_BENCH
)
PAGE = ROOT / "docs" / "faults.md"
JOURNALED = ("--faults-journal", str(JOURNAL))
"""Options with which pytest leaves out what was tried, and takes down what is."""
HEAD = """# Faults

`make faults` breaks runs of tiny models in every way that the project knows of and looks at what became of each.
`make test` tries a few cases of most faults, on a few kinds of run, and `make test-rest` a few with shards; runs as
`nf4`, as `split` and as `best` that saves in the background are broken by `make faults` alone. [Runs](runs.md) says
what is promised.

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
  background; and `best`, which stops when it gets no better and whose trained model is the best evaluated step. Three
  kinds save as others do: `dpo`; `nf4`, an adapter beside a base of 4 bits; and `best` that saves in the background. Of
  one process, they are tried at every fourth of the operations at which the others are, here and below. Where two
  processes train, the other one is killed, as a launcher does, and every eighth operation is tried. Of one process,
  every twelfth (forty-eighth) is followed by two more crashes while resuming. Where two processes each have a part of
  all weights (`training.sharding: full`), one or the other is ended at every second of its own operations; with an
  adapter, saving in the background, or with `best`, at every eighth. In half of the cases the other one is killed, in
  half it is left to find out and to end by itself.
- **Power cut at a file operation**, every tenth (fortieth). What was not synced is lost by the rules of POSIX, which
  promise less than any one file system: bytes are kept when their file was synced, names when their folder was. Of the
  rest nothing remains; or all names, and files are short; or all names, and files hold zeros; or a part of it, by
  chance. With shards, the power of one of two machines that share a disk.
- **SIGKILL at a random moment.** Up to three in a row on one run, or one where it saves as others do; of two processes
  with shards, one or the other.
- **SIGINT, SIGTERM, SIGUSR1, SIGHUP** while the run loads, scores the reference, takes a step or evaluates, and at
  every eighth (thirty-second) file operation (SIGHUP not there). A second SIGINT during a save stops it at once.
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

This list is what the bench tries in all rounds; the table is what was tried so far, each line with program and bench of
the commit behind it. A line may be of several kinds of run, with `; ` between.
"""
NOTHING_LEFT = 5
"""How pytest ends where no test is left."""


def commit() -> str:
    """Return the last commit that changed the program or the bench."""
    command = ["git", "log", "-1", "--format=%h", "--", "dpo_cli", "tests/faults", "tests/fuzz"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_round(number: int, parts: Iterable[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Let pytest run the tests of a round, or do with them what options say."""
    files = [f"tests/faults/test_{part}.py" for part in parts]
    captured = subprocess.PIPE if "--collect-only" in options else None
    env = {**os.environ, ROUND: str(number)}
    command = [sys.executable, "-m", "pytest", *options, *files]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=captured, text=True, check=False)


def is_whole(number: int, tried: Iterable[Tried]) -> bool:
    """Tell whether every test of a round was run, and none failed or was skipped."""
    left = test_round(number, PARTS, *JOURNALED, "--collect-only").returncode != NOTHING_LEFT
    return not left and not any(test.skipped for test in tried if test.round == number)


def said_of(rounds: Mapping[int, bool], tried: Iterable[Tried]) -> str:
    """Say which rounds were tried whole, which were only begun, and what was skipped."""
    whole, begun = ([str(number) for number, holds in rounds.items() if holds is asked] for asked in (True, False))
    said = f"rounds tried whole: {', '.join(whole) or 'none'} of {ROUNDS}; in part: {', '.join(begun) or 'none'}."
    skipped = Counter(test.skipped for test in tried if test.skipped)
    return " ".join([said, *(f"Skipped in {number} tests: {reason}." for reason, number in sorted(skipped.items()))])


def not_tried(lines: Iterable[str]) -> str:
    """List the kinds of fault that the bench knows and no line of a table is of, by what is done."""
    has_line, listed = set[str](), dict[str, list[str]]()
    for line in lines:
        fault, _, runs = line.partition(": ")
        has_line |= {f"{fault}: {run}" for run in runs.split("; ")} if runs else {fault}
    collected = test_round(1, PARTS, "--collect-only", "-p", "tests.faults.kinds")
    collected.check_returncode()
    known = collected.stdout.splitlines()
    for kind in sorted({line.removeprefix(PRINTED) for line in known if line.startswith(PRINTED)} - has_line):
        fault, _, run = kind.partition(": ")
        listed.setdefault(fault, []).append(run)
    items = [f"- {fault}{': ' * any(runs)}{'; '.join(runs)}" for fault, runs in listed.items()] or ["- nothing"]
    return "\n".join(textwrap.fill(item, 120, subsequent_indent="  ", break_on_hyphens=False) for item in items)


def lines_of(table: str) -> dict[str, str]:
    """Return the lines of a table, by the kind of fault."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line[2:].split(" | ")[0]: line for line in lines if not line.startswith(("| kind", "| **"))}


def with_older(found: str, commit: str, page: str) -> str:
    """Add to a table the commit that each line holds for, and the lines of a page that have more to say.

    Those are the lines of kinds that are not in the table, and of more cases than it has by now, if it has no failure.
    """
    head, rule, *_ = found.splitlines()
    lines = {kind: f"{line} {commit} |" for kind, line in lines_of(found).items()}
    for kind, line in lines_of(page).items():
        num_cases, survived = numbers(lines[kind])[:2] if kind in lines else (0, 0)
        if num_cases == survived and numbers(line)[0] > num_cases:
            lines[kind] = line
    whole = " | ".join(f"{sum(column):,}" for column in zip(*map(numbers, lines.values()), strict=True))
    rows = [lines[kind] for kind in sorted(lines)]
    return "\n".join([f"{head} commit |", f"{rule}---|", *rows, f"| **all** | {whole} | |"])


def numbers(line: str) -> list[int]:
    """Return the numbers of a line: cases, and how many of each outcome."""
    return [int(cell.replace(",", "")) for cell in line.split(" | ")[1:6]]


def write_page() -> None:
    """Write the page of what was tried with the code that is there now, and of other kinds what it said before."""
    tried, now = read_journal(JOURNAL), commit()
    found = table(entry for test in [*tried, *read_journal(FUZZED)] for entry in test.cases)
    rounds = {number: is_whole(number, tried) for number in sorted({test.round for test in tried})}
    # Once the first round is whole, what only the page before has is not tried any more.
    rows = with_older(found, now, "" if rounds.get(1) else PAGE.read_text(encoding="utf-8"))
    said = textwrap.fill(f"With those of {now}: {said_of(rounds, tried)} Not tried at all so far:", 120)
    head = HEAD.replace("{rounds}", str(ROUNDS))
    PAGE.write_text(f"{head}{said}\n\n{not_tried(lines_of(rows))}\n\n{rows}\n", encoding="utf-8")
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
        parallel = ("--numprocesses", "auto", "--dist", "worksteal")
        ended = test_round(number, asked.parts or PARTS, *JOURNALED, *parallel).returncode
        if ended == NOTHING_LEFT:
            continue
        status = max(status, ended)
        if ended not in (0, 1) or not asked.all:
            break
    write_page()
    return status


if __name__ == "__main__":
    sys.exit(main())
