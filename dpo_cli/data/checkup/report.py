"""What the check of the data found, as plain values: the same that `report.json` holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.data.findings import Severity

EXAMPLES = 3
"""Examples of a finding, or of a reason for which rows were dropped, that are shown."""


@dataclass(frozen=True, slots=True)
class Example:
    """A pair with a finding, or a row that was dropped.

    Attributes:
        origin: Where it was read.
        other: Where the pair was read that it was found beside, or nothing.
        texts: Excerpts of prompt, chosen and rejected; empty where there was no tokenizer to read them with. Of a
            row: why it was dropped.
    """

    origin: str
    other: str
    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found, and how often.

    Attributes:
        name: As in `Check`.
        severity: As in `Check`.
        count: The pairs or rows with it; a pair that a source's weight repeats counts once.
        share: `count` per pair of the run, each counted once, or per row read.
        title: As in `Check`.
        meaning: As in `Check`.
        advice: As in `Check`.
        heuristic: As in `Check`.
        examples: The first of them.
    """

    name: str
    severity: Severity
    count: int
    share: float
    title: str
    meaning: str
    advice: str
    heuristic: bool
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class LengthBias:
    """What the lengths of the responses give away.

    Attributes:
        longer: Pairs whose chosen response has more tokens than the rejected one.
        equal: Pairs whose responses have equally many.
        shorter: Pairs whose chosen response has fewer.
        accuracy: How often preferring the longer response is right, equal ones half.
        interval: The accuracy's 95 % interval.
    """

    longer: int
    equal: int
    shorter: int
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Cut:
    """What a `data.max_length` would cut.

    Attributes:
        max_length: The most tokens of a pair.
        num_longer: Pairs that are longer, those among them that were dropped or cut as too long.
    """

    max_length: int
    num_longer: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the pairs are, in tokens.

    Attributes:
        bin_tokens: The width of a bin: bin i has lengths from i · width on.
        open_ended: Whether the last bin also has all longer ones.
        histograms: How many pairs are in each bin: of prompt, chosen, rejected, and the longer whole sequence.
        too_long: The same of the pairs that were dropped as too long; empty where there are none.
        plane_tokens: The width of a bin of `plane`.
        plane: How many pairs have a chosen and a rejected response of these bins: `(chosen, rejected, pairs)`.
        cuts: What some values of `data.max_length` would cut.
    """

    bin_tokens: int
    open_ended: bool
    histograms: Mapping[str, tuple[int, ...]]
    too_long: Mapping[str, tuple[int, ...]]
    plane_tokens: int
    plane: tuple[tuple[int, int, int], ...]
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Margins:
    """The margins in the data: by how much chosen is better.

    Attributes:
        used: Whether the loss uses them.
        pairs: Pairs that have one other than 0.
        smallest: The smallest of theirs.
        median: The median of theirs.
        largest: The largest of theirs.
    """

    used: bool
    pairs: int
    smallest: float
    median: float
    largest: float


@dataclass(frozen=True, slots=True)
class Boundary:
    """The template's tokens at the ends of prompts and responses.

    Attributes:
        bos: The token that begins a text, or nothing.
        starting_with_bos: Prompts that begin with it.
        starting_with_two: Prompts that begin with two of them.
        eos: The token that ends a text, or nothing.
        without_eos: Responses without it among their last tokens, of chosen and rejected.
        endings: How prompt, chosen and rejected end, the most frequent first: the last tokens, and how many pairs.
    """

    bos: str
    starting_with_bos: int
    starting_with_two: int
    eos: str
    without_eos: Mapping[str, int]
    endings: Mapping[str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True, slots=True)
class Report:
    """The state of a run's data.

    Attributes:
        read: What was found while rows were read, by setting (`data.train`, `data.eval`): the statistics of the
            prepared folders.
        num_train: Pairs that are trained on.
        num_held_out: Pairs that are held out.
        num_copies: Pairs among those trained on that are there because a source's weight repeats their row: they are
            counted once in all that follows.
        left_out: Pairs that `data.drop` leaves out, by the finding they are left out for.
        findings: What was found, the gravest first.
        not_found: What was looked for and not found.
        length_bias: What the lengths of the responses give away.
        lengths: How long the pairs are.
        margins: The margins in the data; None where no pair has one.
        boundary: The template's tokens at the ends; None where there was no tokenizer to name them.
    """

    read: Mapping[str, Mapping[str, Any]]
    num_train: int
    num_held_out: int
    num_copies: int
    left_out: Mapping[str, int]
    findings: tuple[Finding, ...]
    not_found: tuple[str, ...]
    length_bias: LengthBias
    lengths: Lengths
    margins: Margins | None
    boundary: Boundary | None

    @property
    def grave(self) -> list[Finding]:
        """The findings that `--strict` does not let pass: warnings and worse."""
        return [finding for finding in self.findings if finding.severity != "info"]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return dataclasses.asdict(self)
