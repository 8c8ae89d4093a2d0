"""What `dpo sample` is asked for, as far as it can be checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo_cli.config.inputs import check_inputs, check_scored
from dpo_cli.config.launched import launch_errors
from dpo_cli.config.outputs import json_file_errors, page_errors
from dpo_cli.config.schema import Config
from dpo_cli.data.pairs.prompts import check_prompts
from dpo_cli.errors import UserError, raise_all


def check_sampling(
    config: Config,
    models: Sequence[str],
    prompts: str | None,
    *,
    counts: Mapping[str, int | None],
    json_file: Path | None,
    page: Path | None,
) -> None:
    """Check what is read, the models that answer, the numbers, and the files that are written.

    Args:
        config: The run's configuration.
        models: What `--model` names; none: the model before training and what the run has trained.
        prompts: The file of prompts; None: the held-out pairs' are taken.
        counts: Numbers that are at least 1, by option.
        json_file: Where answers are written as JSON lines; `-`: to standard output.
        page: Where they are written as a page.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    problems = [*check_inputs(config, needs_train=prompts is None), *check_scored(config, models)]
    problems += _no_prompts(config, prompts)
    problems += [
        UserError(f"{count} is too few", f"{option} {count}", "give a number of at least 1")
        for option, count in counts.items()
        if count is not None and count < 1
    ]
    problems += [*json_file_errors(json_file), *page_errors(page, "--page")]
    raise_all([*problems, *launch_errors(config)])


def _no_prompts(config: Config, prompts: str | None) -> Iterator[UserError]:
    """Say why there are no prompts, if so."""
    if prompts is not None:
        if problem := check_prompts(prompts, "--prompts"):
            yield problem
    elif config.data.eval is None:
        hint = "set `data.eval`, or name a file of prompts with --prompts"
        yield UserError("the configuration has no held-out pairs", "`data.eval`", hint)
