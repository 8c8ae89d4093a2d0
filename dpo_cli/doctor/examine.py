"""Make the checks in their order, show what they find as a table, and write it as JSON."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

import dpo_cli
from dpo_cli.doctor.exactness import check_attention, check_logps, first_line
from dpo_cli.doctor.findings import CHECKS, Finding, anything_wrong
from dpo_cli.doctor.machine import check_device, check_libraries
from dpo_cli.doctor.resuming import check_resume
from dpo_cli.doctor.speed import check_products
from dpo_cli.modeling.allocator import return_freed_memory
from dpo_cli.modeling.determinism import deterministic_kernels
from dpo_cli.reporting.console import STANDARD_OUTPUT, Console
from dpo_cli.reporting.json_file import write_json
from dpo_cli.reporting.safe_text import visible

_MAKE: Mapping[str, Callable[[torch.device], Iterator[Finding]]] = {
    "device": check_device,
    "libraries": check_libraries,
    "attention": check_attention,
    "logps": check_logps,
    "products": check_products,
    "resume": check_resume,
}
_STYLES = {"ok": "green", "not here": "dim", "wrong": "bold red"}


def examine(console: Console, checks: Sequence[str], json_file: Path | None) -> list[Finding]:
    """Make some checks of this machine, and show or write what they find.

    Args:
        console: What a person sees.
        checks: Which of `CHECKS`.
        json_file: Where to write the findings as JSON; `-`: standard output, in place of the table; or None.

    Raises:
        UserError: The file cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        return_freed_memory()
    findings: list[Finding] = []
    with deterministic_kernels(True):
        for check in checks:
            console.notice(f"checking {check}: {CHECKS[check]} …")
            findings += _made(check, device)
    if json_file == STANDARD_OUTPUT:
        console.result(json.dumps(as_json(findings, device), indent=1))
        return findings
    console.result(findings_table(findings))
    console.result(_summary(findings))
    if json_file:
        write_json(json_file, as_json(findings, device), "writing the findings")
        console.notice(f"findings written: {json_file}")
    return findings


def _made(check: str, device: torch.device) -> list[Finding]:
    """Make one check; what breaks it is a finding too, so that the others are made."""
    found: list[Finding] = []
    try:
        found.extend(_MAKE[check](device))
    except Exception as error:
        hint = "report this line, with the versions above"
        found.append(Finding(check, check, "wrong", f"the check broke: {first_line(error)}", hint))
    return found


def findings_table(findings: Sequence[Finding]) -> Table:
    """Show a line for each finding, and below it what to do, where there is something."""
    table = Table(box=None, pad_edge=False)
    for title in ("check", "of", "result", "found"):
        table.add_column(title, no_wrap=title != "found", overflow="fold")
    before = ""
    for finding in findings:
        first, before = finding.check if finding.check != before else "", finding.check
        detail = Text(visible(finding.detail))
        if finding.hint:
            detail.append(f"\nhint: {visible(finding.hint)}", style="" if finding.state == "wrong" else "dim")
        table.add_row(first, visible(finding.name), Text(finding.state, style=_STYLES[finding.state]), detail)
    return table


def _summary(findings: Sequence[Finding]) -> str:
    wrong = sum(finding.state == "wrong" for finding in findings)
    absent = sum(finding.state == "not here" for finding in findings)
    skipped = f"; {absent} not here, and not checked" if absent else ""
    return f"\n{'nothing is wrong' if not wrong else f'{wrong} wrong'}{skipped}"


def as_json(findings: Sequence[Finding], device: torch.device) -> dict[str, Any]:
    """Return what was found as plain values."""
    return {
        "dpo": dpo_cli.__version__,
        "date": datetime.datetime.fromtimestamp(time.time(), datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ok": not anything_wrong(findings),
        "findings": [asdict(finding) for finding in findings],
    }
