"""Draw every pairwise loss and its slope against the reward margin, docs/losses.png; `make plots` runs it.

docs/losses.md explains the picture.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from write_losses_page import kind, members

from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.responses import Responses
from dpo_cli.preference.losses import Loss
from dpo_cli.preference.losses.base import StepInfo

PICTURE = Path(__file__).parent.parent / "docs" / "losses.png"
MARGINS = [step / 20 for step in range(-80, 81)]
BETA_DRAWN = {"orpo": 1.0, "cpo": 1.0}
"""At 0.1 their preference term is invisible beside the likelihood."""
TIMES_BETA_SQUARED = ("ipo", "sppo")
WITHOUT_MARGIN = ("sft",)
START = -2.5
"""Where log-probabilities begin for losses without a reference; they stay below 0 at every margin."""
LINES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
WIDTH_PIXELS, DPI = 1600, 100

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""A loss and its slope at each of `MARGINS`."""


def curve(loss: Any) -> Curve:
    """Return a loss of one pair, and its slope by autograd, along c = Δ/2 and r = −Δ/2."""
    points = [point(loss, margin) for margin in MARGINS]
    return tuple(value for value, _ in points), tuple(slope for _, slope in points)


def point(loss: Any, margin: float) -> tuple[float, float]:
    """Return a loss and its slope at one reward margin."""
    x = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    half, start = x / (2 * loss.beta), 0.0 if loss.needs_reference else START
    policy = SequenceLogps(torch.stack([start + half, start - half]), Responses.of((1, 1)))
    reference = SequenceLogps(torch.zeros(2, dtype=torch.float64), Responses.of((1, 1)))
    value = loss(policy, reference, StepInfo(1, 1)).losses.sum()
    if loss.type in TIMES_BETA_SQUARED:
        value = value * loss.beta**2
    (slope,) = torch.autograd.grad(value, x)
    return value.item(), slope.item()


def curves() -> dict[str, Curve]:
    """Return every curve by its label; losses with equal curves share one."""
    found: dict[Curve, list[str]] = {}
    for model in members(Loss):
        name = kind(model)
        if name not in WITHOUT_MARGIN:
            loss = model(beta=BETA_DRAWN[name]) if name in BETA_DRAWN else model()
            values, slopes = curve(loss)
            rounded = tuple(round(value, 9) for value in values), tuple(round(slope, 9) for slope in slopes)
            found.setdefault(rounded, []).append(label(loss))
    return {", ".join(names): values for values, names in found.items()}


def label(loss: Any) -> str:
    """Return the name of a loss, with what is not its default."""
    if loss.type in TIMES_BETA_SQUARED:
        return f"{loss.type} · β²"
    return f"{loss.type}, β = {loss.beta:g}" if loss.type in BETA_DRAWN else str(loss.type)


def draw(found: dict[str, Curve], file: Path) -> None:
    """Draw the curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    size = (WIDTH_PIXELS / DPI, 0.42 * WIDTH_PIXELS / DPI)
    figure, panels = pyplot.subplots(1, 2, figsize=size, dpi=DPI, layout="constrained")
    # Its grey is that of the axes.
    colours = [colour for place, colour in enumerate(pyplot.get_cmap("tab10").colors) if place != 7]
    looks = zip(itertools.cycle(colours), itertools.cycle(LINES), strict=False)
    for (name, both), (colour, line) in zip(found.items(), looks, strict=False):
        for panel, values in zip(panels, both, strict=True):
            panel.plot(MARGINS, values, color=colour, linestyle=line, linewidth=1.8, label=name)
    for panel, title, limits in zip(panels, ("loss", "slope"), ((-1, 6), (-2, 1)), strict=True):
        panel.set(title=title, xlabel="reward margin βΔ", xlim=(MARGINS[0], MARGINS[-1]), ylim=limits)
        panel.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    handles, names = panels[0].get_legend_handles_labels()
    wrapped = [name.replace(", aot_unpaired, ", ",\naot_unpaired, ") for name in names]
    figure.legend(handles, wrapped, loc="outside right center", frameon=False, handlelength=3.5)
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)


def main() -> int:
    """Draw the picture."""
    draw(curves(), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
