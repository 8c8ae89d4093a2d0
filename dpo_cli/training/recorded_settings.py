"""The settings that a run was started with, as its config.yaml has them, and how others differ from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.errors import UserError
from dpo_cli.settings import is_within
from dpo_cli.system import plain_yaml
from dpo_cli.system.plain_yaml import NotPlain
from dpo_cli.system.storage import text_digest

RESOLVED = "# The configuration as resolved: `dpo train --config` runs it again.\n"
"""The first line of a run's config.yaml, by which it is told from a configuration of the user's own."""

_PUT_BACK = "put the file back from a copy; the models in `final/` and `checkpoints/` can be used without it"

LENGTH = ("training.epochs", "training.max_steps")
"""How many steps a run has."""


@dataclass(frozen=True)
class RecordedSettings:
    """The settings that a run was last started with, if there is one.

    Args:
        file: config.yaml in the folder of a run.
    """

    file: Path

    def exist(self) -> bool:
        """Tell whether config.yaml is one that a run wrote, not the user's own of the same name."""
        try:
            with self.file.open("rb") as file:
                return file.readline() == RESOLVED.encode()
        except (FileNotFoundError, IsADirectoryError):
            return False

    def damage(self) -> UserError:
        """Say of a run that its settings are missing, or not as a run writes them."""
        what = "are damaged: the first line is not that of a run" if self.file.exists() else "are missing"
        return UserError(f"the settings of the run {what}", str(self.file), _PUT_BACK)

    def count(self, name: str) -> int | None:
        """Return what a setting, by its dotted name, was when the run was started: a whole number above 0.

        None where there is no run, or where somebody has written something else into its file.
        """
        found = dict(_leaves(self._read())).get(name) if self.exist() else None
        return found if type(found) is int and found > 0 else None

    def length(self) -> tuple[float, int | None] | None:
        """Return `training.epochs` and `training.max_steps` of the run as it was last started; None: there is no run.

        Raises:
            UserError: They are not what a run writes.
        """
        if not self.exist():
            return None
        found = dict(_leaves(self._read()))
        epochs, max_steps = found.get(LENGTH[0]), found.get(LENGTH[1])
        if isinstance(epochs, (int, float)) and epochs > 0 and (max_steps is None or isinstance(max_steps, int)):
            return epochs, max_steps
        raise self._unreadable(f"`{LENGTH[0]}` is {epochs} and `{LENGTH[1]}` is {max_steps}")

    def check_unchanged(
        self,
        settings: dict[str, Any],
        changeable: Collection[str],
        reason: Callable[[Mapping[str, str]], UserError | None] = lambda changes: None,
    ) -> None:
        """Compare a run's settings with those it was started with, before it is resumed.

        Args:
            settings: Those of now.
            changeable: The names of settings, or of groups of them, that may differ.
            reason: Returns what is to be said in place of the changes, given these in words by name; or None.

        Raises:
            UserError: Settings differ that would make it another run.
        """
        if changed := self.changes(settings, changeable):
            hint = "restore them, or start a new run in another `output_dir`"
            what = f"a run cannot be resumed with other settings: {'; '.join(changed.values())}"
            raise reason(changed) or UserError(what, str(self.file), hint)

    def changes(self, settings: dict[str, Any], changeable: Collection[str]) -> dict[str, str]:
        """Return by name which settings are not those that the run was started with, and what they were and are.

        Raises:
            UserError: Those that it was started with cannot be read.
        """
        return differing(self._read(), settings, changeable) if self.file.is_file() else {}

    def _read(self) -> dict[str, Any]:
        """Return the settings that the run was started with.

        Raises:
            UserError: They are not what a run writes.
        """
        reason = "they are not settings"
        try:
            started, _ = plain_yaml.parse(plain_yaml.read(self.file))
            if isinstance(started, dict):
                return started
        except (NotPlain, UnicodeDecodeError) as error:
            reason = str(error)
        raise self._unreadable(reason)

    def _unreadable(self, reason: str) -> UserError:
        what = f"the settings that the run was started with cannot be read: {reason}"
        return UserError(what, str(self.file), f"{_PUT_BACK}, or start again with `--overwrite`")


def settings_digest(settings: dict[str, Any], changeable: Collection[str]) -> str:
    """Return a digest of the settings that decide what a step of a run computes; for the rest see `check_unchanged`."""
    return text_digest(json.dumps(_deciding(settings, changeable), sort_keys=True))


def differing(before: dict[str, Any], now: dict[str, Any], changeable: Collection[str]) -> dict[str, str]:
    """Return by name which settings are not what they were, and what they were and are.

    Args:
        before: The settings as they were.
        now: The settings as they are.
        changeable: The names of settings, or of groups of them, that may differ.
    """
    before, now = _deciding(before, changeable), _deciding(now, changeable)
    named = before.keys() | now.keys()
    # A group that was null, or has become it, is named as a whole.
    return {
        name: f"`{name}` was {_shown(was)} and is {_shown(asked)}"
        for name in sorted(name for name in named if name.rpartition(".")[0] not in named)
        if (was := _value(before, name)) != (asked := _value(now, name))
    }


def _deciding(settings: dict[str, Any], changeable: Collection[str]) -> dict[str, Any]:
    """Return the settings that may not change, by their dotted names."""
    return {name: value for name, value in _leaves(settings) if not is_within(name, changeable)}


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(settings: dict[str, Any], name: str) -> Any:
    """Return a setting, or the type of a group."""
    return settings.get(name, settings.get(f"{name}.type"))


def _shown(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
