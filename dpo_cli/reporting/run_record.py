"""What a run has written so far, read without disturbing it: settings, rows, answers, held-out pairs, environment.

A run may be at work: its last line may be half written, and files may be missing. A line that cannot be read is
counted, and the rest is used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.data.records import LABELS
from dpo_cli.evaluation.best import BEST_BY, best_step
from dpo_cli.evaluation.findings.facts import RunFacts
from dpo_cli.evaluation.findings.history import Row, number
from dpo_cli.system import plain_yaml
from dpo_cli.system.plain_yaml import NotPlain
from dpo_cli.training.run_folder import DATA_CHECK, RunFolder, RunState, checkpoints_in, step_of

DATA_CHECK_FILE = "report.json"
"""What `dpo prepare-data` calls the file of its findings."""

_MOST_STEPS, _LARGEST = 1 << 53, 1e300
"""No run has as many, and no value is as large: a sum of such would not be finite."""

_MOST_PAIRS_BYTES = 1 << 26
"""Up to this size all held-out pairs are read, of all evaluations."""

_LONGEST_LINE = 1 << 24
"""A longer line is none that a run writes."""


_SHARES = "rewards/accuracies", "logps/accuracies", "logps/accuracies_mean"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its folder has it.

    Attributes:
        folder: Its files.
        settings: Its configuration as resolved; empty where it cannot be read.
        environment: Versions, device, command line; empty where it cannot be read.
        steps: Its rows of training steps, in their order.
        evaluations: Its rows of evaluations, in their order.
        samples: Its answers to held-out prompts.
        pairs: Held-out pairs, once for each evaluation; of very many only of the evaluations that a page shows.
        data_check: What `dpo prepare-data` found in the data, where it was asked and its report is still there.
        checkpoints: The steps of the checkpoints that are in the folder.
        facts: What the diagnosis knows of it beside its rows, where that is written down.
        finished: Whether it has taken all of its steps and saved the model.
        unreadable: How many lines of each file could not be read.
        damaged: Which other files could not be read, and why.
    """

    folder: RunFolder
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    samples: Sequence[Row] = ()
    pairs: Sequence[Row] = ()
    data_check: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Sequence[int] = ()
    facts: RunFacts | None = None
    finished: bool = False
    unreadable: Mapping[str, int] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.path.absolute().name

    @property
    def last_step(self) -> int:
        """The step that was taken last; 0: none was."""
        return max((row["step"] for rows in (self.steps, self.evaluations) for row in rows[-1:]), default=0)

    def pairs_at(self, step: int) -> list[Row]:
        """Return the held-out pairs as an evaluation found them."""
        return [row for row in self.pairs if row["step"] == step]


def read_run(folder: RunFolder) -> RunRecord:
    """Read all that a run has written so far.

    Raises:
        OSError: A file cannot be read.
    """
    unreadable: dict[str, int] = {}
    damaged: dict[str, str] = {}
    rows = list(_rows(folder.metrics, unreadable, is_metrics))
    environment, facts = _json(folder.environment, damaged), RunFacts.read(folder.facts)
    if facts is None and folder.facts.exists():
        damaged[folder.facts.name] = "it is not what this version of the program writes"
    evaluations = _once(row for row in rows if row.get("split") == "eval")
    return RunRecord(
        folder=folder,
        settings=_settings(folder.config, damaged),
        environment=environment,
        steps=_once(row for row in rows if row.get("split") == "train"),
        evaluations=evaluations,
        samples=sorted(_rows(folder.samples, unreadable, is_answer), key=_step),
        pairs=sorted(_rows(folder.held_out, unreadable, is_pair, _kept_lines(folder.held_out, evaluations)), key=_step),
        data_check=_data_check(environment.get(DATA_CHECK)),
        checkpoints=[step_of(path) for path in checkpoints_in(folder.checkpoints)],
        facts=facts,
        finished=folder.state() is RunState.FINISHED,
        unreadable=unreadable,
        damaged=damaged,
    )


def _kept_lines(path: Path, evaluations: Sequence[Row]) -> tuple[bytes, ...]:
    """Return how the lines of a large file of held-out pairs begin that are read; none: all of them are.

    They are those before step 1, of the last evaluation, and of each that may be the best.
    """
    if not evaluations or not path.exists() or path.stat().st_size <= _MOST_PAIRS_BYTES:
        return ()
    best = {best_step(evaluations, by) for by in BEST_BY}
    return tuple(f'{{"step": {step},'.encode() for step in best | {0, evaluations[-1]["step"]})


