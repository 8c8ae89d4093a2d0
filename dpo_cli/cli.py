"""The commands: parse, call the pipeline, render errors. Nothing else.

What a command needs is imported when it runs, so that `dpo --help` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dpo_cli
from dpo_cli.command_line import Command, Program, expanded, expanded_path, split_arguments, split_run
from dpo_cli.errors import FAILED, UserError, raise_all
from dpo_cli.system.launchers import environment_errors, is_main_process, numbering_errors, settle_environment
from dpo_cli.system.lone_ranks import of_this_rank, speaks_for_itself
from dpo_cli.system.signals import Interrupted, StopSignals, ignore_signals

if TYPE_CHECKING:
    from dpo_cli.config import Config
    from dpo_cli.reporting.console import Console

_ABOUT_ARGUMENTS = """\b
FILE is the configuration, as `--config FILE`. KEY=VALUE overrides a setting
of it. Relative paths, in it too, start at the working directory."""
_ABOUT_EXPORTED = """\b
RUN is the folder of a run, or in it `final` or a checkpoint. FOLDER is an
adapter of another program, or a model: a folder, a .gguf file or a Hub id.
KEY=VALUE overrides a setting of the run, such as where its base is now."""
_ABOUT_CHECKS = """\b
CHECK is device, libraries, attention, logps, products or resume; by default
all are made. Exit status 1 if something is wrong; what is not here is not."""
_ABOUT_CONFIG = """About configuration files.

A configuration is a YAML file of settings. Relative paths in it start at the working directory, not at the file's
folder; `~` and variables such as `$DATA` are expanded, and `$$` is a dollar sign.
"""


def _examples(*lines: str) -> str:
    """Write the examples below a command's help, unwrapped."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _configured(*examples: str) -> dict[str, Any]:
    """Return how a command is set up that works by a configuration."""
    epilog = f"{_ABOUT_ARGUMENTS}\n\n{_examples(*examples)}"
    return {"cls": Command, "options_metavar": "[FILE] [KEY=VALUE ...] [OPTIONS]", "epilog": epilog}


