"""Which operations this process has begun with other ranks, and which of them it waits for.

Torch's flight recorder sees every one, whoever begins it: a layer of a sharded model, the averaging of gradients, a
barrier. It counts them in the same way for gloo and NCCL, where the host is far ahead of the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

_RECORDERS: list[Callable[[bool, bool], str]] = [
    getattr(_distributed_c10d, name)
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    if hasattr(_distributed_c10d, name)
]
"""That of gloo, and that of NCCL where torch has it."""

ASIDE = "aside"
"""The description of a group in whose operations a thread may wait while the main thread goes on."""


@dataclass(frozen=True)
class Operation:
    """One that a rank has begun and that has not ended.

    Attributes:
        group: The name of its group of ranks.
        number: Counts the operations of the group, from 1.
        what: Describes it: `all_gather of [2080], operation 14 of mesh_shard`.
        ranks: Those of the group.
        aside: Whether the main thread may go on meanwhile.
    """

    group: str
    number: int
    what: str
    ranks: tuple[int, ...]
    aside: bool = False


@dataclass(frozen=True)
class Exchanges:
    """How far a rank is in what it exchanges with others.

    Attributes:
        begun: The number of the last operation that it has begun, by the names of groups.
        waits: The first that has not ended, of each group that has one.
    """

    begun: dict[str, int]
    waits: tuple[Operation, ...] = ()

    @classmethod
    def decoded(cls, values: dict[str, Any]) -> Exchanges:
        """Make it of what `dataclasses.asdict` and JSON made of it."""
        waits = (Operation(**{**wait, "ranks": tuple(wait["ranks"])}) for wait in values["waits"])
        return cls(values["begun"], tuple(waits))


def count_exchanges() -> int:
    """Return a number that is another whenever an operation was begun or has ended; it takes no time."""
    groups = [group for record in _records(whole=False) for group in record.get("pg_status", {}).values()]
    return sum(int(number) for group in groups for number in group.values())


def exchanges() -> Exchanges:
    """Look through the last thousands of operations, which takes a moment."""
    begun: dict[str, int] = {}
    waits: dict[str, Operation] = {}
    world = distributed_c10d._world
    members = {world.pg_names[group]: tuple(ranks) for group, ranks in world.pg_group_ranks.items()}
    for entry in (entry for record in _records(whole=True) for entry in record.get("entries", ())):
        (group, title), number = entry["process_group"], entry["collective_seq_id"]
        if entry["is_p2p"] or group not in members:
            continue
        begun[group] = max(number, begun.get(group, 0))
        if group not in waits and not (entry["retired"] or entry["state"] == "completed"):
            shapes = ", ".join(map(str, entry["input_sizes"]))
            what = entry["profiling_name"].partition(":")[2] + f" of {shapes}" * bool(shapes)
            waits[group] = Operation(
                group, number, f"{what}, operation {number} of {title}", members[group], title == ASIDE
            )
    return Exchanges(begun, tuple(waits.values()))


def _records(*, whole: bool) -> list[dict[str, Any]]:
    return [json.loads(record(whole, False)) for record in _RECORDERS]
