"""What got worse in a run, by its held-out figures before step 1 and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLLAPSE = 1.0
"""By how many nats per token the chosen responses may become less likely.

DPO sees the difference of both responses alone and lowers both a little in healthy runs, by some tenths of a nat a
token at most. At 1 nat each token of what the model should learn to say is e times less likely than before any
training. A pretrained model has 1 to 3 nats per token on ordinary text, so it lost a large part of what it knew.
"""

_CHANCE = 0.01
"""The share of the loss by which it may rise: less comes from rounding, and from a run too short to learn anything."""


def worsened(before: Mapping[str, Any], after: Mapping[str, Any], chosen_tokens: float) -> list[str]:
    """Say what is worse at the end of a run than before step 1; nothing where the run is healthy.

    Args:
        before: The held-out figures before step 1.
        after: The held-out figures at the end.
        chosen_tokens: Tokens of a chosen response, as a mean over the held-out pairs.
    """
    found = []
    fall = (before["logps/chosen"] - after["logps/chosen"]) / chosen_tokens
    if fall > COLLAPSE:
        logps = {side: f"{before[name]:.1f} → {after[name]:.1f}" for side, name in _SIDES.items()}
        both = after["logps/rejected"] < before["logps/rejected"]
        others = f", and so did the rejected ones ({logps['rejected']})" if both else ""
        found.append(f"the chosen responses lost {fall:.1f} nats per token ({logps['chosen']}){others}")
    if after["loss"] > before["loss"] + _CHANCE * abs(before["loss"]):
        found.append(f"the held-out loss rose from {before['loss']:.4f} to {after['loss']:.4f}")
    # A fall within the interval may be chance.
    if after["accuracy_interval"][1] < before["rewards/accuracies"]:
        shares = (f"{100 * figures['rewards/accuracies']:.1f} %" for figures in (before, after))
        found.append("the held-out reward accuracy fell from {} to {}".format(*shares))
    return found


_SIDES = {"chosen": "logps/chosen", "rejected": "logps/rejected"}
