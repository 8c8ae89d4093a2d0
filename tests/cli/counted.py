"""Run under torchrun by `test_lockstep`: the program, each rank of which writes down its forward passes.

torchrun --nproc-per-node 2 -m tests.cli.counted FOLDER train --config FILE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from dpo_cli.cli import main
from dpo_cli.modeling.scorer import Scorer


def count_into(passes: list[bool]) -> None:
    """Note each forward pass from now on: whether it takes gradients."""
    forward = Scorer.forward

    def counted(scorer, batch, **how):
        passes.append(torch.is_grad_enabled())
        return forward(scorer, batch, **how)

    Scorer.forward = counted


if __name__ == "__main__":
    folder, passes = Path(sys.argv.pop(1)), []
    count_into(passes)
    try:
        main()
    finally:
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(passes))
