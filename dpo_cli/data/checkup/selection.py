"""Which pairs have a finding, which ones a run leaves out for it, and which are there twice by a source's weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_cli.data.checkup.comparisons import PAIR_CHECKS, Comparison, Found, Indices
from dpo_cli.data.findings import FlaggedCheck
from dpo_cli.data.prepared.folder import PreparedPairs

_BY_NAME = {check.name: check for check in PAIR_CHECKS}


def find(check: Comparison | FlaggedCheck, pairs: PreparedPairs, train: Indices, held_out: Indices) -> Found:
    """Find the pairs of a check, among those that are trained on and those that are held out."""
    if isinstance(check, Comparison):
        return check.find(pairs, train, held_out)
    indices = np.sort(np.concatenate([train, held_out]))
    return Found(indices[pairs.flags[indices] & np.uint32(check.flag) > 0])


def without_copies(pairs: PreparedPairs, indices: Indices) -> Indices:
    """Return some pairs without those that are there only because a source's weight repeats their row.

    Copies are beside each other and were read at the same place. What was read there again later, of a file that
    was named twice for instance, is none.

    Args:
        pairs: All pairs.
        indices: Some of them, ascending.
    """
    runs, keys = pairs.origin_runs()[indices], pairs.key_numbers("key")[indices]
    order = np.lexsort((keys, runs))
    runs, keys = runs[order], keys[order]
    again = (runs[1:] == runs[:-1]) & (keys[1:] == keys[:-1])
    return np.delete(indices, order[1:][again])


def drops(pairs: PreparedPairs, train: Indices, held_out: Indices, names: Sequence[str]) -> dict[str, Indices]:
    """Return the pairs that a run leaves out, by the finding that they are left out for.

    A pair with several findings is under the first name. What a finding is does not depend on what another
    name leaves out.

    Args:
        pairs: All pairs.
        train: Those to be trained on.
        held_out: Those to be held out.
        names: The findings whose pairs are left out, of `DROPPABLE`.
    """
    left_out: dict[str, Indices] = {}
    gone: Indices = np.empty(0, np.int64)
    for name in dict.fromkeys(names):
        indices = find(_BY_NAME[name], pairs, train, held_out).indices
        left_out[name] = np.setdiff1d(indices, gone)
        gone = np.union1d(gone, indices)
    return left_out