def _rows(
    path: Path, unreadable: dict[str, int], is_one: Callable[[Row], bool], beginnings: tuple[bytes, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines; count those that cannot be read, but for one that is being written.

    Args:
        path: The file.
        unreadable: Takes the count, by the name of the file.
        is_one: Whether what is read as a row has the types of one.
        beginnings: With which the lines begin that are read; none: all are.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                # The end of the file: its last line is being written, or a crash cut it off.
                return
            if beginnings and not line.startswith(beginnings):
                continue
            row = row_in(line, is_one)
            if row is None:
                unreadable[path.name] = unreadable.get(path.name, 0) + 1
            else:
                yield row


def answers_in(folder: RunFolder) -> list[Row]:
    """Return the answers to held-out prompts of a run, in their order; what is not one is left out."""
    return list(_rows(folder.samples, {}, is_answer))


def row_in(line: bytes, is_one: Callable[[Row], bool]) -> dict[str, Any] | None:
    """Read a line; None where it is no row of its file.

    Args:
        line: The line.
        is_one: Whether what is read as a row has the types of one.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    if type(step) is not int or not 0 <= step < _MOST_STEPS:
        return None
    too_large = any(isinstance(value, (int, float)) and abs(value) > _LARGEST for value in row.values())
    return None if too_large or not is_one(row) else row


def is_metrics(row: Row) -> bool:
    """Tell whether what was read is a row of metrics.jsonl."""
    bounds = row.get("accuracy_interval", [0, 1])
    bounded = isinstance(bounds, list) and len(bounds) == 2 and None not in [_number(bound) for bound in bounds]
    return bounded and _has_shares(row)


def is_answer(row: Row) -> bool:
    """Tell whether what was read is one of samples.jsonl."""
    texts = all(isinstance(row.get(name), str) for name in ("where", "prompt", "answer", "chosen"))
    tokens, chosen = _number(row.get("tokens")), _number(row.get("chosen_tokens"))
    counted = tokens is not None and tokens >= 0 and chosen is not None and chosen > 0
    return texts and counted and isinstance(row.get("ended"), bool)


def is_pair(row: Row) -> bool:
    """Tell whether what was read is one of held_out.jsonl."""
    labelled = all(isinstance(row.get(name), str | None) for name in LABELS)
    return labelled and type(row.get("pair")) is int and isinstance(row.get("where"), str) and _has_shares(row)


def _has_shares(row: Row) -> bool:
    """Tell whether all accuracies of a row are between 0 and 1, as far as it has any."""
    known = [value for name in _SHARES if (value := number(row, name)) is not None]
    return all(0 <= value <= 1 for value in known)


def _number(value: Any) -> float | None:
    return number({"": value}, "") if not isinstance(value, bool) else None


def _step(row: Row) -> int:
    step: int = row["step"]
    return step


def _once(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in the order of their steps, the last of each."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _settings(path: Path, damaged: dict[str, str]) -> Mapping[str, Any]:
    """Read settings; note why they cannot be read."""
    try:
        found, _ = plain_yaml.parse(plain_yaml.read(path))
    except FileNotFoundError:
        return {}
    except NotPlain as error:
        damaged[path.name] = f"line {error.line}: {error.what}"
        return {}
    except UnicodeDecodeError:
        damaged[path.name] = "it is not UTF-8"
        return {}
    if not isinstance(found, dict):
        damaged[path.name] = "there are no settings in it"
    return found if isinstance(found, dict) else {}


def _data_check(folder: Any) -> Mapping[str, Any]:
    if not isinstance(folder, str):
        return {}
    # It is beside the prepared pairs, which may be gone, or another user's.
    with contextlib.suppress(OSError, ValueError):
        return _json(Path(folder) / DATA_CHECK_FILE, {})
    return {}


def _json(path: Path, damaged: dict[str, str]) -> Mapping[str, Any]:
    """Read a JSON object; note that it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        damaged[path.name] = "it is not a JSON object"
    return found if isinstance(found, dict) else {}
