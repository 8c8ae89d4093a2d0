"""Memory that runs out: what was being done, what takes most of it, and which settings take less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dpo_cli.config import Config
from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.memory import MemoryEstimate
from dpo_cli.modeling.out_of_memory import asked_for, is_out_of_memory
from dpo_cli.reporting.console import gib

ANSWERING = "while prompts of held-out pairs were answered"
"""What a run does beside training and evaluating, which other settings decide."""

_SHOWN = 3


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Note what was being done on an error that says that memory has run out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            error.add_note(what)
        raise


@contextlib.contextmanager
def reported(config: Config, memory: MemoryEstimate | None = None) -> Iterator[None]:
    """Turn an error that says that memory has run out into one for the user.

    Args:
        config: Says which settings could take less.
        memory: What a run was estimated to take; None: nothing trains.

    Raises:
        UserError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The traceback holds tensors, and none of it is of use to the user.
        raise _told(error, config, memory) from None


def _told(error: BaseException, config: Config, memory: MemoryEstimate | None) -> UserError:
    """Say when memory ran out, what is largest, and what to change."""
    notes = getattr(error, "__notes__", [])
    when, asked = f" {notes[0]}" if notes else "", asked_for(error)
    what = f"memory ran out{when}" + (f": {asked} more did not fit" if asked else "")
    if memory is None:
        return UserError(what, None, f"try {', '.join(_while_scoring(config))}", status=FAILED)
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:_SHOWN]
    what += f"; the largest parts are {', '.join(f'{name} ({gib(size)})' for name, size in parts if size)}"
    whole = "the last checkpoint is whole, and `--resume` continues from it"
    of_answers = ["fewer `evaluation.samples`"] if notes[:1] == [ANSWERING] else []
    return UserError(what, None, f"try {', '.join([*of_answers, *advice(config)])}; {whole}", status=FAILED)


def advice(config: Config) -> Iterator[str]:
    """Yield what takes less memory where a policy is trained, and is not set yet."""
    if not config.training.gradient_checkpointing:
        yield "`training.gradient_checkpointing: true`"
    yield "fewer `training.micro_batch_tokens`"
    if config.adapter is None:
        yield "`adapter: lora`"
        if config.training.optimizer.type != "adafactor":
            yield "`training.optimizer: adafactor`"
    elif config.model.quantize is None:
        yield "`model.quantize: nf4`"
    yield "a lower `data.max_length`"


def _while_scoring(config: Config) -> Iterator[str]:
    """Yield what takes less memory where nothing trains."""
    yield "fewer `training.micro_batch_tokens`"
    if config.reference.holds_model:
        yield "`reference.type: cached`"
    yield "a lower `data.max_length`"
