"""What thousands of runs would each count anew: the memory of passes on paper, a third of a small run's time.

Counting touches no file of a run and leaves nothing behind. A run whose model, pairs or settings differ in anything
counts for itself.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from dpo_cli.modeling import memory
from dpo_cli.modeling.policy import Policy


def remember_counts(folder: Path) -> None:
    """Keep in a folder what this process counts, and find there what others have counted."""
    count = memory.activation_bytes

    @functools.wraps(count)
    def counted(policy: Policy, *arguments: Any, **how: Any) -> int:
        weights = [(name, one.shape, one.dtype, one.requires_grad) for name, one in policy.model.named_parameters()]
        model = policy.model.config.to_json_string(use_diff=False), policy._trained, policy._held
        key = pickle.dumps((repr(model), repr(weights), arguments, sorted(how.items())))
        file = folder / f"counted-{hashlib.sha256(key).hexdigest()}"
        if not file.exists():
            number = count(policy, *arguments, **how)
            part = file.with_name(f"{file.name}-{os.getpid()}")
            part.write_text(str(number), encoding="ascii")
            part.replace(file)
        return int(file.read_text(encoding="ascii"))

    for module in [module for name, module in sys.modules.items() if name.startswith("dpo_cli.")]:
        for name in [name for name, value in vars(module).items() if value is count]:
            setattr(module, name, counted)