app = typer.Typer(
    name="dpo",
    cls=Program,
    help="Fine-tune a causal language model with Direct Preference Optimization.",
    epilog=_examples(
        "dpo train my.yaml --dry-run     check everything, print the plan, stop",
        "dpo train my.yaml               train",
        "dpo eval my.yaml                score the trained model",
        "dpo sample my.yaml              let it answer, beside the one before training",
        "dpo report runs/my              show what came of it as a page",
        "dpo export runs/my --merge --to models/my",
        "dpo doctor                      check this machine",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(cls=Program, help=_ABOUT_CONFIG, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")


def _value(metavar: str, about: str, *names: str, **how: Any) -> Any:
    """Return an option that takes a value; by default its name is that of the argument."""
    return typer.Option(*names, metavar=metavar, help=about, **how)


_text, _path = (functools.partial(_value, parser=parser) for parser in (expanded, expanded_path))
"""Options of which `~` and variables are expanded: a text, or a file or folder."""


def _json_file(about: str) -> Any:
    """Return the option for the file of the results."""
    return _path("FILE", f"{about}; `-`: to standard output.", "--json")


ConfigFile = Annotated[Path | None, _path("FILE", "The configuration, a YAML file.", "--config", "-c")]
Arguments = Annotated[list[str], typer.Argument(hidden=True, default_factory=list)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and results, no warnings.")]


@app.command(
    cls=Command,
    epilog=_examples("dpo init --model path/to/model --data pairs.jsonl --out my.yaml", "dpo train my.yaml --dry-run"),
)
def init(
    model: Annotated[str | None, _text("PATH", "A model folder, a .gguf file or a Hub id.")] = None,
    data: Annotated[str | None, _text("SOURCE", "Preference pairs: a file, folder or Hub id.")] = None,
    out: Annotated[Path, _path("FILE", "The file to write, a new one; `-`: standard output.")] = Path("dpo.yaml"),
    quiet: Quiet = False,
) -> None:
    """Write a configuration that fits a model and data."""
    from dpo_cli.jobs import init as write

    with _job(quiet=quiet) as (console, _):
        write(console, model=model, data=data, out=out)


@app.command(
    "prepare-data",
    **_configured("dpo prepare-data my.yaml --show 2", "dpo prepare-data my.yaml --out prepared data.eval=null"),
)
def prepare_data(
    arguments: Arguments,
    config: ConfigFile = None,
    out: Annotated[Path | None, _path("DIR", "Where to keep the prepared pairs.")] = None,
    report: Annotated[Path | None, _path("DIR", "Where to keep the report; by default beside the pairs.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 2 if the check finds warnings.")] = False,
    show: Annotated[int, _value("N", "Print N pairs token by token.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Read, check and tokenize the pairs; report on them."""
    with _job(quiet=quiet) as (console, _):
        settings = _settings(config, arguments)
        dpo_cli.prepare(settings, out=out, report=report, strict=strict, show=show, console=console)


@app.command(
    **_configured(
        "dpo train my.yaml --dry-run",
        "dpo train my.yaml training.epochs=2 output_dir=runs/two",
        "dpo train my.yaml --resume",
        "dpo train my.yaml --dry-run --assume-devices 8x80GB",
    )
)
def train(
    arguments: Arguments,
    config: ConfigFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Resume with more steps although the schedule changes.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older run in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")] = False,
    devices: Annotated[
        str | None, _value("8x80GB", "Plan for these GPUs, which need not be here.", "--assume-devices")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a policy on preference pairs."""
    from dpo_cli.config import load_config
    from dpo_cli.training.run_folder import RunFolder

    with _job(quiet=quiet, meets=True) as (console, signals):
        resume = resume or extend
        if resume and overwrite:
            what = f"`{'--extend' if extend else '--resume'}` and `--overwrite` exclude each other"
            raise UserError(what, "the command line", "choose one of them")
        file, overrides = split_arguments(config, arguments)
        settings = load_config(file, overrides)
        if resume and not any(text.startswith("output_dir=") for text in overrides):
            RunFolder(Path(settings.output_dir)).check_moved(file)
        if devices is not None:
            if resume or overwrite or not dry_run:
                hint = "add `--dry-run`, and leave `--resume` and `--overwrite` out"
                raise UserError("devices can be assumed in a dry run alone", f"--assume-devices {devices}", hint)
            from dpo_cli.jobs import forecast

            forecast(settings, devices, console=console)
            return
        how = {"resume": resume, "overwrite": overwrite, "extend": extend, "dry_run": dry_run}
        for _ in dpo_cli.train(settings, **how, console=console, signals=signals):
            pass


@app.command(
    "eval",
    **_configured(
        "dpo eval my.yaml",
        "dpo eval my.yaml --model runs/my/checkpoints/step-000100 --data others.jsonl",
        "dpo eval my.yaml --model runs/my/final --model runs/other/final",
    ),
)
def evaluate(
    arguments: Arguments,
    config: ConfigFile = None,
    model: Annotated[
        list[str] | None,
        _text(
            "PATH", "The model to score; by default the run's own. Given again: another one, compared with the first."
        ),
    ] = None,
    data: Annotated[str | None, _text("SOURCE", "The pairs to score; by default the held-out ones.")] = None,
    json_file: Annotated[Path | None, _json_file("Write the figures as JSON")] = None,
    quiet: Quiet = False,
) -> None:
    """Score held-out pairs against the reference."""
    with _job(quiet=quiet, meets=True) as (console, _):
        settings = _settings(config, arguments)
        dpo_cli.evaluate(settings, model=model, data=data, json_file=json_file, console=console)


@app.command(
    **_configured(
        "dpo sample my.yaml                  the model before training and `final/`",
        "dpo sample my.yaml --model runs/one/final --model runs/two/final --count 8",
        "dpo sample my.yaml --prompts prompts.txt --page answers.html",
    )
)
def sample(
    arguments: Arguments,
    config: ConfigFile = None,
    models: Annotated[
        list[str] | None,
        _text(
            "PATH",
            "A model to ask, several times for several; by default the one before training and `final/`.",
            "--model",
        ),
    ] = None,
    prompts: Annotated[str | None, _text("FILE", "Prompts: lines of .txt, or rows; by default held-out ones.")] = None,
    count: Annotated[int | None, _value("N", "How many prompts.")] = None,
    max_new_tokens: Annotated[int | None, _value("N", "The most tokens of an answer.")] = None,
    json_file: Annotated[Path | None, _json_file("Write JSON lines, one an answer")] = None,
    page: Annotated[Path | None, _path("FILE", "Write the answers as an HTML page.")] = None,
    quiet: Quiet = False,
) -> None:
    """Answer prompts with several models, side by side."""
    with _job(quiet=quiet, meets=True) as (console, _):
        settings = _settings(config, arguments)
        dpo_cli.sample(
            settings,
            models=models or (),
            prompts=prompts,
            count=count,
            max_new_tokens=max_new_tokens,
            json_file=json_file,
            page=page,
            console=console,
        )


@app.command(
    cls=Command,
    options_metavar="RUN|FOLDER [KEY=VALUE ...] [--to DIR] [--push ORG/NAME] [OPTIONS]",
    epilog=f"{_ABOUT_EXPORTED}\n\n"
    + _examples(
        "dpo export runs/my --to models/my",
        "dpo export runs/my --merge --to models/my",
        "dpo export runs/my/checkpoints/step-000100 --to models/my-100",
        "dpo export runs/my --merge --to models/my model.name=/new/place/of/the/base",
        "dpo export runs/my --gguf q8_0 --to models/my-gguf",
        "dpo export runs/my --dtype float32 --max-shard-size 2GB --to models/my",
        "dpo export models/my --push ORG/NAME --dry-run    list what would be sent",
        "dpo export models/my --push ORG/NAME              publish it on the Hub",
    ),
)
def export(
    arguments: Arguments,
    to: Annotated[Path | None, _path("DIR", "The folder to write, a new one.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make the adapter part of its base.")] = False,
    dtype: Annotated[str | None, _value("DTYPE", "float32, bfloat16 or float16, in place of the weights' own.")] = None,
    max_shard_size: Annotated[
        str | None, _value("SIZE", "The largest file of weights, such as 500MB; by default 5GB.")
    ] = None,
    gguf: Annotated[str | None, _value("TYPE", "Write a GGUF file: f16, bf16, q8_0, q4_0 and others.")] = None,
    push: Annotated[
        str | None, _value("ORG/NAME", "Publish it on the Hub; without `--to`, a folder that was exported before.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a repository that is created.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be published, send nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a trained model, or an adapter with or without its base, for other programs, and prove it; publish it."""
    with _job(quiet=quiet) as (console, _):
        run, overrides = split_run(arguments)
        dpo_cli.export(
            run,
            to,
            merge=merge,
            dtype=dtype,
            max_shard_size=max_shard_size,
            gguf=gguf,
            overrides=overrides,
            push=push,
            public=public,
            dry_run=dry_run,
            console=console,
        )


@app.command(
    cls=Command,
    options_metavar="RUN [RUN ...] [--out FILE] [OPTIONS]",
    epilog=_examples("dpo report runs/my", "dpo report runs/my runs/other --out comparison.html"),
)
def report(
    runs: Arguments,
    out: Annotated[
        Path | None, _path("FILE", "The page to write; by default `report.html` in the run's folder.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write what a run has recorded, or several beside each other, as a page; a run may be at work."""
    with _job(quiet=quiet) as (console, _):
        dpo_cli.report([expanded_path(run) for run in runs], out=out, console=console)


@app.command(
    cls=Command,
    options_metavar="[CHECK ...] [OPTIONS]",
    epilog=f"{_ABOUT_CHECKS}\n\n"
    + _examples("dpo doctor", "dpo doctor attention products", "dpo doctor --json doctor.json"),
)
def doctor(
    arguments: Arguments,
    json_file: Annotated[Path | None, _json_file("Write the findings as JSON")] = None,
    quiet: Quiet = False,
) -> None:
    """Check what this machine has, and that it computes as it should."""
    from dpo_cli.jobs import doctor as examined

    with _job(quiet=quiet) as (console, _):
        if not examined(console, arguments, json_file):
            raise typer.Exit(FAILED)


@config_app.command(cls=Command)
def example() -> None:
    """Print a configuration with comments, to start from."""
    from importlib.resources import files

    typer.echo(files("dpo_cli").joinpath("config", "example.yaml").read_text(encoding="utf-8"), nl=False)


@config_app.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of configuration files, for editors."""
    from dpo_cli.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"dpo {dpo_cli.__version__}")
        raise typer.Exit()


def _settings(config: Path | None, arguments: list[str]) -> Config:
    """Read the configuration that a command line names, with the settings that it overrides."""
    from dpo_cli.config import load_config

    return load_config(*split_arguments(config, arguments))


@contextlib.contextmanager
def _job(*, quiet: bool, meets: bool = False) -> Iterator[tuple[Console, StopSignals]]:
    """Give a command its console and its signals; render what goes wrong and choose the exit status.

    Args:
        quiet: Whether only errors and results are printed.
        meets: Whether the processes of several find each other; of others the main one alone speaks, at once.
    """
    from dpo_cli.reporting.console import Console

    ignored, wrong = settle_environment(), environment_errors()
    # Of ranks that are wrongly numbered, none may be the main process.
    console = Console(prints=is_main_process() or any(numbering_errors()), quiet=quiet)
    console.follow_warnings()
    try:
        for line in ignored:
            console.notice(line)
        raise_all(wrong)
        with StopSignals(console.answer).installed() as signals:
            yield console, signals
    except (UserError, ExceptionGroup) as error:
        errors = list(_user_errors(error))
        if meets and speaks_for_itself():
            console = Console(quiet=quiet)
            errors = [of_this_rank(one) for one in errors]
        for one in errors:
            console.error(one)
        raise typer.Exit(max(one.status for one in errors)) from None
    except Interrupted as stop:
        ignore_signals()
        console.answer(str(stop))
        raise typer.Exit(stop.status) from None


def _user_errors(error: BaseException) -> Iterator[UserError]:
    """Yield the user's errors of a group; anything else in it is a defect and is raised."""
    if isinstance(error, UserError):
        yield error
    elif isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _user_errors(inner)
    else:
        raise error


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A run that has come to its end does not fail for a dash that the terminal cannot show.
            stream.reconfigure(errors="replace")
    if "WORLD_SIZE" in os.environ:
        # Who is gone is said in a line; torch would print a stack for every connection that broke with it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    app(prog_name="dpo")
