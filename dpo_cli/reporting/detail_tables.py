"""What `dpo eval` tells beside the figures, as tables: accuracies of baselines and parts, calibration, distance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import ConsoleRenderable, Group
from rich.table import Table
from rich.text import Text

from dpo_cli.evaluation.figures import shown_interval
from dpo_cli.reporting.tables import Cells, percent
from dpo_cli.system.text import several

_BASELINES = {
    "longer": "the longer response",
    "shorter": "the shorter response",
    "reference_sum": "the likelier one for the reference (sum)",
    "reference_mean": "  (mean per token)",
    "chance": "chance",
}
"""The rows of the baselines by their keys."""

_DISTANCES = {"log_ratio": "log-ratio", "forward_k3": "forward k3", "reverse_k3": "reverse k3"}
"""The columns of the distance from the reference by their keys."""


def detail_blocks(found: Mapping[str, Any]) -> Iterator[ConsoleRenderable]:
    """Yield what is shown of the `details` of all pairs, one block after the other."""
    yield _accuracies(found)
    rest: list[ConsoleRenderable] = []
    if "missing" not in found["from_reference"]:
        rest.append(_distances(found["from_reference"]))
    lines = [] if "missing" in found["calibration"] else _calibration(found["calibration"])
    yield Group(*rest, *map(Text, [*lines, *_remarks(found)]))


def _accuracies(found: Mapping[str, Any]) -> Table:
    """Show every share of the pairs whose chosen response is ahead: of baselines, and the model's on parts of them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("on the same pairs", overflow="fold")
    for name in ("pairs", "accuracy", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for title, one in _shares(found):
        bounds = shown_interval(one["interval"]) if "interval" in one else ""
        table.add_row(title, f"{one['pairs']:,}" if "pairs" in one else "", percent(one["accuracy"]), bounds)
    return table


def _shares(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of the table of accuracies."""
    baselines = found["baselines"]
    by_length = _better_by_length(baselines)
    for name, title in _BASELINES.items():
        if name in baselines and name not in {"longer", "shorter"} - {by_length}:
            yield title, baselines[name]
    if "missing" not in found["length_controlled"]:
        yield "the model, length-controlled", found["length_controlled"]
    for part in found["by_margin"]:
        yield f"its reward margin {_range('±{:.3g}', part['from'], part['to'])}", part
    for part in found["by_length"]:
        yield _length_title(part), part


def _better_by_length(baselines: Mapping[str, Any]) -> str:
    """Return which response is chosen more often, `longer` or `shorter`: that is the baseline to be better than."""
    return max(("longer", "shorter"), key=lambda name: float(baselines[name]["accuracy"]))


def _length_title(part: Mapping[str, Any]) -> str:
    """Name the pairs whose chosen response is so many tokens longer or shorter."""
    near, far = sorted((abs(round(part["from"])), abs(round(part["to"]))))
    if not far:
        return "chosen as long as rejected"
    which = "longer" if part["to"] > 0 else "shorter"
    return f"chosen {which} by {f'{near:,} to ' * (near != far)}{several(far, 'token')}"


def _range(shown: str, least: float, largest: float) -> str:
    """Write two numbers, or the one that both are."""
    bounds = dict.fromkeys((shown.format(least), shown.format(largest)))
    return " to ".join(bounds)


def _distances(from_reference: Mapping[str, Any]) -> Table:
    """Show how far the model is from the reference."""
    table = Table(box=None, pad_edge=False)
    table.add_column("from the reference, nats a token", overflow="fold")
    for title in _DISTANCES.values():
        table.add_column(title, justify="right", no_wrap=True)
    for side, numbers in from_reference.items():
        table.add_row(f"on {side} responses", *(f"{numbers[name]:.4f}" for name in _DISTANCES))
    return table


def _calibration(found: Mapping[str, Any]) -> list[str]:
    """Write in two lines how sure σ(βΔ) is, and how far that is from how often it is right."""
    shares = (percent(found[name]) for name in ("confidence", "error", "error_by_chance"))
    return [
        "σ(βΔ) is {} sure on average; calibration error {} (by chance {})".format(*shares),
        f"Brier score {found['brier_score']:.4f} (of a coin 0.2500), log score {found['log_score']:.4f} (0.6931)",
    ]


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield why some details are missing."""
    titles = {"length_controlled": "no length-controlled accuracy", "calibration": "no calibration"}
    for name, title in titles.items():
        if reason := found[name].get("missing"):
            yield f"{title}: {reason}"
    if base := found["baselines"].get("base"):
        yield f"the base model: {base['missing']}"


def _share_of(*keys: str) -> Any:
    """Return what writes the accuracy under some keys, or a dash where there is none."""

    def cell(figures: Mapping[str, Any]) -> str:
        found: Any = figures
        for key in keys:
            found = found.get(key, {})
        return percent(found["accuracy"]) if "accuracy" in found else "–"

    return cell


GROUP_CELLS: Cells = {
    "longer response": _share_of("baselines", "longer"),
    "shorter": _share_of("baselines", "shorter"),
    "reference (sum)": _share_of("baselines", "reference_sum"),
    "length-controlled": _share_of("length_controlled"),
}
"""The columns of a table of groups for what is beside their figures."""
