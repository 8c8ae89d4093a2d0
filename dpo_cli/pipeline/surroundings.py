"""What the processes of a run are: programs, settings and devices, compared as soon as they have found each other.

Where one differs, it is named, and in what: a run would hang, or train on something else than it says.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpo_cli.config import Config
from dpo_cli.errors import UserError, raise_all
from dpo_cli.reporting.environment import versions
from dpo_cli.system.launchers import named_ranks
from dpo_cli.training.exchange import exchanged

_MOST_NAMED = 5
"""Settings that an error names, of those that differ."""


@dataclass(frozen=True)
class Surroundings:
    """What a process runs as, and on.

    Attributes:
        host: The name of its machine.
        versions: Those of Python and packages, by name.
        settings: Its configuration, by dotted name.
        device: The kind of its device.
        card: Which one that is, of all machines; None: a CPU.
        local_size: How many processes its machine has, by the launcher; None: it does not say.
    """

    host: str
    versions: Mapping[str, str]
    settings: Mapping[str, str]
    device: str
    card: str | None
    local_size: str | None

    @classmethod
    def of_this(cls, config: Config, device: torch.device) -> Surroundings:
        """Describe this process."""
        card = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        settings = dict(_flat(config.model_dump(mode="json")))
        local_size = os.environ.get("LOCAL_WORLD_SIZE")
        return cls(socket.gethostname(), versions(), settings, device.type, card, local_size)


def check_surroundings(config: Config, device: torch.device, rank: int, num_ranks: int) -> None:
    """Compare what the processes of a run are, which have just found each other.

    Raises:
        UserError: They differ; an `ExceptionGroup` where they do in several ways.
    """
    if num_ranks > 1:
        found = json.dumps(asdict(Surroundings.of_this(config, device)))
        raise_all(differences([Surroundings(**json.loads(one)) for one in exchanged(found, rank, num_ranks)]))


def differences(everywhere: Sequence[Surroundings]) -> Iterator[UserError]:
    """Yield in what processes differ that must be alike.

    Args:
        everywhere: What each of them is, by rank.
    """
    hosts = [one.host for one in everywhere]
    versions = differing([one.versions for one in everywhere], hosts, "other versions")
    yield from errors_of(versions, "the installed packages", "install the same versions for every process")
    settings = differing([one.settings for one in everywhere], hosts, "another configuration")
    hint = "start every process with the same file, the same overrides, and the same configuration of the launcher"
    yield from errors_of(settings, "the configuration", hint)
    devices = differing([{"device": one.device} for one in everywhere], hosts, "another kind of device")
    hint = "show every process a GPU, or none: CUDA_VISIBLE_DEVICES, ACCELERATE_USE_CPU"
    yield from errors_of(devices, "the devices", hint)
    yield from _shared_cards(everywhere)
    if everywhere[0].settings["training.sharding"] == json.dumps("hybrid"):
        sizes = differing(
            [{"LOCAL_WORLD_SIZE": str(one.local_size)} for one in everywhere], hosts, "another number of processes"
        )
        hint = "start the same number of processes on every machine"
        yield from errors_of(sizes, "`training.sharding: hybrid`", hint)


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting under its dotted name."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", json.dumps(value)


def differing(everywhere: Sequence[Mapping[str, str]], hosts: Sequence[str], what: str) -> Iterator[str]:
    """Yield, for every set of processes that differ from rank 0 in the same way, who they are and in what."""
    ways: dict[str, list[int]] = {}
    for rank, one in enumerate(everywhere):
        names = [name for name in sorted(one.keys() | everywhere[0].keys()) if one.get(name) != everywhere[0].get(name)]
        shown = [f"{name} {one.get(name)}, not {everywhere[0].get(name)}" for name in names[:_MOST_NAMED]]
        more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
        if names:
            ways.setdefault("; ".join([*shown, *more]), []).append(rank)
    for way, ranks in ways.items():
        yield f"{ranks_have(ranks, hosts)} {what} than rank 0: {way}"


def errors_of(found: Iterator[str], where: str, hint: str) -> Iterator[UserError]:
    """Yield an error for everything that was found."""
    for what in found:
        yield UserError(what, where, hint)


def ranks_have(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name processes and their machines, with the verb: `rank 1 (on node7) has`."""
    return f"{named_ranks(ranks, hosts)} {'have' if len(ranks) > 1 else 'has'}"


def _shared_cards(everywhere: Sequence[Surroundings]) -> Iterator[UserError]:
    """Yield which processes compute on the same card."""
    ranks: dict[str, list[int]] = {}
    for rank, one in enumerate(everywhere):
        if one.card:
            ranks.setdefault(one.card, []).append(rank)
    for shared in ranks.values():
        if len(shared) > 1:
            numbers = " and ".join(map(str, shared))
            what = f"ranks {numbers} compute on the same GPU of {everywhere[shared[0]].host}"
            hint = "start as many processes on a machine as CUDA_VISIBLE_DEVICES shows GPUs, with LOCAL_RANK from 0"
            yield UserError(what, "the devices", hint)
