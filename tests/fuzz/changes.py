"""What happens to a file that was right: values in it become others, bytes of it become others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

from dpo_cli.system.storage import MANIFEST, sealed_folder

WORDS = (
    *("", " ", "a", "é", "true", "null", "-1", "1e999", "[", "{}", "user", "step", "files", "type", "bytes"),
    *("\0", "a\0b", "\x1b[2J", "\ud800", "\udc80", "\ufeff", "x" * 300),
    *("../x", "/x", "a/../../x", ".", "..", "a.txt/x", "*", "**/*.json", "[a", "~", "a/b", "model.safetensors"),
)
"""Texts that mean something somewhere: as numbers, paths, names, globs, marks."""

SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308])
    | st.integers(-9, 99)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


class Edit(NamedTuple):
    """One value of a tree that becomes another.

    Attributes:
        path: Which: at each level the number of a member, taken modulo how many there are.
        action: `set`, `remove`, `add` or `nest`.
        name: What a member that is added is called.
        value: What is set or added.
    """

    path: Sequence[int]
    action: str
    name: str
    value: Any


class Cut(NamedTuple):
    """Some bytes of a file that become others.

    Attributes:
        place: Where, modulo the length.
        length: How many go.
        data: What comes in their place.
    """

    place: int
    length: int
    data: bytes


@dataclass(frozen=True)
class Change:
    """What happens to a file: first to the values that it holds, then to its bytes."""

    edits: Sequence[Edit] = ()
    cuts: Sequence[Cut] = ()

    def to_json(self, value: Any) -> bytes:
        """Return what becomes of a JSON file."""
        return self.to_text(value, json.dumps)

    def to_text(self, value: Any, write: Callable[[Any], str]) -> bytes:
        """Return what becomes of a file of values, written in some way."""
        for edit in self.edits:
            value = _edited(value, edit, list(edit.path))
        return self.to_bytes(write(value).encode("utf-8", "surrogatepass"))

    def to_bytes(self, data: bytes) -> bytes:
        """Return what becomes of a file of bytes."""
        for cut in self.cuts:
            place = cut.place % (len(data) + 1)
            data = data[:place] + cut.data + data[place + cut.length :]
        return data


EDITS = st.builds(
    Edit,
    st.lists(st.integers(0, 40), max_size=5),
    st.sampled_from(["set", "set", "remove", "add", "nest"]),
    st.sampled_from(WORDS),
    JSON,
)
CUTS = st.builds(
    Cut,
    st.integers(0, 1 << 16),
    st.integers(0, 8) | st.just(1 << 20),
    st.binary(max_size=6) | st.sampled_from([b"[" * 20_000, b"\xff\xfe", b"\0" * 40, b"NaN", b'"\\ud800"']),
)
CHANGES = st.builds(Change, st.lists(EDITS, max_size=3), st.just(())) | st.builds(
    Change, st.just(()), st.lists(CUTS, max_size=3)
)
"""Changes of values, which leave a file readable, or of bytes, which may not."""

CHANGES_OF_BYTES = st.builds(Change, st.just(()), st.lists(CUTS, max_size=4))


def _edited(value: Any, edit: Edit, path: list[int]) -> Any:
    """Return a copy of a value in which one within it is another."""
    places = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not places or not path:
        return {edit.name: value} if edit.action == "nest" else edit.value
    place, copy = places[path[0] % len(places)], value.copy()
    if len(path) > 1 or edit.action in ("set", "nest"):
        copy[place] = _edited(value[place], edit, path[1:])
    elif edit.action == "remove":
        del copy[place]
    elif isinstance(copy, dict):
        copy[edit.name] = edit.value
    else:
        copy.append(edit.value)
    return copy


@dataclass(frozen=True)
class Damage:
    """What happens to a folder that was right.

    Attributes:
        files: Which files change, by their number in the order of their names, modulo how many there are; and how.
        sealed: Whether manifests are made to fit again, as somebody would who means it.
    """

    files: Sequence[tuple[int, Change]]
    sealed: bool

    def to(self, folder: Path) -> None:
        """Change the files of a folder and of all folders in it."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for number, change in self.files:
            path = files[number % len(files)]
            path.write_bytes(_spoiled(path, change))
        if self.sealed:
            for manifest in sorted(folder.rglob(MANIFEST)):
                seal_again(manifest)


DAMAGES = st.builds(Damage, st.lists(st.tuples(st.integers(0, 40), CHANGES), min_size=1, max_size=2), st.booleans())


def _spoiled(path: Path, change: Change) -> bytes:
    """Return what becomes of a file, whatever kind it is of."""
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            return change.to_json(json.loads(data))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            return change.to_text(rows, lambda rows: "".join(json.dumps(row) + "\n" for row in rows))
        if path.suffix == ".yaml":
            first, _, rest = data.partition(b"\n")
            return first + b"\n" + change.to_text(yaml.safe_load(rest), yaml.safe_dump)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        # An earlier change left nothing that could be read.
        pass
    return change.to_bytes(data)


def seal_again(manifest: Path) -> None:
    """Make a manifest fit what stands beside it, if it is one still."""
    try:
        facts = json.loads(manifest.read_bytes())
        del facts["files"]
        json.dumps(facts, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    folder = manifest.parent
    with sealed_folder(folder, facts) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        (temporary / MANIFEST).unlink()
