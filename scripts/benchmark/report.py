"""The report of what the benchmark measured: a Markdown page, a plot, the raw figures."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PACKAGES = {"dpo": "dpo-cli", "trl": "trl", "torch": "torch", "transformers": "transformers"}
"""Those whose versions belong to the results, and what they are called where they are installed."""

ADAPTER_PACKAGES = {"peft": "peft"}
"""Those that belong to the results of adapters as well."""

TOLERANCES = {"float32": 2e-4, "bfloat16": 0.05}
"""By how much losses may differ in a precision; bfloat16 alone moves a margin of β = 0.1 by some hundredths."""
PAGE, PLOT, RAW = "README.md", "benchmark.png", "results.json"
BLUE, GREY, DARK = "#2f6db5", "#b4b4b4", "#222222"


class Disagreement(Exception):
    """Two runs of the same work did not log the same losses."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(_Record):
    """One run of one program, in a process of its own."""

    training_seconds: float = Field(gt=0)
    """From the start of the reference pass, or of TRL's `train()`, to the end of the last step, pauses left out."""
    command_seconds: float
    """The whole process, pauses left out: imports, loading, tokenizing, training, saving."""
    peak_bytes: int
    """Of the process; where a GPU computes, what was reserved of it."""
    losses: list[float]
    gflops_meanwhile: list[float]
    """How fast the machine was in each pause of the training; none if it was over before the first."""


class Case(_Record):
    """One workload at one number of epochs; run i of ours belongs to run i of theirs."""

    workload: str
    source: str
    epochs: int = Field(gt=0)
    pairs: int = Field(gt=0)
    pairs_per_step: int = Field(gt=0)
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    forward_flops: float | None
    """One forward pass over all pairs, or None where the model's arithmetic is not known."""
    adapter: str | None = None
    """What trains beside a base that stays as it is; None: all weights train."""
    recomputed: bool = False
    """Whether both sides compute activations again in the backward pass."""
    precomputed: bool = False
    """Whether TRL asks the reference before step 1."""
    adapter_flops: float = 0.0
    """What the adapter adds to one forward pass over all pairs."""
    ours: list[Run] = Field(min_length=1)
    theirs: list[Run] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_pairs_of_runs(self) -> Self:
        if len(self.ours) != len(self.theirs):
            raise ValueError("each run of ours belongs to one of theirs")
        return self

    def is_work_of(self, other: Case) -> bool:
        """Tell whether both ran the same work."""
        runs = {"ours", "theirs"}
        return self.model_dump(exclude=runs) == other.model_dump(exclude=runs)

    @property
    def necessary_flops(self) -> float | None:
        """The reference is one forward pass; a step's forward and backward cost as much as three.

        Of a base that stays as it is, two: no weight of it has a gradient.
        """
        if self.forward_flops is None:
            return None
        passes = 2 if self.adapter else 3
        return (1 + passes * self.epochs) * self.forward_flops + 3 * self.epochs * self.adapter_flops

    @property
    def trained(self) -> str:
        """Workload, adapter, and how both sides run."""
        marks = ("recomputed" if self.recomputed else "", "reference precomputed" if self.precomputed else "")
        return ", ".join(filter(None, (self.workload, self.adapter, *marks)))

    @property
    def title(self) -> str:
        """Workload, adapter and epochs, as tables name them."""
        return f"{self.trained}, {_counted(self.epochs, 'epoch')}"

    @property
    def ratios(self) -> list[float]:
        """How many times as many pairs per second ours does, run by run."""
        return [b.training_seconds / a.training_seconds for a, b in zip(self.ours, self.theirs, strict=True)]

    def speeds(self, runs: list[Run]) -> list[float]:
        """Return pairs per second of each run."""
        return [self.pairs * self.epochs / run.training_seconds for run in runs]


class Machine(_Record):
    """What it ran on, without anything that names it."""

    cpu: str
    cpus: int
    threads: int
    memory_gb: float
    gpu: str | None = None


