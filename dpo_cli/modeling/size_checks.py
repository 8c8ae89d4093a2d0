"""What a model would hold, compared with its files and with the memory that is free, before any is taken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dpo_cli.errors import UserError
from dpo_cli.modeling.memory import free_bytes
from dpo_cli.modeling.model_files import check_elements

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_size(model: PreTrainedModel, folder: Path) -> None:
    """Compare what a model would hold with its files and with the memory that is free, before any is taken.

    Raises:
        UserError: It is more than either.
    """
    check_model_elements(model, folder)
    check_room(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))


def check_model_elements(model: PreTrainedModel, folder: Path) -> None:
    """Compare what a model would hold with its files.

    Raises:
        UserError: It is more.
    """
    check_elements(sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())), folder)


def check_room(needed: int) -> None:
    """Refuse weights that are larger than the memory that is free.

    Raises:
        UserError: They are.
    """
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        what = f"its weights take {needed / 2**30:.1f} GiB in float32, but {free / 2**30:.1f} GiB of memory are free"
        raise UserError(what, None, "choose a smaller model, or a machine with more memory")
