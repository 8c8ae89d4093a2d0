"""Write docs/losses.md from the losses themselves; with `--check` report whether it is current.

What the page says about a loss is in its class: the equation is the docstring of its `losses`; the lines of the
class's docstring from `Use:`, `Watch:`, `Takes:` and `Source:` on say when to use it, what to watch, what it is
computed from, and where it comes from.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from write_settings_page import allowed, shown
from written_page import write_or_check

from dpo_cli.preference.losses import Loss
from dpo_cli.preference.losses.base import MarginLossSettings
from dpo_cli.preference.losses.divergences import Divergence
from dpo_cli.preference.losses.pairwise import AdaptiveBeta
from dpo_cli.preference.reference import Reference
from dpo_cli.settings import members

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
HEAD = """# Losses

A loss turns the log-probabilities of a pair into the number that training minimises. It is chosen by its type, with
`loss: ipo`, or with settings:

    loss:
      type: ipo
      beta: 0.5

Every setting has a default. `configs/losses` has a runnable example of every loss, with β and a learning rate that
suit it: of `dpo` with several of its settings, of `sft` in `rpo.yaml`.

## Words

| | |
|---|---|
| log π(y) | log-probability of a response in nats, a sum over its tokens; for *means*, that divided by their number |
| c | log π(chosen) − log π_ref(chosen) |
| r | log π(rejected) − log π_ref(rejected) |
| Δ | c − r |
| σ, ls | σ(x) = 1 / (1 + e^(−x)); ls = log σ |
| y_c, y_r, \\|y\\| | the chosen and the rejected response; the number of a response's tokens |
| NLL of chosen | −log π(y_c), as a mean over all chosen tokens of the step |

The loss of a step is the mean over its pairs, however they are cut into forward passes. Rewards are βc and βr. A β that
suits sums (0.01 to 0.5) is too small for means (2 to 10). What 20 steps with each loss do to a small model:
[losses, trained](losses-trained.md).

![Every loss and its slope against the reward margin](losses.png)

Left: the loss of one pair; right: its slope, both against the reward margin βΔ, along c = Δ/2 and r = −Δ/2. Responses
are one token long, so that sums and means are the same, and so are `dpo`, `aot`, `aot_unpaired`, `r_dpo` and `ld_dpo`.
Losses have their defaults, except β = 1 for `orpo` and `cpo`: at 0.1 only the likelihood of chosen would be visible.
`ipo` and `sppo` are multiplied by β² to fit the picture. Losses without a reference begin at a log-probability of −2.5.
`sft` has no margin. `make plots` draws the picture.

## Which one

| loss | when to use it | reference | takes |
|---|---|---|---|
"""
SEVERAL = """
## Several at once

