"""What `dpo export --push` is given, checked before the Hub is asked: the repository's name, and what goes with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.errors import UserError, raise_all
from dpo_cli.modeling.adapters.files import base_of, holds_adapter
from dpo_cli.system.hub import is_path
from dpo_cli.system.storage import MANIFEST, DamagedFolder, read_manifest

EXPORT = "export"
"""What the manifest of a folder says of how it was exported and proved."""

_WHERE = "the command line"
_LONGEST = 96
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Publishing:
    """Where a folder is published.

    Attributes:
        repo: The repository on the Hub, as `ORG/NAME`.
        public: Whether everybody may see it, if it is a new one.
        dry_run: Whether what would be sent is listed and nothing is sent.
    """

    repo: str
    public: bool = False
    dry_run: bool = False


def repo_problem(repo: str) -> UserError | None:
    """Say why no repository of the Hub can have a name, without asking there."""
    where, owner, slash, name = f"--push {repo}", *repo.partition("/")
    if not slash or not name:
        return UserError(
            f"`{repo}` names no owner", where, "write `ORG/NAME`: your name on the Hub, or an organization"
        )
    if "/" in name:
        hint = "write `ORG/NAME`; models alone are published, so no type of a repository belongs to it"
        return UserError(f"`{repo}` has more than an owner and a name", where, hint)
    for part in (owner, name):
        if not _NAME.fullmatch(part) or "--" in part or ".." in part or part.endswith(".git") or len(part) > _LONGEST:
            hint = (
                f"use at most {_LONGEST} of a-z, A-Z, 0-9, `-`, `_` and `.`; `-` and `.` neither first, last nor twice"
            )
            return UserError(f"no repository on the Hub can be called `{repo}`: `{part}` is not a name", where, hint)
    return None


def as_publishing(push: str | None, *, public: bool, dry_run: bool) -> Publishing | None:
    """Return what the options say of publishing; None: nothing is published.

    Raises:
        UserError: An option has no effect without the repository's name.
    """
    if push is not None:
        return Publishing(push, public, dry_run)
    given = {"--public": public, "--dry-run": dry_run}
    what = "`{}` is about publishing, and no repository is named"
    raise_all(
        UserError(what.format(option), _WHERE, "add `--push ORG/NAME`, or leave it out")
        for option in given
        if given[option]
    )
    return None


def publishing_errors(asked: Publishing, to: Path, base: str | None) -> Iterator[UserError]:
    """Yield what is wrong with publishing what is still to be exported, without asking the Hub.

    Args:
        asked: Where it is published.
        to: The folder that it is exported to.
        base: The base of an adapter that is published by itself, or None.
    """
    if problem := repo_problem(asked.repo):
        yield problem
    if asked.dry_run:
        hint = f"export without `--push`; then `dpo export {to} --push {asked.repo} --dry-run` lists its files"
        yield UserError("a dry run lists the files of an export, which are not there yet", "--dry-run", hint)
    if base is not None and (problem := _base_problem(base)):
        yield problem


def check_exported(folder: Path, asked: Publishing, without_effect: Iterable[str]) -> None:
    """Check what is known of publishing a folder that was exported before, without asking the Hub.

    Args:
        folder: The folder.
        asked: Where it is published.
        without_effect: What is given and concerns the export.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    problems = [repo_problem(asked.repo)]
    for one in without_effect:
        what = f"`{one}` has no effect on a folder that is published as it is"
        problems.append(UserError(what, _WHERE, "add `--to DIR` to export anew, or leave it out"))
    wrong = _export_problem(folder, asked)
    if not wrong and holds_adapter(folder):
        wrong = _base_problem(base_of(folder, str(folder)))
    raise_all(problem for problem in (*problems, wrong) if problem)


def _export_problem(folder: Path, asked: Publishing) -> UserError | None:
    """Say why a folder is none that `dpo export` has written and proved."""
    if not folder.is_dir():
        what = f"there is no folder `{folder}`" if not folder.exists() else f"`{folder}` is a file, not a folder"
        return UserError(what, _WHERE, "name a folder that `dpo export` has written")
    try:
        proved = EXPORT in read_manifest(folder)
    except DamagedFolder as damage:
        if (folder / MANIFEST).exists():
            return UserError(f"`{folder}` is damaged: {damage}", str(folder), "export it again")
        proved = False
    if proved:
        return None
    hint = f"export it first, as in `dpo export {folder} --to models/my --push {asked.repo}`"
    return UserError(f"`{folder}` was not written by `dpo export`, which proves a model", _WHERE, hint)


def _base_problem(base: str) -> UserError | None:
    """Say why nobody else could load the base that an adapter names."""
    if not is_path(base) and not Path(base).exists():
        return None
    what = f"the adapter's base is `{base}`, which nobody else has"
    hint = "publish one model of both with `--merge`; or export with the base's name on the Hub: `model.name=ORG/NAME`"
    return UserError(what, "--push", hint)
