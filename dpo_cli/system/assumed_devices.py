"""Devices that are not here: what `--assume-devices` says."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_cli.errors import UserError
from dpo_cli.system.text import several

_UNITS = {"GB": 10**9, "GiB": 2**30}
_PATTERN = re.compile(r"(?:(?:(\d+)x)?(\d+)x)?(\d+(?:\.\d+)?)(GB|GiB)")
_MOST = 100_000


@dataclass(frozen=True)
class AssumedDevices:
    """GPUs with the same memory each, one process on each.

    Attributes:
        machines: How many machines there are.
        per_machine: How many GPUs each has.
        memory: What is free on each, in bytes.
    """

    machines: int
    per_machine: int
    memory: int

    @property
    def count(self) -> int:
        """How many GPUs there are."""
        return self.machines * self.per_machine

    def __str__(self) -> str:
        """Say how many of them there are, where more than one machine has them."""
        gpus = several(self.count, "GPU")
        return f"{gpus} on {self.machines} machines" if self.machines > 1 else gpus


def assumed_devices(text: str) -> AssumedDevices:
    """Read devices as `80GB`, `8x80GB` or, with the number of machines, `2x8x80GB`.

    Raises:
        UserError: It says something else, or devices of no memory.
    """
    found = _PATTERN.fullmatch(text.replace(" ", ""))
    machines, per_machine = (int(number or 1) for number in found.groups()[:2]) if found else (0, 0)
    memory = int(float(found[3]) * _UNITS[found[4]]) if found else 0
    if not (0 < machines * per_machine <= _MOST and memory > 0):
        hint = "write the number of GPUs and the memory of each, as in `8x80GB`; of 2 machines, `2x8x80GB`"
        raise UserError(f"`{text}` are no devices", f"--assume-devices {text}", hint)
    return AssumedDevices(machines, per_machine, memory)
