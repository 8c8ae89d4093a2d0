"""What there is to do about findings: each `Remedy` names settings."""

from __future__ import annotations

from dpo_cli.evaluation.findings.facts import RunFacts
from dpo_cli.evaluation.findings.finding import Remedy

USUAL_RATES = {"all weights": "about 1e-6", "an adapter": "5e-6 to 5e-5"}
"""Learning rates that are usual, by what is trained."""


def _usual(facts: RunFacts) -> str:
    return f"`training.learning_rate` ({facts.learning_rate:g}; usual: {USUAL_RATES[facts.trained]})"


def _beta(facts: RunFacts) -> str:
    loss = facts.objective.reward_source
    return f"raise `beta` of the loss ({loss.beta:g})" if hasattr(loss, "beta") and loss.needs_reference else ""


def _sft(facts: RunFacts) -> str:
    return "" if any(loss.type == "sft" for loss in facts.losses) else ADD_SFT.text


def _adapter(facts: RunFacts) -> str:
    return TRAIN_ADAPTER.text if facts.trained == "all weights" else ""


def plain(text: str) -> Remedy:
    """Return a remedy that applies to every run."""
    return Remedy(text, lambda facts: text)


LOWER_RATE = Remedy("lower `training.learning_rate`", lambda facts: f"lower {_usual(facts)}")
RAISE_RATE = Remedy("raise `training.learning_rate`", lambda facts: f"raise {_usual(facts)}")
RAISE_BETA = Remedy("raise `beta` of the loss", _beta)
ADD_SFT = Remedy("add the loss `sft`", _sft)
TRAIN_ADAPTER = Remedy("train an adapter (`adapter: lora`)", _adapter)
FEWER_STEPS = Remedy(
    "train fewer steps (`training.max_steps`)",
    lambda facts: f"train fewer steps (`training.max_steps`, {facts.num_steps:,} planned)",
)
CHECK_DATA = plain("look at the pairs (`dpo prepare-data`)")