A list of losses is summed, each multiplied by its `weight`, 1 by default. This is RPO
([Pang et al. 2024](https://arxiv.org/abs/2404.19733)), which keeps chosen responses likely:

    loss:
      - dpo
      - type: sft
        weight: 1.0

and this MPO ([Wang et al. 2024](https://arxiv.org/abs/2411.10442)), with the weights of its authors:

    loss:
      - type: dpo
        weight: 0.8
      - type: bco
        weight: 0.2
      - type: sft

Rewards are those of one of the losses: of the one that keeps running statistics (`bco`, adaptive β), of which there may
be one; else of the first that needs a reference; else of the first.
"""
EXPERTS = """
## Experts

`router_aux` is a setting of every loss: the coefficient of the load-balancing loss of a mixture of experts, which keeps
its routers from sending all tokens to a few experts. 0, the default, leaves that loss out. `router_aux_loss_coef` in
config.json is ignored; models are often trained with 0.001 to 0.02.

    loss:
      type: dpo
      router_aux: 0.001

For N decisions of the routers, one for each token in each layer with experts, among E experts:

    E · Σ_e f_e · P_e

f_e is the number of decisions that have e among their top k, over N, and has no gradient; P_e is the mean probability
of e. The loss is k where the load is even. It is that of the Switch Transformer (Fedus et al. 2021,
[arXiv 2101.03961](https://arxiv.org/abs/2101.03961)) as transformers computes it, over all layers together.

- All tokens of a step count, those of prompts included and padding excluded. A token counts once for each sequence that
  contains it, also under the packed layout, where it is computed once.
- f_e and P_e are those of the whole step over all processes, so that the result does not depend on how the step is cut.
  Where a step has several forward passes, or several processes share it, this costs one more pass over its pairs,
  without gradient.
- It is added to the step's loss once: `weight` does not multiply it, and only one of several losses may set it.
- In the metrics `loss` does not contain it; `router_aux` is its value before it is multiplied by the coefficient.
  Evaluations do not compute it.
- A model without experts, or for which transformers has no such loss (DeepSeek-V3), is an error before it is loaded.
"""
DATA = """
## Columns of the data

| column | |
|---|---|
| `weight` | multiplies the pair's loss; {refusers}, which compares responses of different pairs, refuses the column |
| `margin` | how much better chosen is; ignored except by {takers} with `margin_scale: s`: βΔ should exceed s · margin |

Both are optional: [data](data.md). The margin of a pair from a [ranked list](shapes.md#ranked) is the difference of its
scores. m is in units of the reward, of which a run rarely gains more than a few: scores from 1 to 10 need a scale such
as 0.1. `dpo prepare-data` shows the range of the margins, and `dpo train` reports where they are ignored. The loss of a
step or of an evaluation is the sum over its pairs divided by their number, not by their weights.
"""
REFERENCES = """
## The reference

| `reference` | | settings |
|---|---|---|
"""
NO_REFERENCE = """
Where no loss needs a reference, `none` is the default, and any other is an error; so is `none` where one is needed.
Then log π_ref is 0, and rewards are β · log-probability: of sums or of means, as the loss takes them. An accuracy is
the share of pairs whose chosen response is likelier under the policy, also before training, where with a reference
every pair is a tie.
"""
DIVERGENCES = """
## Divergences

What holds the policy to its reference. x is c or r; {takers} use f(c) − f(r) instead of Δ. A divergence is named by its
type, or as a group where it has a setting: `divergence: {{type: alpha, alpha: 0.5}}`, α above 0 and below 1.

| `divergence` | f(x) | |
|---|---|---|
"""
TABLE = "\n| setting | default | accepts | |\n|---|---|---|---|\n"
TAIL = "\nThis page is written by `scripts/write_losses_page.py`.\n"
PARTS = ("Use", "Watch", "Takes", "Source")
ELSEWHERE = {"divergence": "[a divergence](#divergences)", "adaptive_beta": "[a group](#adaptive-β) or null"}
"""Settings that are groups, and what they accept."""


def kind(model: type[Any]) -> str:
    """Return the type by which a class is chosen."""
    return str(model.model_fields["type"].default)


def named(models: list[type[Any]]) -> str:
    """Name classes by their types."""
    *others, last = [f"`{kind(model)}`" for model in models]
    return f"{', '.join(others)} and {last}" if others else last


def described(model: type[Any]) -> dict[str, str]:
    """Return the parts of a class's docstring by name; "" is the text before them."""
    text, *rest = re.split(rf"^({'|'.join(PARTS)}): ", inspect.getdoc(model) or "", flags=re.MULTILINE)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]
    parts = {name: " ".join(part.split()) for name, part in zip(rest[::2], rest[1::2], strict=True)}
    return {"": "\n\n".join(paragraphs), **parts}


def equation(method: Any) -> str:
    """Return the equation in the docstring of a method."""
    text = " ".join((inspect.getdoc(method) or "").split())
    return text.removeprefix("Return ").removesuffix(".")


def settings(model: type[Any]) -> str:
    """Return the table of a class's settings."""
    rows = []
    for name, facts in model.model_json_schema()["properties"].items():
        if name not in ("type", "weight"):
            accepts = ELSEWHERE.get(name) or allowed(facts)
            rows.append(f"| `{name}` | `{shown(facts['default'])}` | {accepts} | {facts['description']} |\n")
    return TABLE + "".join(rows) if rows else ""


def needs(model: type[Any], takes: str) -> str:
    """Say in one line what a loss needs."""
    loss = model()
    words = ["a reference" if loss.needs_reference else "no reference", takes]
    if loss.compares_pairs:
        words.append("all pairs of a step at once")
    if loss.keeps_statistics:
        words.append("the mean reward of the steps before")
    if "adaptive_beta" in model.model_fields:
        words.append("under `adaptive_beta` all pairs of a step at once, and the steps before")
    if issubclass(model, MarginLossSettings):
        words.append("with `margin_scale` the pairs' margins")
    return "; ".join(words)


def section(model: type[Any]) -> str:
    """Return everything about one loss."""
    parts = described(model)
    if lacking := [name for name in PARTS if name not in parts]:
        raise ValueError(f"the docstring of {model.__name__} has no line that begins with `{lacking[0]}: `")
    lines = [
        f"\n## {kind(model)}\n",
        parts[""],
        f"\n    {equation(model.losses)}\n",
        f"- **Use:** {parts['Use']}",
        f"- **Watch:** {parts['Watch']}",
        f"- **Needs:** {needs(model, parts['Takes'])}.",
        f"- **Source:** {linked(parts['Source'])}",
    ]
    return "\n".join(lines) + "\n" + settings(model)


def linked(text: str) -> str:
    """Make links of arXiv's numbers."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def overview(losses: tuple[type[Any], ...]) -> Iterator[str]:
    """Yield a row of the overview for each loss."""
    for model in losses:
        parts, name = described(model), kind(model)
        reference = "yes" if model.needs_reference else "no"
        yield f"| [{name}](#{name}) | {parts['Use']} | {reference} | {parts['Takes']} |\n"


def references() -> Iterator[str]:
    """Yield a row for each reference strategy."""
    for model in members(Reference):
        parts = described(model)
        about = " ".join(filter(None, (*parts[""].split("\n\n"), linked(parts.get("Source", "")))))
        fields = model.model_json_schema()["properties"].items()
        given = ", ".join(f"`{name}: {shown(facts['default'])}`" for name, facts in fields if name != "type")
        yield f"| `{kind(model)}` | {about} | {given} |\n"


def divergences() -> Iterator[str]:
    """Yield a row for each divergence."""
    for model in members(Divergence):
        yield f"| `{kind(model)}` | {equation(model.__call__)} | {described(model)['']} |\n"


def adaptive_beta() -> str:
    """Return the section about β-DPO."""
    parts = described(AdaptiveBeta)
    lines = [
        "\n## Adaptive β\n",
        parts[""],
        f"\n- **Use:** {parts['Use']}",
        f"- **Watch:** {parts['Watch']}",
        f"- **Source:** {linked(parts['Source'])}",
    ]
    return "\n".join(lines) + "\n" + settings(AdaptiveBeta)


def page() -> str:
    """Return the whole page."""
    losses = members(Loss)
    diverging = [model for model in losses if "divergence" in model.model_fields]
    pieces = [
        HEAD,
        *overview(losses),
        SEVERAL,
        EXPERTS,
        REFERENCES,
        *references(),
        NO_REFERENCE,
        DATA.format(
            takers=named([model for model in losses if issubclass(model, MarginLossSettings)]),
            refusers=named([model for model in losses if not model.takes_weights]),
        ),
        DIVERGENCES.format(takers=named(diverging)),
        *divergences(),
        adaptive_beta(),
        *map(section, losses),
        TAIL,
    ]
    return "".join(pieces)


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
