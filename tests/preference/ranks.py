"""Run under torchrun by `test_reference_of_ranks`: complete caches on disks that ranks share or do not share.

torchrun --nproc-per-node 3 -m tests.preference.ranks MODEL PREPARED ROOT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.cache import ReferenceCache
from tests.builders import silent

DISKS = ("one", "one", "other")
"""The disk of each rank."""

PAIRS = 23
"""Of which pairs log-probabilities are asked for: their micro-batches do not divide among the ranks."""


def main(model: str, prepared: str, root: str) -> None:
    accelerator, pairs = Accelerator(cpu=True), PreparedPairs.open(Path(prepared))
    policy = Policy.load(model)
    policy.read(LAYOUTS["padded"])
    policy.place(accelerator, trained=False)
    batches, rank, found = Batches(pairs, LAYOUTS["padded"], 500, torch.device("cpu")), accelerator.process_index, {}

    def completed(name, disk, needed=range(PAIRS), *, holds=False, alone=None):
        """Ask for pairs with a cache on a disk; return each rank's passes and values."""
        os.environ["DPO_CACHE_DIR"] = str(Path(root) / name / disk)
        passes = 0

        @torch.no_grad()
        def scorer(batch):
            nonlocal passes
            passes += 1
            return policy.scorer(batch)

        cache = ReferenceCache("0" * 64, batches, accelerator)
        held = cache.holds(list(needed)) if holds else None
        if not holds:
            cache.complete(list(needed), scorer, silent)
        values = cache.values(needed) if held is not False else np.empty(0)
        return gather_object([{"passes": passes, "held": held, "values": values}])

    found["shared"] = completed("shared", "all")
    found["not shared"] = completed("not shared", DISKS[rank])
    # Each of two disks has what an earlier run on it computed.
    completed("halves", "one", range(12))
    completed("halves", "other", range(12, PAIRS))
    found["halves are held"] = completed("halves", DISKS[rank], holds=True)
    found["halves"] = completed("halves", DISKS[rank])
    completed("some", "other", range(5, 9))
    found["some are not held"] = completed("some", DISKS[rank], holds=True)
    found["some are known to the last rank"] = completed("some", DISKS[rank])
    found["a disk that takes no file"] = completed("refusing", "one" if rank < 2 else "file/none")
    if accelerator.is_main_process:
        torch.save(found, Path(root) / "found.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
