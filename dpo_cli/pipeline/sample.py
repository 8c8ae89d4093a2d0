"""`dpo sample`: several models answer the same prompts greedily, one model after the other."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config import Config
from dpo_cli.data.pairs.prompts import Prompt
from dpo_cli.errors import UserError, raise_all
from dpo_cli.evaluation.samples import Limits, Sampling
from dpo_cli.modeling.adapters.files import holds_adapter
from dpo_cli.modeling.folders.model_names import whole_model
from dpo_cli.modeling.generation import room
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.alike import check_job, check_pairs, named_models
from dpo_cli.pipeline.models import beside, held_of
from dpo_cli.pipeline.out_of_memory import during
from dpo_cli.pipeline.questions import Questions
from dpo_cli.pipeline.session import Session, started
from dpo_cli.reporting.answers import AnswersBeside, Row, with_bare_prompts
from dpo_cli.reporting.console import STANDARD_OUTPUT, Console
from dpo_cli.reporting.json_file import json_lines, write_results
from dpo_cli.reporting.pages.answers import answers_page
from dpo_cli.system.launchers import is_main_process
from dpo_cli.training.run_folder import RunFolder

_BATCH_TOKENS = 8192
"""The most tokens of prompts and answers that are generated at once."""

_FEW = 4
"""How many held-out prompts are asked where a run samples none."""


def sample(
    config: Config,
    console: Console,
    *,
    models: Sequence[str],
    prompts: Sequence[Prompt] | None,
    count: int | None,
    max_new_tokens: int | None,
    json_file: Path | None,
    page: Path | None,
) -> list[dict[str, Any]]:
    """Let models answer prompts, show the answers side by side and return a row for each, by prompt.

    Args:
        config: The run's configuration.
        console: Where the answers go.
        models: Who is asked; none: the model before training and the one that the run has trained.
        prompts: What is asked; None: held-out prompts of the configuration, those that a run samples first.
        count: How many held-out prompts; None: as many as a run samples.
        max_new_tokens: The most tokens of an answer; None: as in a run.
        json_file: Where to write the rows as JSON lines; `-`: standard output, in place of the answers; or None.
        page: Where to write the answers as a page, or None.

    Raises:
        UserError: Something is wrong that the user can fix; an `ExceptionGroup` of such where several things are.
    """
    limits = Limits(max_new_tokens or config.evaluation.max_new_tokens, _BATCH_TOKENS)
    named = {name: (whole_model(name), name if holds_adapter(name) else None) for name in models} or _own(config)
    with started(config, console) as session:
        asked = {"--model": models, "--count": count, "--max-new-tokens": max_new_tokens}
        final = RunFolder(Path(config.output_dir)).final
        own = {**named_models(config), "`output_dir`": None if models else str(final)}
        check_job(session, asked, {**own, **{f"--model {name}": name for name in models}})
        with session.accelerator.main_process_first():
            questions = Questions.of(config, console, limits, prompts, count or config.evaluation.samples or _FEW)
            as_read = questions.as_read()
        answers = _answers(session, named, questions)
    if prompts is not None:
        # There are no responses in the data.
        answers = [[row | {"chosen": None, "chosen_tokens": None} for row in rows] for rows in answers]
    by_prompt = list(zip(*answers, strict=True))
    shown = with_bare_prompts(by_prompt, as_read)
    if json_file == STANDARD_OUTPUT:
        console.result(_lines(by_prompt).rstrip("\n"))
    else:
        _show(shown, console)
    if is_main_process():
        _write(by_prompt, shown, limits, console, json_file, page)
    return [row for rows in by_prompt for row in rows]


def _own(config: Config) -> dict[str, tuple[str, str | None]]:
    """Return the model before training and the trained one: names, whose weights are read, and adapters beside them."""
    begun, final = config.model.name, str(RunFolder(Path(config.output_dir)).final)
    start = config.adapter.start if config.adapter else None
    adapter = start or (begun if holds_adapter(begun) else None)
    return {
        f"{begun} with {start}" if start else begun: (whole_model(begun), adapter),
        final: (whole_model(final), final if holds_adapter(final) else None),
    }


def _answers(
    session: Session, named: Mapping[str, tuple[str, str | None]], questions: Questions
) -> list[list[dict[str, Any]]]:
    """Let each model answer, the rows of one after those of the other; of an adapter's base, one is in memory."""
    answers: list[list[dict[str, Any]]] = []
    base: Policy | None = None
    loaded: tuple[object, ...] = ()
    for name, (whole, adapter) in named.items():
        sampling = questions.for_model(adapter or whole)
        read = hashlib.sha256(repr([one.tokens for one in sampling.samples]).encode()).hexdigest()
        check_pairs(session, read, "the prompts")
        held = session.held if adapter else held_of(session, whole)
        if loaded != (whole, held):
            # The one before is gone before the next is loaded.
            base = None
            with during("while the model was loaded"):
                placement, device = session.placement, session.accelerator.device
                base = Policy.load(whole, session.config.model.trust, device, held=held, placement=placement)
            loaded = whole, held
        assert base is not None
        policy = base if adapter is None else beside(session, base, adapter, whole)
        answers.append(_answered(session, name, policy, sampling))
        del policy
    return answers


def _answered(session: Session, name: str, policy: Policy, sampling: Sampling) -> list[dict[str, Any]]:
    """Return the rows of a model's answers.

    Raises:
        UserError: The model cannot generate, or has no positions for an answer to a prompt.
    """
    if not policy.model.can_generate():
        raise UserError(f"`{name}` cannot generate: it is a {policy}", "--model", "leave it out")
    raise_all(
        UserError(
            f"the prompt has {len(one.tokens):,} tokens, and `{name}` has no positions for an answer behind them",
            one.where,
            "shorten the prompt",
        )
        for one in sampling.samples
        if not room(policy, one.tokens, 1)
    )
    policy.place(session.accelerator, trained=False)
    said = f"answers of {name}"
    with (
        session.console.progress(said, len(sampling.samples), "prompt") as told,
        session.during("while prompts were answered"),
    ):
        rows = sampling.rows(0, policy, session.accelerator, told)
    return [{"model": name, **{key: value for key, value in row.items() if key != "step"}} for row in rows]


def _show(prompts: Sequence[Sequence[Row]], console: Console) -> None:
    """Show the answers to each prompt."""
    console.block()
    for number, rows in enumerate(prompts, 1):
        if number > 1:
            console.result("")
        console.result(AnswersBeside(number, rows, colour=console.has_colour))


def _lines(prompts: Sequence[Sequence[Row]]) -> str:
    return json_lines(itertools.chain.from_iterable(prompts))


def _write(
    prompts: Sequence[Sequence[Row]],
    shown: Sequence[Sequence[Row]],
    limits: Limits,
    console: Console,
    json_file: Path | None,
    page: Path | None,
) -> None:
    """Write the answers where they are wanted."""
    if json_file and json_file != STANDARD_OUTPUT:
        write_results(json_file, _lines(prompts), "writing the answers")
        console.notice(f"answers written: {json_file}")
    if page:
        write_results(page, answers_page(shown, limits.max_new_tokens), "writing the page")
        console.notice(f"page written: {page}")
