"""Run under torchrun by `test_loop`: train with each loss of a list there on all ranks and write down what came of it.

torchrun --nproc-per-node 2 -m tests.training.ranks MODEL LIST PREPARED OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from dpo_cli.data.prepared.folder import PreparedPairs
from tests.builders import train_in_process
from tests.training import test_loop

SETTINGS = {"max_steps": 2, "dtype": torch.float64, "pairs_per_step": 5}


def main(model: str, losses: str, prepared: str, out: str) -> None:
    pairs = PreparedPairs.open(Path(prepared))
    found = [
        train_in_process(Path(model), pairs, loss=loss, micro_batch_tokens=400, **SETTINGS)
        for loss in getattr(test_loop, losses)
    ]
    if PartialState().is_main_process:
        torch.save(found, out)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