class Results(_Record):
    """Everything that page and plot are made of."""

    date: datetime.date
    model: str
    dtype: str = "float32"
    machine: Machine
    versions: dict[str, str]
    not_counted: str | None
    cases: list[Case] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_versions(self) -> Self:
        if not PACKAGES.keys() <= self.versions.keys():
            raise ValueError(f"the versions of {', '.join(PACKAGES)} belong to it")
        return self


def joined(parts: Sequence[Results]) -> Results:
    """Put together what was run in parts: runs of the same work become one case, the newest date counts.

    Raises:
        Disagreement: Two parts differ in what all cases of one page have in common, or a run is in both.
    """
    first, cases = parts[0], list[Case]()
    for part in parts:
        for name in ("model", "dtype", "machine", "versions", "not_counted"):
            ours, theirs = (str(getattr(results, name)) for results in (first, part))
            if ours != theirs:
                raise Disagreement(f"these results cannot be on one page; {name}: {ours} here, {theirs} there")
        for case in part.cases:
            place = next((i for i, other in enumerate(cases) if case.is_work_of(other)), len(cases))
            known = cases[place : place + 1]
            if any(run in one.ours + one.theirs for one in known for run in case.ours + case.theirs):
                raise Disagreement(f"the same run of {case.workload} pairs is in two of these results")
            runs = {side: [run for one in (*known, case) for run in getattr(one, side)] for side in ("ours", "theirs")}
            cases[place : place + 1] = [case.model_copy(update=runs)]
    return first.model_copy(update={"date": max(part.date for part in parts), "cases": cases})


def check_losses(ours: Run, theirs: Run, what: str, tolerance: float = TOLERANCES["float32"]) -> float:
    """Return the largest difference between the losses of two runs.

    Raises:
        Disagreement: It is larger than the tolerance, or one of the runs took more steps.
    """
    if len(ours.losses) != len(theirs.losses) or not ours.losses:
        raise Disagreement(f"{what}: dpo logged {len(ours.losses)} losses, TRL {len(theirs.losses)}")
    differences = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    for step, difference in enumerate(differences, 1):
        # Not `>`: that would let a loss pass that is not a number.
        if not difference <= tolerance:
            losses = f"dpo {ours.losses[step - 1]:.6f}, TRL {theirs.losses[step - 1]:.6f}"
            raise Disagreement(f"{what}: the losses of step {step} differ by more than {tolerance:.0e}: {losses}")
    return max(differences)


def largest_difference(results: Results) -> float:
    """Return the largest difference between the losses of both sides, over all runs and steps.

    Raises:
        Disagreement: See `check_losses`.
    """
    return max(
        check_losses(ours, theirs, f"{case.title}, run {number}", TOLERANCES[results.dtype])
        for case in results.cases
        for number, (ours, theirs) in enumerate(zip(case.ours, case.theirs, strict=True), 1)
    )


def write_report(results: Results, folder: Path, *, raw_only: bool = False) -> None:
    """Write the page, the plot and the raw figures into a folder; or these alone.

    Raises:
        Disagreement: The losses of both sides differ; nothing is written then.
    """
    text = page(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RAW).write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if raw_only:
        return
    (folder / PAGE).write_text(text, encoding="utf-8")
    plot(results, folder / PLOT)


