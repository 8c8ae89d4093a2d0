"""What a model would hold, compared with its files and with the memory that is free, before any is taken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.model_files import check_elements
from dpo_cli.modeling.held import Held
from dpo_cli.modeling.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_size(model: PreTrainedModel, folder: Path, held: Held, device: torch.device | str) -> None:
    """Compare what a model would hold with its files and with the memory that is free, before any is taken.

    Args:
        model: The model without its weights.
        folder: Where they are.
        held: How they are going to be held.
        device: Where the model is going to be.

    Raises:
        UserError: It is more than either.
    """
    check_model_elements(model, folder, held)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    check_room(held.bytes_of(model) + buffers, held, held.loaded_on(device))


def check_model_elements(model: PreTrainedModel, folder: Path, held: Held) -> None:
    """Compare what a model would hold with its files.

    Raises:
        UserError: It is more.
    """
    check_elements(held.numbers_of(model) + sum(buffer.numel() for buffer in model.buffers()), folder)


def check_room(needed: int, held: Held, device: torch.device) -> None:
    """Refuse weights that are larger than the memory that is free.

    Raises:
        UserError: They are.
    """
    free = free_bytes(device)
    if needed > free:
        what = f"its weights take {needed / 2**30:.1f} GiB in {held}, but {free / 2**30:.1f} GiB of memory are free"
        raise UserError(what, None, "choose a smaller model, or a machine with more memory")
