"""Read a configuration and its overrides; find everything that is wrong in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from dpo_cli.config.explain import contradictions, explain, unfounded
from dpo_cli.config.schema import Config, without_needless_reference
from dpo_cli.config.tree import override, read_tree
from dpo_cli.errors import raise_all
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
    problems += unfounded(tree)
    try:
        config = Config.model_validate({"output_dir": f"runs/{escape_path(file.stem)}", **tree.values})
    except ValidationError as error:
        raise_all([*problems, *explain(error, tree)])
        raise
    raise_all([*problems, *contradictions(config, tree)])
    return without_needless_reference(config)
