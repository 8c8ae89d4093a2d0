"""The check of a run's data: everything that is found in the prepared pairs and their split, as a report.

Nothing is tokenized here. Pairs are looked at by columns: their digests, their lengths, and what was found of them
while they were prepared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dpo_cli.data.checkup.comparisons import PAIR_CHECKS, Indices
from dpo_cli.data.checkup.data_checks import DATA_CHECKS, Counted, Examined
from dpo_cli.data.checkup.excerpts import Excerpts
from dpo_cli.data.checkup.measures import Statistics, boundary, length_bias, lengths, margins
from dpo_cli.data.checkup.report import Finding, Report
from dpo_cli.data.checkup.selection import find, without_copies
from dpo_cli.data.findings import Check
from dpo_cli.data.pairs.text_checks import TextCheck
from dpo_cli.data.prepared.folder import PreparedPairs

CHECKS: tuple[Check, ...] = (*PAIR_CHECKS, *DATA_CHECKS)
"""All that is looked for."""

_GRAVE_FIRST = ("error", "warning", "info").index


def examine(
    pairs: PreparedPairs,
    train: Indices,
    held_out: Indices,
    *,
    max_length: int,
    read: Mapping[str, Statistics] | None = None,
    left_out: Mapping[str, int] | None = None,
    uses_margins: bool = False,
    tokenizer: Any = None,
    ends: frozenset[int] | None = None,
) -> Report:
    """Report on the data of a run.

    Args:
        pairs: All pairs.
        train: Those that are trained on.
        held_out: Those that are held out.
        max_length: The length rule's, in tokens.
        read: What was found while rows were read, by setting; None: what the manifest of the pairs says.
        left_out: How many pairs were left out before, by the finding they were left out for.
        uses_margins: Whether the loss uses the margins in the data.
        tokenizer: Reads excerpts out; without one there are none.
        ends: The tokens at which generation ends; None: that is not looked at.
    """
    read = read or {"data.train": pairs.manifest["statistics"]}
    trials = [without_copies(pairs, side) for side in (train, held_out)]
    indices = np.sort(np.concatenate(trials))
    bias, excerpts = length_bias(pairs, indices), Excerpts(pairs, tokenizer)
    data = Examined(pairs, indices, read, max_length, bias, excerpts, tokenizer, ends)
    looked_for = [
        *_of_pairs(pairs, train, held_out, indices, excerpts),
        *(counted for check in DATA_CHECKS if (counted := check.count(check, data))),
    ]
    findings = [_finding(one) for one in looked_for if one.count]
    return Report(
        read=read,
        num_train=len(train),
        num_held_out=len(held_out),
        num_copies=len(train) - len(trials[0]),
        left_out=left_out or {},
        findings=tuple(sorted(findings, key=lambda finding: _GRAVE_FIRST(finding.severity))),
        not_found=tuple(one.check.name for one in looked_for if not one.count),
        length_bias=bias,
        lengths=lengths(pairs, indices, read.values(), max_length),
        margins=margins(pairs, indices, used=uses_margins),
        boundary=boundary(pairs, indices, tokenizer) if tokenizer else None,
    )


def _finding(counted: Counted) -> Finding:
    check, share = counted.check, counted.count / counted.total
    about = check.title, check.meaning, check.advice, check.heuristic
    return Finding(check.name, check.severity, counted.count, share, *about, counted.examples)


def _of_pairs(
    pairs: PreparedPairs, train: Indices, held_out: Indices, indices: Indices, excerpts: Excerpts
) -> Iterator[Counted]:
    """Yield what shows in the pairs, by themselves and beside each other; those that are no copies count."""
    for check in PAIR_CHECKS:
        found = find(check, pairs, train, held_out).among(indices)
        place = check.place if isinstance(check, TextCheck) else None
        yield Counted(check, len(found.indices), len(indices), excerpts.examples(found, place))
