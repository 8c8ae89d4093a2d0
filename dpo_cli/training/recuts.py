"""Steps that are cut again, since memory ran out: from which step on micro-batches have fewer tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from dpo_cli.data.prepared.step_plan import Step
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.batch import Batches
from dpo_cli.system.storage import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

Changed = Callable[[int, int], None]
"""Called with a step, and the tokens of a forward pass from that step on."""


@dataclass
class Recuts:
    """Which steps of a run have smaller micro-batches than those before them.

    Attributes:
        allowed: Whether a step may be cut again where memory runs out.
        tokens: The most tokens of a forward pass, by the first step that they hold for.
        changed: Called after a change.
    """

    allowed: bool = False
    tokens: dict[int, int] = field(default_factory=dict)
    changed: Changed = lambda step, tokens: None

    def batches(self, batches: Batches, step: int) -> Batches:
        """Return the batches as a step cuts them."""
        before = [first for first in self.tokens if first <= step]
        return dataclasses.replace(batches, micro_batch_tokens=self.tokens[max(before)]) if before else batches

    def halve(self, step: Step, batches: Batches, accelerator: Accelerator, failure: BaseException | None) -> None:
        """Let a step and all later ones have passes of fewer tokens, on all ranks alike; every rank calls it.

        Args:
            step: This rank's share.
            batches: How it was cut.
            accelerator: Knows the ranks.
            failure: Says that memory ran out on this rank; None: it did on another.

        Raises:
            RuntimeError: A rank for which memory ran out has one pair in each pass already; it is that rank's failure.
        """
        wanted = gather_object([halved(step, batches) if failure else None])
        if 0 in wanted:
            raise failure or torch.OutOfMemoryError(f"out of memory on rank {wanted.index(0)}")
        self.tokens[step.number] = min(filter(None, wanted))
        self.changed(step.number, self.tokens[step.number])


def halved(step: Step, batches: Batches) -> int:
    """Return so many tokens of a forward pass that this rank's share of a step has more passes; 0: none are so few."""
    whole = [cut for cut in step.micro_batches if not cut.filler]
    share = {index for cut in whole for index in cut.pairs}
    num_tokens = batches.micro_batch_tokens
    while num_tokens > 1 and any(len(cut.pairs) > 1 for cut in whole):
        num_tokens //= 2
        smaller = dataclasses.replace(batches, micro_batch_tokens=num_tokens)
        if len(smaller.cut([index for index in step.pairs if index in share])) > len(whole):
            return num_tokens
    return 0


def write_recuts(file: Path, tokens: Mapping[int, int]) -> None:
    """Write down the most tokens of a forward pass, by the first step that they hold for.

    Raises:
        UserError: The disk refuses.
    """
    try:
        write_text(file, json.dumps({str(step): count for step, count in sorted(tokens.items())}) + "\n")
    except OSError as error:
        raise from_os_error(error, "noting the size of forward passes", str(file)) from error


def read_recuts(file: Path) -> dict[int, int]:
    """Return what `write_recuts` wrote down; nothing where there is no file.

    Raises:
        UserError: It is not what a run writes.
    """
    try:
        found = {int(step): count for step, count in json.loads(file.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(file, str(error)) from None
    if not all(step > 0 and type(count) is int and count > 0 for step, count in found.items()):
        raise _damaged(file, "it does not have numbers of tokens by step")
    return found


def _damaged(file: Path, reason: str) -> UserError:
    hint = "remove it: the run then continues with larger passes, and its last bits may differ"
    return UserError(f"the sizes of forward passes cannot be read: {reason}", str(file), hint)
