"""Read a configuration and its overrides; find everything that is wrong in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_cli.config.evaluations import unfounded
from dpo_cli.config.explain import contradictions, explain
from dpo_cli.config.places import Places
from dpo_cli.config.schema import Config, without_needless_reference
from dpo_cli.config.start_adapter import other_than_start, with_settings_of_start
from dpo_cli.config.tree import Tree, override, read_tree
from dpo_cli.errors import UserError, raise_all
from dpo_cli.settings import escape_path


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        file: The YAML file.
        overrides: `KEY=VALUE` each, the key a dotted path, the value YAML.

    Raises:
        UserError: The file cannot be read, or one thing is wrong with it.
        ExceptionGroup: Several things are wrong; every member is a `UserError`.
    """
    tree, problems = read_tree(file)
    problems += [problem for text in overrides if (problem := override(tree, text))]
    tree.values = {"output_dir": f"runs/{escape_path(file.stem)}", **tree.values}
    return _checked(tree, problems)


def as_config(given: str | PathLike[str] | Mapping[str, Any] | Config) -> Config:
    """Read and check a configuration: a YAML file, the settings themselves, or a configuration that was read.

    Raises:
        UserError: The file cannot be read, or one thing is wrong with the settings.
        ExceptionGroup: Several things are wrong; every member is a `UserError`.
    """
    if isinstance(given, Config):
        return _whole(given, Tree())
    if isinstance(given, Mapping):
        return _checked(Tree(_plain(given)), [])
    return load_config(Path(given))


def _plain(value: Any) -> Any:
    """Return settings as a YAML file would have them: paths are text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return escape_path(fspath(value)) if isinstance(value, PathLike) else value


def _checked(tree: Tree, problems: list[UserError]) -> Config:
    """Turn values into a configuration, given what is known to be wrong with them."""
    problems += unfounded(tree)
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        raise_all([*problems, *explain(error, tree)])
        raise
    return _whole(config.made_at(Places(tree.places)), tree, problems)


def _whole(config: Config, tree: Tree, problems: Sequence[UserError] = ()) -> Config:
    """Settle what follows from settings that go together, given what is known to be wrong with them."""
    raise_all([*problems, *contradictions(config, tree), *other_than_start(config, tree)])
    return with_settings_of_start(without_needless_reference(config))
