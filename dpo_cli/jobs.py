"""The jobs, as the command line and Python programs call them: what needs no torch is checked first.

The pipeline, which imports torch, is imported after that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config import Config, as_config
from dpo_cli.config.export_forms import Options
from dpo_cli.config.exporting import check_export, look_up, reserved
from dpo_cli.config.inputs import (
    check_evaluation,
    check_new_file,
    check_preparation,
    check_training,
    look_up_on_hub,
    scored_models,
)
from dpo_cli.config.launched import sharding_errors, taken_over
from dpo_cli.config.outputs import json_file_errors
from dpo_cli.config.publishing import Publishing, as_publishing, check_exported
from dpo_cli.config.reporting import check_report
from dpo_cli.config.sampling import check_sampling
from dpo_cli.config.starting import starting_text
from dpo_cli.data.pairs.prompts import is_text, read_prompts
from dpo_cli.doctor.findings import anything_wrong, chosen
from dpo_cli.errors import UserError, from_os_error, raise_all
from dpo_cli.reporting.console import STANDARD_OUTPUT, Console, Unattended
from dpo_cli.system.assumed_devices import assumed_devices
from dpo_cli.system.launchers import environment_errors, is_main_process, num_ranks, settle_environment
from dpo_cli.system.signals import StopSignals
from dpo_cli.training.run_folder import RunFolder, RunState

if TYPE_CHECKING:
    from dpo_cli.data.checkup.report import Report
    from dpo_cli.training.learner import StepResult

Configuration = str | PathLike[str] | Mapping[str, Any] | Config
"""A YAML file, its settings, or either of them as read."""


def init(console: Console, *, model: str | None, data: str | None, out: Path) -> None:
    """Write a configuration with comments that fits a model and data.

    Args:
        console: Is told what was found.
        model: A model folder, a .gguf file or a Hub id; None: a placeholder is written.
        data: A source of pairs; None: a placeholder is written.
        out: The file to write, which must not exist; `-`: standard output.

    Raises:
        UserError: The file exists or cannot be written; the model or the data cannot be read.
    """
    check_new_file(out, model, data)
    if model or data:
        console.notice("looking at the model and the data …")
        from dpo_cli.pipeline.init import described

        text = described(console, model, data)
    else:
        console.notice("writing placeholders: no model, no data")
        text = starting_text(None, None, None, None)
    if out == STANDARD_OUTPUT:
        console.result(text.rstrip("\n"))
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise from_os_error(error, "writing the configuration", str(out)) from error
    console.notice(f"configuration written: {out}; next: dpo train {out} --dry-run")


def prepare(
    config: Configuration,
    *,
    out: Path | None = None,
    report: Path | None = None,
    strict: bool = False,
    show: int = 0,
    console: Console | None = None,
) -> Report:
    """Read, check and tokenize the pairs; return what the check found.

    Args:
        config: What to prepare, and how it is split.
        out: Where to keep the training pairs, or None for the cache.
        report: Where to keep the report, or None for a folder beside the training pairs.
        strict: Whether warnings of the check are an error, after the report was written.
        show: How many pairs to print token by token.
        console: What a person sees, or None.

    Raises:
        UserError: Something is wrong that the user can fix; an `ExceptionGroup` of such where several things are.
    """
    settings, console = as_config(config), _heard(console)
    check_preparation(settings, report)
    look_up_on_hub(settings)
    from dpo_cli.pipeline.prepare import prepare

    return prepare(settings, console, out=out, report=report, strict=strict, show=show)


def train(
    config: Configuration,
    *,
    resume: bool = False,
    overwrite: bool = False,
    extend: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    signals: StopSignals | None = None,
) -> Iterator[StepResult]:
    """Train a policy; yield a result after each optimizer step, once its evaluation and checkpoint are done.

    The run is complete when the iterator is exhausted. One that is left before keeps its last checkpoint.

    Args:
        config: What to do.
        resume: Go on from the newest whole checkpoint, or start where there is none.
        overwrite: Replace an older run in the folder.
        extend: Resume with more steps also where the learning rate of steps that were taken would have been another.
        dry_run: Check everything, print the plan and take no step.
        console: What a person sees, or None.
        signals: Those that ask to stop, or None.

    Raises:
        UserError: Something is wrong that the user can fix; an `ExceptionGroup` of such where several things are.
        Interrupted: A signal came; what was done is saved.
    """
    if overwrite and (resume or extend):
        raise UserError("`resume` and `overwrite` exclude each other", "the call of `train`", "choose one of them")
    settings, console = _launched(config, console)
    resume = resume or extend
    check_training(settings, resume=resume, overwrite=overwrite, dry_run=dry_run)
    signals = signals or StopSignals()
    return _train(settings, console, signals, resume=resume, overwrite=overwrite, extend=extend, dry_run=dry_run)


def forecast(config: Configuration, devices: str, *, console: Console | None = None) -> None:
    """Check everything of a run and print its plan as `train` does with `dry_run`, for GPUs that are not here.

    Neither GPUs nor the model's weights are needed.

    Args:
        config: What to do.
        devices: The GPUs, as in `8x80GB`, or `2x8x80GB` on 2 machines.
        console: What a person sees, or None.

    Raises:
        UserError: Something is wrong that the user can fix; an `ExceptionGroup` of such where several things are.
    """
    settings, console, assumed = as_config(config), _heard(console), assumed_devices(devices)
    if num_ranks() > 1:
        what = "devices are assumed by one process, and a launcher started several"
        raise UserError(what, f"--assume-devices {devices}", "start `dpo` itself, without a launcher")
    check_training(settings, resume=False, overwrite=False, dry_run=True, weights=False)
    raise_all(list(sharding_errors(settings, assumed.count, assumed.per_machine)))
    console.notice("loading …")
    look_up_on_hub(settings)
    from dpo_cli.pipeline.forecast import forecast

    forecast(settings, console, assumed)


def _train(
    config: Config,
    console: Console,
    signals: StopSignals,
    *,
    resume: bool,
    overwrite: bool,
    extend: bool,
    dry_run: bool,
) -> Iterator[StepResult]:
    """Take the run's folder, then import what trains."""
    folder = RunFolder(Path(config.output_dir))
    if dry_run and not resume and not overwrite and folder.state() is not RunState.FREE:
        console.notice(f"{folder.path} contains another run: training needs `--resume` or `--overwrite` there")
    same_length = resume and folder.recorded.length() == (config.training.epochs, config.training.max_steps)
    # Whether one goes on that its patience has ended is known when its steps are.
    patient = config.evaluation.patience or folder.recorded.count("evaluation.patience") if resume else None
    if same_length and not patient and folder.state() is RunState.FINISHED:
        console.notices(folder.nothing_left(config.model_dump(mode="json"), extend=extend))
        return
    # Ranks of one run share its folder; a dry run writes nothing.
    with folder.locked() if is_main_process() and not dry_run else contextlib.nullcontext():
        console.notice("loading …")
        look_up_on_hub(config)
        from dpo_cli.pipeline.train import train

        how = {"resume": resume, "overwrite": overwrite, "dry_run": dry_run, "extend": extend}
        yield from train(config, console, signals, **how)


