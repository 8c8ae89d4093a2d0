"""Whatever reads what others wrote: any input gives a result or a `UserError`, soon, and leaves all else alone.

`make test` tries a few inputs of each target, the same ones every time (`test_fuzz.py`); `make fuzz` searches for
longer, led by what each input reaches (`__main__.py`). What it finds becomes a case of its own (`test_made_up.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import BadRow, Row
from dpo_cli.data.rows.files import READERS
from dpo_cli.errors import UserError, raise_all
from dpo_cli.system.storage import MANIFEST, DamagedFolder, verify
from tests.conftest import ROW_OF, write_rows
from tests.data import data_files
from tests.fuzz import configurations, parts, rows
from tests.fuzz.changes import CHANGES, CHANGES_OF_BYTES, DAMAGES, WORDS, Change, Damage
from tests.fuzz.guard import Forbidden, confined, sparing, within
from tests.fuzz.templates import TEMPLATES

SECONDS = 30
"""How long one input may take on a busy machine."""

MEMORY_BYTES = 2 << 30
"""How much memory one input may ask for."""


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
        inputs: Draws what is to be read.
        read: Lets the program read one of them; it is given an empty folder, in which it stands.
        num_tried: How many inputs `make test` tries.
        parts: Make what it changes or needs, before it is watched.
        reads_elsewhere: Whether files elsewhere may be read.
    """

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    num_tried: int
    parts: tuple[Callable[[], object], ...] = ()
    reads_elsewhere: bool = True


def check(target: Target, value: Any) -> None:
    """Let a target read an input.

    Raises:
        AssertionError: It takes too long, or does what no input may bring about.
        Exception: Anything but a `UserError`, one or many: a defect.
    """
    for make in target.parts:
        make()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            guards = confined(Path(folder), reads_elsewhere=target.reads_elsewhere)
            with guards, sparing(MEMORY_BYTES), within(SECONDS):
                target.read(value, Path(folder))
        except UserError as error:
            _check_shown(error)
        except ExceptionGroup as several:
            for error in several.exceptions:
                _check_shown(error)
        except Forbidden as forbidden:
            raise AssertionError(str(forbidden)) from forbidden


def _check_shown(error: Exception) -> None:
    """Check that an error is the user's and says something."""
    if not isinstance(error, UserError):
        raise error
    assert error.what.strip()
    assert error.status in (1, 2)


# Configurations and what they name


