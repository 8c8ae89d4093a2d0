"""The keys that each piece of a prefix tree sees, gathered one behind the other for one call of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_cli.modeling.tree import Stretch


class GatheredKeys(NamedTuple):
    """What a kernel for sequences of different lengths reads of a row in S pieces.

    The last query of a piece sees its last key, and every query as many keys fewer as it stands before it.

    Attributes:
        keys: The places in the row of all keys, piece after piece.
        query_starts: `[S + 1]`, where the queries of each piece begin; they are the row as it is.
        key_starts: `[S + 1]`, where the keys of each piece begin.
    """

    keys: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    key_starts: NDArray[np.int32]


def gathered_keys(stretches: Sequence[Stretch], window: int | None) -> GatheredKeys:
    """Return the keys of each piece that one of its queries sees."""
    rows = [np.arange(stretch.start, stretch.stop) for stretch in stretches]
    keys = [
        np.concatenate([rows[i] for i in (*stretch.path, place)])[-num_keys(stretch, window) :]
        for place, stretch in enumerate(stretches)
    ]
    starts = (np.cumsum([0, *map(len, parts)]).astype(np.int32) for parts in (rows, keys))
    return GatheredKeys(np.concatenate(keys).astype(np.int32), *starts)


def num_keys(stretch: Stretch, window: int | None) -> int:
    """Return how many keys the queries of a piece see: those of its first query and the piece itself."""
    return stretch.end if window is None else min(stretch.end, len(stretch) + window - 1)