def page(results: Results) -> str:
    """Return the Markdown page: the table, how to read it, what it was measured on.

    Raises:
        Disagreement: The losses of both sides differ.
    """
    difference = largest_difference(results)
    machine, peer = results.machine, f"TRL {results.versions['trl']}"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [
        f"# dpo beside {peer}",
        "",
        "This page is written by `make bench`; the figures of every run are in `results.json`.",
        "",
        *table(results),
        "",
        f"![Pairs per second and peak memory of dpo and {peer}]({PLOT})",
        "",
        *_workloads(results),
        "",
        f"**Same losses.** In every run the losses of both sides agree at every step; the largest difference is "
        f"{difference:.0e}, and the benchmark fails above {TOLERANCES[results.dtype]:.0e}.",
        "",
        *_notes(results),
        "",
        f"**Measured** on {results.date} on {f'one {machine.gpu}; ' if machine.gpu else ''}{machine.cpu}, "
        f"{machine.cpus} logical CPUs, "
        f"{_counted(machine.threads, 'thread')}, "
        f"{machine.memory_gb:.0f} GB of memory; {results.model} in {results.dtype}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def table(results: Results) -> list[str]:
    """Return the rows of the Markdown table: for each case ours, then theirs."""
    lines = [
        "| work | trainer | pairs/s | ratio | peak memory | share of matrix-product speed | whole command |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in results.cases:
        sides = (("dpo", case.ours, f"**{_spread(case.ratios, '×')}**"), ("TRL", case.theirs, ""))
        for name, runs, ratio in sides:
            shares = _shares(case, runs)
            cells = (
                case.title if name == "dpo" else "",
                name,
                _spread(case.speeds(runs)),
                ratio,
                f"{statistics.median(run.peak_bytes for run in runs) / 1e9:.1f} GB",
                _spread([100 * share for share in shares], " %") if shares else "–",
                f"{statistics.median(run.command_seconds for run in runs):.0f} s",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shares(case: Case, runs: list[Run]) -> list[float]:
    """Return the necessary arithmetic of each run as a share of what the machine could do in its time."""
    flops = case.necessary_flops
    if flops is None:
        return []
    measured = [run for run in runs if run.gflops_meanwhile]
    return [flops / run.training_seconds / (statistics.fmean(run.gflops_meanwhile) * 1e9) for run in measured]


def _workloads(results: Results) -> list[str]:
    """Return a table of what the work is."""
    lines = [
        "| work | pairs | pairs a step | tokens of a pair: prompt + chosen + rejected | necessary arithmetic |",
        "|---|---|---|---|---|",
    ]
    for case in results.cases:
        parts = (case.prompt_tokens, case.chosen_tokens, case.rejected_tokens)
        tokens = " + ".join(f"{part / case.pairs:.0f}" for part in parts)
        flops = "–" if case.necessary_flops is None else f"{case.necessary_flops / 1e9:,.0f} GFLOP"
        name = f"{case.title} ({case.source})"
        lines.append(f"| {name} | {case.pairs} | {case.pairs_per_step} | {tokens} | {flops} |")
    return lines


def _notes(results: Results) -> list[str]:
    """Return how the figures are to be read."""
    most = max(len(case.ours) for case in results.cases)
    runs = {len(case.ours) for case in results.cases}
    times = _counted(most, "time") if len(runs) == 1 else f"{min(runs)} to {most} times"
    speeds = [speed for case in results.cases for run in case.ours + case.theirs for speed in run.gflops_meanwhile]
    spread = f" ({min(speeds):.0f} – {max(speeds):.0f} GFLOP/s)" if speeds else ""
    notes = [
        f"- Both programs ran in turn, {times} each, on the same model, pairs, order, "
        "steps, data type and threads; every run is a process of its own. TRL has its defaults otherwise, gradient "
        f"checkpointing off{' unless the work says recomputed' * any(case.recomputed for case in results.cases)}.",
        "- **pairs/s** is pairs × epochs by the time of training: for dpo from the beginning of the reference pass to "
        "the end of the last step, for TRL the call of `train()`, which asks the reference in every step. Median "
        "(least – most).",
        "- **ratio** compares run i of dpo with run i of TRL. Median (least – most).",
        f"- **peak memory** is {_memory(results.machine)}. Median.",
        "- **whole command** is imports, loading, tokenizing, training and saving. Median.",
    ]
    if any(case.adapter for case in results.cases):
        notes.append(
            "- **LoRA** is PEFT's on every linear layer but the vocabulary projection, without dropout, beside a "
            "frozen base; both programs begin with the same adapter weights. TRL is given it as `peft_config` and asks "
            "the same model with the adapter off for the reference."
        )
    if results.not_counted:
        return [*notes, f"- The arithmetic of this model is not counted: {results.not_counted}."]
    return [
        *notes,
        "- **necessary arithmetic** is (1 + 3 · epochs) forward passes over the shared tokens, the prompt of a pair "
        "once: 2 operations for each weight of the body's linear layers and token; 4 · heads · head size for each "
        "layer, query and key that it attends to; 2 · vocabulary · hidden size for each response token. With an "
        "adapter it is (1 + 2 · epochs), since a frozen base has no gradients of weights, and 3 · epochs of what the "
        "adapter adds to a forward pass.",
        "- **share of matrix-product speed**: necessary arithmetic by the time of training, as a share of the speed of "
        f"`torch.matmul` on {_products(results.machine)}{spread}. Median (least – most).",
    ]


def _memory(machine: Machine) -> str:
    return "the most that torch reserved of the GPU" if machine.gpu else "the largest resident memory of the process"


def _products(machine: Machine) -> str:
    """Say how the machine's speed was measured."""
    if machine.gpu:
        return "bfloat16 matrices of 8192 × 8192, before and after each run, the best of 8 products each time"
    return (
        "float32 matrices of 2048 × 2048, same threads. For that a run is held after 5 seconds of its training and "
        "then every 10, which is not counted as its time, and the best of 8 products is taken: the speed is the mean "
        "of all pauses of a run"
    )


def _computed_by(machine: Machine) -> str:
    return machine.gpu or _counted(machine.threads, "thread")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _spread(values: list[float], unit: str = "") -> str:
    """Write median and range, with as many digits as the median needs for three figures."""
    middle = statistics.median(values)
    digits = 3 if middle < 1 else 2 if middle < 10 else 1
    least, most = (f"{value:.{digits}f}{unit}" for value in (min(values), max(values)))
    return f"{middle:.{digits}f}{unit}" + (f" ({least} – {most})" if len(values) > 1 else "")


def plot(results: Results, file: Path) -> None:
    """Draw pairs per second and peak memory of each workload: bars for medians, dots for runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    workloads = list(dict.fromkeys(case.trained for case in results.cases))
    figure, rows = pyplot.subplots(len(workloads), 2, figsize=(8, 3.1 * len(workloads)), squeeze=False)
    for (left, right), workload in zip(rows, workloads, strict=True):
        cases = [case for case in results.cases if case.trained == workload]
        first = cases[0]
        tokens = (first.prompt_tokens + first.chosen_tokens + first.rejected_tokens) / first.pairs
        labels = [_counted(case.epochs, "epoch") for case in cases]
        left.set_title(f"{workload}: pairs per second", loc="left")
        speeds = [(case.speeds(case.ours), case.speeds(case.theirs)) for case in cases]
        _bars(left, labels, speeds)
        right.set_title(f"{workload}: peak memory in GB", loc="left")
        sides = [(case.ours, case.theirs) for case in cases]
        _bars(right, labels, [tuple([run.peak_bytes / 1e9 for run in runs] for runs in side) for side in sides])
        left.set_xlabel(f"{first.pairs} pairs of {tokens:.0f} tokens, {first.pairs_per_step} a step", color="#666666")
    handles, names = rows[0][0].get_legend_handles_labels()
    names = [name.replace("TRL", f"TRL {results.versions['trl']}") for name in names]
    figure.legend(handles, names, loc="upper right", ncols=2, frameon=False)
    figure.suptitle(
        f"{results.model}, {results.dtype}, {_computed_by(results.machine)}", x=0.02, ha="left", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _bars(axes: Any, labels: list[str], cases: list[Any]) -> None:
    """Draw for each case ours beside theirs, with a dot for each run and the median above."""
    width, highest = 0.36, max(value for sides in cases for values in sides for value in values)
    for side, (name, colour) in enumerate((("dpo", BLUE), ("TRL", GREY))):
        for number, sides in enumerate(cases):
            values, centre = sides[side], number + (side - 0.5) * (width + 0.03)
            middle = statistics.median(values)
            axes.bar(centre, middle, width, color=colour, label=name if number == 0 else None)
            places = [centre + (run - (len(values) - 1) / 2) * 0.07 for run in range(len(values))]
            axes.plot(places, values, "o", color=DARK, markersize=3)
            axes.text(centre, max(values) + 0.03 * highest, f"{middle:.3g}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 1.18 * highest)
    axes.tick_params(axis="x", length=0)
