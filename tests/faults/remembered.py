"""What thousands of runs would each count anew: the memory of passes on paper, a third of a small run's time.

Counting touches no file of a run and leaves nothing behind. A run whose model, pairs or settings differ in anything
counts for itself.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from dpo_cli.modeling import memory
from dpo_cli.modeling.policy import Policy


class _ByValue(pickle.Pickler):
    """Writes tensors as their numbers: their own pickles hold addresses, which differ from process to process."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return list, ([str(value.dtype), value.tolist()],)
        return NotImplemented


def _digest(value: object) -> str:
    written = io.BytesIO()
    _ByValue(written).dump(value)
    return hashlib.sha256(written.getvalue()).hexdigest()


def remember_counts(folder: Path) -> None:
    """Keep in a folder what this process counts, and find there what others have counted."""
    count = memory.activation_bytes

    @functools.wraps(count)
    def counted(policy: Policy, *arguments: Any, **how: Any) -> int:
        weights = [(name, one.shape, one.dtype, one.requires_grad) for name, one in policy.model.named_parameters()]
        model = policy.model.config.to_json_string(use_diff=False), policy._trained, policy._held
        file = folder / f"counted-{_digest((repr(model), repr(weights), arguments, sorted(how.items())))}"
        if not file.exists():
            number = count(policy, *arguments, **how)
            part = file.with_name(f"{file.name}-{os.getpid()}")
            part.write_text(str(number), encoding="ascii")
            part.replace(file)
        return int(file.read_text(encoding="ascii"))

    for module in [module for name, module in sys.modules.items() if name.startswith("dpo_cli.")]:
        for name in [name for name, value in vars(module).items() if value is count]:
            setattr(module, name, counted)
