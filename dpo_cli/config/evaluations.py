"""What does not go together of the settings about evaluations: held-out pairs, when they are scored, the best."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_cli.config.schema import Config
from dpo_cli.config.tree import Tree
from dpo_cli.errors import UserError

_OF_EVALUATIONS = (("evaluation", "every_steps"), ("evaluation", "best_by"), ("evaluation", "patience"))
"""Settings that are about evaluations alone."""


def unfounded(tree: Tree) -> list[UserError]:
    """Find settings that were made and have no effect without held-out pairs."""
    data = tree.values.get("data")
    if not isinstance(data, dict) or data.get("eval", 0.1) is not None:
        return []
    problems = []
    for group, name in _OF_EVALUATIONS:
        settings = tree.values.get(group)
        if isinstance(settings, dict) and settings.get(name) is not None:
            what = f"`{group}.{name}` has no effect, since `data.eval` is null"
            hint = f"set `data.eval` to held-out pairs, or leave `{group}.{name}` out"
            problems.append(UserError(what, tree.place((group, name)), hint))
    return problems


def of_the_best(config: Config, tree: Tree) -> Iterator[UserError]:
    """Find what asks for the best of several evaluations without a figure to compare, or with one evaluation alone."""
    evaluation, keep = config.evaluation, config.checkpoints.keep_best
    by, patience = ("evaluation", "best_by"), ("evaluation", "patience")
    if keep and evaluation.best_by is None:
        what = f"`checkpoints.keep_best: {keep}` keeps the best checkpoints, but no `evaluation.best_by` says of what"
        hint = "set `evaluation.best_by: loss`, or leave `checkpoints.keep_best` out"
        yield UserError(what, tree.place(("checkpoints", "keep_best")), hint)
    if evaluation.patience and evaluation.best_by is None:
        what = "`evaluation.patience` waits for a better evaluation, but no `evaluation.best_by` says by which figure"
        hint = "set `evaluation.best_by: loss`, or leave `evaluation.patience` out"
        yield UserError(what, tree.place(patience), hint)
    asked = [path for path, value in ((by, evaluation.best_by), (patience, evaluation.patience)) if value is not None]
    if asked and evaluation.every_steps is None and config.data.eval is not None:
        names = " and ".join(f"`{'.'.join(path)}`" for path in asked)
        what = f"{names} {'need' if len(asked) > 1 else 'needs'} several evaluations, but the only one is at the end"
        hint = f"set `evaluation.every_steps`, or leave {names} out"
        yield UserError(what, tree.place(*asked), hint)
