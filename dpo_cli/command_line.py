"""How a command line is read: a configuration, settings that override it, and options; errors look as everywhere."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dpo_cli.errors import FAILED, UserError, from_os_error
from dpo_cli.system.launchers import is_main_process

_WHERE = "the command line"
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""The base of the parser's errors, which typer exports by none of its public names."""


class Command(TyperCommand):
    """A command of which every option that takes a value is given once."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the command's name in its help: what `options_metavar` says."""
        return [self.options_metavar or ""]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and refuse an option whose value is empty, and one of one value that is given twice."""
        try:
            values, _, given = self.make_parser(ctx).parse_args(args=list(args))
        except _USAGE_ERROR as error:
            error.ctx = error.ctx or ctx
            raise
        for option in given:
            value = values.get(option.name)
            if value == "" or (isinstance(value, list) and "" in value):
                raise UserError(
                    f"the value of `{option.opts[0]}` is empty", _WHERE, "give one, or leave the option out"
                )
            several = option.nargs != 1 or getattr(option, "multiple", False) or getattr(option, "is_flag", False)
            if not several and given.count(option) > 1 and not ctx.resilient_parsing:
                # One of them would be ignored.
                raise UserError(f"`{option.opts[0]}` is given {given.count(option)} times", _WHERE, "keep one of them")
        return super().parse_args(ctx, args)


class Program(TyperGroup):
    """A group of commands that explains a wrong command line as the commands explain other errors."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command that is named, or suggest one."""
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            near = difflib.get_close_matches(args[0], known, n=1)
            names = ", ".join(f"`{name}`" for name in known)
            hint = f"did you mean `{ctx.command_path} {near[0]}`?" if near else f"commands: {names}"
            raise UserError(f"`{args[0]}` is not a command of `{ctx.command_path}`", _WHERE, hint)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the program and end the process with its exit status."""
        try:
            status = super().main(*args, **{**settings, "standalone_mode": False})
        except UserError as error:
            status = _report(error)
        except _USAGE_ERROR as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                sys.exit(error.exit_code)
            status = _report(_explained(error))
        except BrokenPipeError:
            # Whoever read our output has gone; there is nobody to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = FAILED
        except OSError as error:
            status = _report(from_os_error(error, "reading or writing"))
        sys.exit(status or 0)


def _report(error: UserError) -> int:
    """Show an error and return the exit status."""
    from dpo_cli.reporting.console import Console

    Console(prints=is_main_process()).error(error)
    return error.status


def _explained(error: Any) -> UserError:
    """Turn what the parser found into an error with a hint."""
    command = error.ctx.command_path if error.ctx else "dpo"
    hint = f"see `{command} --help`"
    if option := getattr(error, "possibilities", None):
        hint = f"did you mean `{option[0]}`?"
    if type(error).__name__ == "NoSuchOption":
        from dpo_cli.config.explain import option_hint

        what = f"`{error.option_name}` is not an option of `{command}`"
        return UserError(what, _WHERE, option_hint(error.option_name) or hint)
    message = re.sub("'(-.*?)'", r"`\1`", error.format_message().rstrip("."))
    return UserError(f"{message[0].lower()}{message[1:]}", _WHERE, hint)


def split_arguments(config: Path | None, arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """Tell the configuration from the settings that override it.

    Args:
        config: What `--config` names, or None.
        arguments: `KEY=VALUE` each; and, if `--config` is not given, the configuration.

    Returns:
        The configuration and the overrides.

    Raises:
        UserError: No configuration is named, or several are.
    """
    files = [text for text in arguments if "=" not in text and (config is None or _like_a_file(text))]
    if not config and len(files) > 1:
        # Beside a file, a word that is none is a setting without its value.
        files = [text for text in files if _like_a_file(text)] or files[:1]
    named = [*([str(config)] if config else []), *files]
    if not named:
        hint = "give a file, as in `dpo train my.yaml`; `dpo init` writes one"
        raise UserError("no configuration is given", _WHERE, hint)
    if len(named) > 1:
        what = f"several configurations are given: {', '.join(f'`{name}`' for name in named)}"
        raise UserError(what, _WHERE, "give one, and override its settings, as in `training.epochs=2`")
    overrides = [text for text in arguments if text not in files]
    for name, value in itertools.pairwise(overrides):
        if "." in name and "=" not in name + value:
            what = f"`{name} {value}` is not a setting with a value"
            raise UserError(what, _WHERE, f"write `{name}={value}`")
    return config or expanded_path(files[0]), overrides


def split_run(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """Tell the run's folder from the settings that override its own.

    Args:
        arguments: The folder, and `KEY=VALUE` each.

    Raises:
        UserError: No folder is named, or several are.
    """
    named = [text for text in arguments if "=" not in text or Path(text).exists()]
    if not named:
        raise UserError("no run is given", _WHERE, "give its folder, as in `dpo export runs/my --merge --to models/my`")
    if "" in named:
        hint = "give its folder; a variable of the shell that is not set is empty"
        raise UserError("the run is given as an empty text", _WHERE, hint)
    if len(named) > 1:
        what = f"several runs are given: {', '.join(f'`{name}`' for name in named)}"
        hint = "export one after the other, each into a folder of its own"
        if not Path(named[-1]).exists():
            hint = f"the folder to write is named by an option: `--to {named[-1]}`"
        raise UserError(what, _WHERE, hint)
    return expanded_path(named[0]), [text for text in arguments if text not in named]


def _like_a_file(text: str) -> bool:
    return Path(text).suffix in (".yaml", ".yml", ".json") or Path(text).is_file()


def expanded(text: str) -> str:
    """Expand `~` and variables in the value of an option.

    Raises:
        UserError: The environment lacks a variable.
    """
    from dpo_cli.settings import UndefinedVariable, expand_path

    try:
        return expand_path(text)
    except UndefinedVariable as error:
        raise UserError(f"`{text}` cannot be expanded: {error}", _WHERE, error.hint) from None


def expanded_path(text: str) -> Path:
    """Expand `~` and variables in an option that names a file or folder."""
    return Path(expanded(text))