def evaluate(
    config: Configuration,
    *,
    model: str | Sequence[str] | None = None,
    data: str | None = None,
    json_file: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score a model on held-out pairs against the reference, or several; return the figures.

    Args:
        config: The run's configuration; it names the reference, the loss and the held-out pairs.
        model: What to score: a folder, a .gguf file or a Hub id; or several of them, the others of which are compared
            with the first; None: the run's trained model.
        data: Pairs to score, all of them; None: what the configuration holds out.
        json_file: Where to write the figures; `-`: standard output, in place of the table; or None.
        console: What a person sees, or None.

    Raises:
        UserError: Something is wrong that the user can fix; an `ExceptionGroup` of such where several things are.
    """
    settings, console = _launched(config, console)
    named = [model] if isinstance(model, str) else list(model or ())
    check_evaluation(settings, named, data, json_file)
    console.notice("loading …")
    look_up_on_hub(settings, models=named, data=None if data is None else {"--data": data})
    from dpo_cli.pipeline.evaluate import evaluate

    return evaluate(settings, console, models=scored_models(settings, named), data=data, json_file=json_file)


def sample(
    config: Configuration,
    *,
    models: Sequence[str] = (),
    prompts: str | None = None,
    count: int | None = None,
    max_new_tokens: int | None = None,
    json_file: Path | None = None,
    page: Path | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Let models answer the same prompts greedily; return a row an answer, those to a prompt one after the other.

    Args:
        config: The run's configuration.
        models: Folders, checkpoints, adapters, .gguf files or Hub ids; none: the model before training and the run's.
        prompts: A .txt file with a prompt a line, or a source of rows that have prompts; None: held-out pairs'.
        count: How many prompts; None: all of the file, or as many held-out ones as the run samples.
        max_new_tokens: The most tokens of an answer; None: as the configuration says.
        json_file: Where to write the rows as JSON lines; `-`: standard output, in place of the answers; or None.
        page: Where to write the answers as a page, or None.
        console: What a person sees, or None.

    Raises:
        UserError: Something is wrong that the user can fix; an `ExceptionGroup` of such where several things are.
    """
    settings, console = _launched(config, console)
    counts = {"--count": count, "--max-new-tokens": max_new_tokens}
    check_sampling(settings, models, prompts, counts=counts, json_file=json_file, page=page)
    console.notice("loading …")
    from_rows = {} if prompts is None or is_text(prompts) else {"--prompts": prompts}
    look_up_on_hub(settings, models=models, data=None if prompts is None else from_rows)
    asked = None if prompts is None else read_prompts(prompts, count, settings.data.system or "")
    from dpo_cli.pipeline.sample import sample

    return sample(
        settings,
        console,
        models=models,
        prompts=asked,
        count=count,
        max_new_tokens=max_new_tokens,
        json_file=json_file,
        page=page,
    )


def export(
    run: str | PathLike[str],
    to: str | PathLike[str] | None = None,
    *,
    merge: bool = False,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    gguf: str | None = None,
    overrides: Sequence[str] = (),
    push: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a model, or an adapter, into a folder of its own, and prove it; return how exact it is.

    With `push`, what was written is published on the Hub. Without `to`, that is a folder of an earlier call, and the
    repository, whether it is private, and the commit are returned.

    Args:
        run: A run's folder, or in it `final` or a checkpoint; an adapter's folder; or a model: a folder, a .gguf file
            or a Hub id.
        to: The folder to be written, which must not exist; None: the one that is published.
        merge: Whether an adapter becomes part of its base; otherwise it is written by itself.
        dtype: The dtype of the weights that are written; None: as they are.
        max_shard_size: The largest file of weights, as in `500MB`; None: 5 GB.
        gguf: The type of the weights in a GGUF file, as in `q8_0`; None: a folder that transformers or PEFT reads.
        overrides: `KEY=VALUE` each: settings of the run that are others now, such as where the base is.
        push: The repository on the Hub, as `ORG/NAME`; None: nothing is published.
        public: Whether everybody may see a repository that is created.
        dry_run: Whether what would be published is listed, and nothing is sent.
        console: What a person sees, or None.

    Raises:
        UserError: Something is wrong that the user can fix, or what was written is not what was exported; an
            `ExceptionGroup` of such where several things are.
    """
    console = _heard(console)
    options = Options(merge, dtype, max_shard_size, gguf)
    publishing = as_publishing(push, public=public, dry_run=dry_run)
    if to is None:
        if publishing is None:
            raise UserError("no folder to write is given", "the command line", "give one, as in `--to models/my`")
        check_exported(Path(run), publishing, [*overrides, *options.given])
        return _publish(Path(run), publishing, console)
    asked = check_export(Path(run), Path(to), overrides, options, publishing)
    if publishing:
        console.notice("asking the Hub …")
        from dpo_cli.pipeline.publishing import check_published

        check_published(publishing, console)
    console.notice("loading …")
    asked = look_up(asked, overrides)
    from dpo_cli.pipeline.export import export

    with reserved(asked.to):
        found = export(asked, console)
    if publishing:
        found["published"] = _publish(asked.to, publishing, console)
    return found


def _publish(folder: Path, asked: Publishing, console: Console) -> dict[str, Any]:
    """Import what publishes, which needs no torch, and let it do so."""
    from dpo_cli.pipeline.publishing import push

    return push(folder, asked, console)


def report(
    runs: Sequence[str | PathLike[str]],
    *,
    out: str | PathLike[str] | None = None,
    console: Console | None = None,
) -> Path:
    """Write what a run has recorded, finished or not, or several runs beside each other, as a page; return its file.

    Args:
        runs: The runs' folders.
        out: The file to write; None: `report.html` in the folder of the run, if it is one.
        console: What a person sees, or None.

    Raises:
        UserError: Something is wrong that the user can fix; an `ExceptionGroup` of such where several things are.
    """
    console, file = _heard(console), Path(out) if out is not None else None
    folders = check_report([Path(run) for run in runs], file)
    from dpo_cli.pipeline.report import write_report

    page = write_report(folders, file, console)
    console.result(f"report  {page}")
    return page


def doctor(console: Console, checks: Sequence[str], json_file: Path | None) -> bool:
    """Look at this machine, show what is found, and tell whether nothing is wrong.

    Args:
        console: What a person sees.
        checks: Names of checks; none: all.
        json_file: Where to write what is found; `-`: standard output, in place of the table; or None.

    Raises:
        UserError: There is no such check, or the file cannot be written.
    """
    names = chosen(checks)
    raise_all(list(json_file_errors(json_file)))
    console.notice("loading …")
    from dpo_cli.doctor.examine import examine

    return not anything_wrong(examine(console, names, json_file))


def _launched(config: Configuration, console: Console | None) -> tuple[Config, Console]:
    """Return a configuration with what `accelerate launch` sets in it, and what `_heard` returns."""
    console = _heard(console)
    settings, lines = taken_over(as_config(config))
    console.notices(lines)
    return settings, console


def _heard(console: Console | None) -> Console:
    """Settle what launchers left in the environment, as the command line does, and return who tells it.

    Args:
        console: What a person sees; None: warnings are logged, and nothing else is.

    Raises:
        UserError: What a launcher says is wrong; an `ExceptionGroup` of such where several things are.
    """
    console = console or Unattended()
    console.notices(settle_environment())
    raise_all(environment_errors())
    return console
