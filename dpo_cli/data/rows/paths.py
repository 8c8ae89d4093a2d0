"""Which files a path names: one file, those that a glob matches, those of a folder; or none, for a Hub id."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from pathlib import Path

from dpo_cli.data.rows.fields import listed, printable
from dpo_cli.data.rows.files import ENDINGS, reader_for, reader_of
from dpo_cli.errors import UserError
from dpo_cli.settings import located, nearest_file
from dpo_cli.system.hub import is_path, name_hint
from dpo_cli.system.storage import MANIFEST

SPLITS = "dataset_dict.json"
"""The file in which `datasets` lists the splits of a folder."""

_STATE = "state.json"
"""The file in which `datasets` lists the data files of a folder."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_WHAT_TO_NAME = "name a data file, a glob, a folder or a Hub id"

_COMPANY_NAMES = {
    "changelog", "citation", "dataset_dict", "dataset_info", "dataset_infos", "license", "makefile", "notice",
    "readme", "requirements", "state",
}  # fmt: skip
_COMPANY_ENDINGS = {
    ".bib", ".cff", ".gif", ".html", ".ipynb", ".jpeg", ".jpg", ".md", ".pdf", ".png", ".py", ".rst", ".sh", ".svg",
    ".toml", ".yaml", ".yml",
}  # fmt: skip
"""What lies beside data files and is known to be none."""

_TRAINING = re.compile(r"(?<![a-z])train(?![a-z])")
_HELD_OUT = re.compile(r"(?<![a-z])(test|val|valid|validation|dev|eval)(?![a-z])")


def files_at(name: str, split: str) -> list[Path] | None:
    """Return the data files that a path names, in the order in which they are read; None for a Hub id.

    Args:
        name: A file, a glob, a folder (of a prepared one: no files) or a Hub id.
        split: Which part of a folder that `datasets` wrote in parts.

    Raises:
        UserError: There are none, or one of them is no data file.
    """
    path = Path(name)
    if not name.strip():
        raise UserError("the name of a source is empty", None, _WHAT_TO_NAME)
    if path.is_file():
        return [_readable(path)]
    if path.is_dir():
        return _files_of_folder(path, split)
    if glob.has_magic(name):
        return _files_of_glob(name)
    # What ends like a data file is a path that was mistyped, though a Hub id may look the same.
    if _HUB_ID.fullmatch(name) and not is_path(name) and not reader_of(path):
        return None
    raise UserError(f"there is no file or folder {located(name)}", None, name_hint(name, _nearest(path)))


def _files_of_glob(pattern: str) -> list[Path]:
    # That of pathlib has no `**` that matches files, and takes hidden ones.
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207
    found = sorted(path for path in map(Path, matches) if path.is_file())
    if files := [_readable(path) for path in found if not _is_company(path)]:
        return files
    raise UserError(f"no data file matches {located(pattern)}", None, _nearest(Path(pattern)))


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """Return what `datasets` lists of a folder that it wrote, and all data files of any other."""
    if (folder / MANIFEST).is_file():
        return []
    if (folder / SPLITS).is_file():
        splits = _listed(folder / SPLITS, "splits")
        if split not in splits:
            raise UserError(f"`{folder}` has no split `{split}`", None, f"set `split` to one of {listed(splits)}")
        folder /= split
    if (folder / _STATE).is_file():
        return [_readable(_inside(folder, name)) for name in _listed(folder / _STATE, "_data_files")]
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    files = [_readable(path) for path in inside if not _is_company(path)]
    if not files:
        what = f"the folder `{folder}` cannot be loaded: there is no data file in it"
        raise UserError(what, None, f"name a folder with data files, which end in {ENDINGS}")
    if _hold_both_sides(path.relative_to(folder) for path in files):
        hint = f"select those to train on with a glob, such as `{folder}/**/*train*`"
        raise UserError(f"the folder `{folder}` has training data and held-out data", None, hint)
    return files


def _hold_both_sides(files: Iterable[Path]) -> bool:
    """Tell whether some files are, by their names, to train on, and others to evaluate with."""
    sides = [(bool(_TRAINING.search(name)), bool(_HELD_OUT.search(name))) for name in (str(f).lower() for f in files)]
    return (True, False) in sides and (False, True) in sides


def _listed(file: Path, key: str) -> list[str]:
    """Return the names that a file of `datasets` lists."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))[key]
        return [str(entry["filename"]) if isinstance(entry, dict) else str(entry) for entry in listed]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"`{file}` is not a file that `datasets` writes", None, "save the dataset again") from None


def _inside(folder: Path, name: str) -> Path:
    """Return a file that a folder lists, which must be one of its own."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        what = f"`{folder}` lists a file outside of it: `{printable(name)}`"
        raise UserError(what, None, "name that file itself, or save the dataset again")
    return folder / name


def _readable(path: Path) -> Path:
    """Return a file that there is, that is of a known kind, and whose name can be shown in messages."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of `{printable(path, 1000)}` is not UTF-8", None, "rename it") from None
    if not path.is_file():
        what = f"`{printable(path, 1000)}` is missing, although its folder lists it"
        raise UserError(what, None, "save or download the dataset again")
    if reader_for(path):
        return path
    what = f"`{path}` is not a data file of a known type"
    raise UserError(what, None, f"name a file that ends in one of {ENDINGS}")


def _is_company(path: Path) -> bool:
    name = path.name.lower()
    return name.partition(".")[0] in _COMPANY_NAMES or path.suffix.lower() in _COMPANY_ENDINGS


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _nearest(path: Path) -> str:
    """Suggest a file of a near name."""
    near = nearest_file(path)
    return f"did you mean `{near}`?" if near else _WHAT_TO_NAME