def read_configuration(value: tuple[bytes, list[str]], folder: Path) -> None:
    """A configuration that loads is written out as one that loads as the same; then what it names is looked for."""
    from dpo_cli.config import load_config, resolved_yaml
    from dpo_cli.config.inputs import check_inputs
    from dpo_cli.training.run_folder import RunFolder

    content, overrides = value
    Path("run.yaml").write_bytes(content)
    Path("model").mkdir()
    Path("model/config.json").touch()
    write_rows(Path("pairs.jsonl"), [ROW_OF["text"]])
    config = load_config(Path("run.yaml"), overrides)
    Path("again.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(Path("again.yaml")) == config
    if not _leads_up(content.decode("utf-8", "replace") + " ".join(overrides)):
        unusable = RunFolder(Path(config.output_dir)).check(resume=False, overwrite=False)
        raise_all([*check_inputs(config), *([unusable] if unusable else [])])


def _leads_up(text: str) -> bool:
    """Tell whether a text may name a folder above this one: looking for data files there might take hours."""
    return "/" in text.replace("a/b", "").replace("data/", "") or ".." in text


def read_source(value: tuple[str, str, Damage], folder: Path) -> None:
    """What a source names is found and read, and nothing beside it."""
    from dpo_cli.data.pairs.sources import Source, check_source, paths_of, read_rows, source_digest

    name, split, damage = value
    parts.saved_dataset(Path("saved"))
    damage.to(Path("saved"))
    if _leads_up(name):
        return
    source = Source(path=name, split=split)
    problem, named = check_source(source), paths_of(source)
    assert all(Path(path).resolve().is_relative_to(folder.resolve()) for path in named[1:])
    if problem:
        raise problem
    # What is no path is a dataset of the Hub, which is not here.
    if len(named) > 1:
        source_digest(source)
        list(read_rows(source))


# Data


def read_data_file(value: tuple[str, bytes | Change], folder: Path) -> None:
    """Every row of a file has its place, and values or a problem; an error names the file."""
    ending, content = value
    path = Path(f"rows{ending}")
    path.write_bytes(content if isinstance(content, bytes) else content.to_bytes(_whole_files()[ending]))
    found, error = data_files.rows_until_error(path)
    assert error is None or (error.where or "").startswith(str(path))
    assert all((row.values is None) == bool(row.problem) for row in found)
    assert all(row.origin.startswith(f"{path}:") for row in found)


@functools.cache
def _whole_files() -> dict[str, bytes]:
    """Return the bytes of a good file of every kind."""
    place = parts.home()
    return {kind: data_files.write(place / f"pairs{kind}", data_files.ROWS).read_bytes() for kind in data_files.KINDS}


def read_row(value: tuple[str, dict[str, Any]], folder: Path) -> None:
    """A row becomes pairs of which both responses are the assistant's and differ, or is refused with a reason."""
    from dpo_cli.data.pairs.detection import detect

    shape, change = value
    row = Row("f:1", ROW_OF[shape] | change)
    with contextlib.suppress(UserError):
        detect([row], "f")
    gather = FORMATS[shape].gather
    # Two rows of opposite labels, so that there is something to pair.
    several = [row, Row("f:2", ROW_OF[shape] | change | {"label": False, "completion": "4"})]
    for one in gather(iter(several), folder) if gather else [row]:
        try:
            pairs = read_pairs(FORMATS[shape], one, "all")
        except BadRow as bad:
            assert bad.reason
            assert bad.detail.encode()
            continue
        for pair in pairs:
            assert pair.chosen[0].role == pair.chosen[-1].role == "assistant" != pair.prompt[-1].role
            assert pair.rejected[0].role == pair.rejected[-1].role == "assistant"
            assert pair.chosen != pair.rejected


def read_pairs_file(value: tuple[str, str, list[dict[str, Any]]], folder: Path) -> None:
    """What becomes pairs is prepared, checked and written as a page.

    The rows stand between two good ones, so that what is wrong has something to spoil.
    """
    shape, good, changes = value
    lines = [ROW_OF[good], *({**ROW_OF[good], **change} for change in changes), *changes, ROW_OF[good]]
    _prepare_and_examine(write_rows(Path("rows.jsonl"), lines), shape)


def _prepare_and_examine(source: Path, shape: str) -> None:
    from tests.builders import prepare_pairs

    pairs = prepare_pairs(source, parts.tokenizer(), Path("prepared"), on_bad_row="drop", data_format=shape)
    _examine(pairs)


def _examine(pairs: Any) -> None:
    from rich.console import Console

    from dpo_cli.data.checkup.examine import examine
    from dpo_cli.reporting.data_check import findings, screen
    from dpo_cli.reporting.pages.data import data_page

    statistics = pairs.manifest["statistics"]
    read = {"data.train": statistics}
    report = examine(pairs, *pairs.hold_out(0.5, 0), max_length=1000, read=read, tokenizer=parts.tokenizer())
    assert "<h1" in data_page(report)
    for shown in (screen(report), findings(report)):
        Console(file=io.StringIO(), width=80).print(shown)
    assert json.dumps(report.as_json(), allow_nan=False)


def write_by_template(template: str, folder: Path) -> None:
    """Whatever a chat template is, a pair becomes tokens or is refused with a reason."""
    from dpo_cli.data.records import Message, Pair
    from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized

    question, no = (Message("user", "Add 1 and 2."),), (Message("assistant", "No."),)
    turns = (Message("assistant", "Let me see."), Message("user", "Go on."), Message("assistant", "3"))
    given = [Pair(question, turns[:1], no, "f:1"), Pair(question, turns, no, "f:2", arguments={"tools": [{"a": 1}]})]
    tokenize = PairTokenizer(parts.tokenizer(), template=template, max_length=1000, on_too_long="drop")
    for result in tokenize(given):
        assert isinstance(result, Tokenized) or (result.reason and result.detail)


# Folders that a run believes


def read_manifest_of(content: bytes | Change, folder: Path) -> None:
    """A manifest is that of the files beside it, or says of which it is not; nothing outside the folder is read."""
    held = {"a.txt": b"one", "inner/b.bin": bytes(100)}
    Path("inner").mkdir()
    for name, data in held.items():
        Path(name).write_bytes(data)
    facts = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in held.items()}
    whole = {"step": 3, "files": facts}
    Path(MANIFEST).write_bytes(content if isinstance(content, bytes) else content.to_json(whole))
    try:
        manifest = verify(folder)
    except DamagedFolder as damage:
        assert str(damage)
    else:
        assert set(manifest["files"]) <= {"a.txt", "inner/b.bin", "./a.txt", "a.txt/"}


def read_prepared(damage: Damage, folder: Path) -> None:
    """A prepared folder is opened and checked, or refused."""
    from dpo_cli.data.prepared.folder import Reading, find, open_for
    from dpo_cli.data.tokens.tokenize import PairTokenizer

    shutil.copytree(parts.prepared(), "prepared")
    damage.to(Path("prepared"))
    found, reason = find(Path("prepared"), "0" * 64)
    assert found is None
    assert reason
    tokenize = PairTokenizer(parts.tokenizer(), template=None, max_length=1000, on_too_long="drop")
    pairs = open_for(Path("prepared"), Reading(), tokenize)
    assert all(pair.origin is not None for pair in pairs)
    _examine(pairs)


