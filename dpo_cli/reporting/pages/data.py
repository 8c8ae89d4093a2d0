"""The check of the data as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpo_cli.data.checkup.report import EXAMPLES, Report
from dpo_cli.reporting.pages.plots import Plot, bars, histogram, plane
from dpo_cli.reporting.pages.rendering import render
from dpo_cli.reporting.tables import MarkedPair

_PART_NAMES = {
    "prompt": "Prompt",
    "chosen": "Chosen response",
    "rejected": "Rejected response",
    "longest": "Prompt and longer response",
}


def data_page(report: Report, pairs: Sequence[MarkedPair] = ()) -> str:
    """Return the page.

    Args:
        report: What was found.
        pairs: Pairs to show token by token.
    """
    severities = [finding.severity for finding in report.findings]
    return render(
        "data.html",
        report=report,
        pairs=pairs,
        severities={severity: severities.count(severity) for severity in ("error", "warning", "info")},
        examples=EXAMPLES,
        dropped={
            setting: bars("Dropped rows by reason", statistics["dropped"])
            for setting, statistics in report.read.items()
            if statistics["dropped"]
        },
        histograms=_histograms(report),
        plane=plane(report.lengths.plane, report.lengths.plane_tokens),
        num_too_long=sum(report.lengths.too_long.get("longest", ())),
    )


def _histograms(report: Report) -> Mapping[str, Plot]:
    """Draw the lengths of each part of the pairs."""
    lengths = report.lengths
    return {
        _PART_NAMES[part]: histogram(
            part, counts, lengths.bin_tokens, lengths.too_long.get(part, ()), open_ended=lengths.open_ended
        )
        for part, counts in lengths.histograms.items()
    }