def read_run_folder(damage: Damage, folder: Path) -> None:
    """What a run left beside its checkpoints is taken up again, or is not a run to go on with."""
    run = folder / "run"
    run.mkdir()
    for path in parts.stopped_run().joinpath("run").iterdir():
        if path.is_file():
            shutil.copy(path, run)
    damage.to(run)
    take_up(folder)


def take_up(folder: Path) -> None:
    """Read what a run left in a folder beside its checkpoints, as it is read before the run goes on."""
    from dpo_cli.config import changeable
    from dpo_cli.evaluation.best import best_steps
    from dpo_cli.reporting.row_log import RowLog
    from dpo_cli.training.run_folder import RunFolder

    run = RunFolder(folder / "run")
    if problem := run.check(resume=True, overwrite=False):
        raise problem
    run.recorded.check_unchanged(parts.run_config(folder).model_dump(mode="json"), changeable())
    run.recorded.count("training.micro_batch_tokens")
    with contextlib.closing(RowLog(run.metrics, 3)) as log:
        log.append({"split": "train", "step": 4, "loss": 0.5})
        best_steps(log.evaluations, "loss")
    found = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert all(row["step"] <= 4 for row in found)


def resume_run(damage: Damage, folder: Path) -> None:
    """A run goes on from what an interrupted one left, its cache included, or says why not."""
    shutil.copytree(parts.stopped_run(), folder, dirs_exist_ok=True)
    damage.to(folder)
    go_on_in(folder)


def go_on_in(folder: Path) -> None:
    """Let the run in a folder go on to its end."""
    with parts.cache_in(folder / "cache"):
        parts.resume(folder)
    assert verify(folder / "run" / "final")


# Models


def load_model(damage: Damage, folder: Path) -> None:
    """A model folder is loaded or refused; nothing in it is executed."""
    from dpo_cli.modeling.folders.loading import empty_policy, load_policy
    from dpo_cli.modeling.folders.model_names import check_model
    from dpo_cli.modeling.folders.tokenizers import load_tokenizer

    shutil.copytree(parts.model(), "model")
    damage.to(Path("model"))
    if problem := check_model("model"):
        raise problem
    for load in (load_tokenizer, empty_policy, load_policy):
        with contextlib.suppress(UserError):
            load("model")


def load_gguf(content: bytes | Change, folder: Path) -> None:
    """A GGUF file is converted or refused."""
    from dpo_cli.modeling.folders.loading import load_policy

    Path("m.gguf").write_bytes(content if isinstance(content, bytes) else content.to_bytes(parts.gguf()))
    with parts.cache_in(folder / "cache"):
        load_policy("m.gguf")


_BYTES = st.binary(max_size=200)

TARGETS = {
    "configurations": Target(configurations.FILES_AND_OVERRIDES, read_configuration, 150, (parts.rooms,)),
    "sources": Target(
        st.tuples(configurations.NAMES, st.sampled_from(WORDS), DAMAGES),
        read_source,
        100,
        (parts.rooms,),
        reads_elsewhere=False,
    ),
    "data files": Target(
        st.tuples(st.sampled_from(sorted(READERS)), _BYTES | CHANGES_OF_BYTES), read_data_file, 500, (_whole_files,)
    ),
    "rows": Target(st.tuples(rows.SHAPES, rows.PARTS), read_row, 300, (parts.rooms,)),
    "files of pairs": Target(
        st.tuples(st.just("auto") | rows.SHAPES, rows.SHAPES, st.lists(rows.PARTS, max_size=4)),
        read_pairs_file,
        60,
        (parts.rooms, parts.tokenizer),
    ),
    "chat templates": Target(TEMPLATES, write_by_template, 150, (parts.rooms, parts.tokenizer)),
    "manifests": Target(_BYTES | CHANGES, read_manifest_of, 400, reads_elsewhere=False),
    "prepared folders": Target(DAMAGES, read_prepared, 50, (parts.prepared,)),
    "run folders": Target(DAMAGES, read_run_folder, 80, (parts.stopped_run,)),
    "runs to be resumed": Target(DAMAGES, resume_run, 6, (parts.stopped_run,)),
    "model folders": Target(DAMAGES, load_model, 20, (parts.rooms, parts.model)),
    "GGUF files": Target(
        _BYTES.map(lambda data: b"GGUF" + data) | CHANGES_OF_BYTES, load_gguf, 25, (parts.rooms, parts.gguf)
    ),
}
"""All targets, by the names that the table of faults has for them."""
