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


def _clip(facts: RunFacts) -> str:
    norm = facts.max_grad_norm
    return "set `training.max_grad_norm`" if norm is None else f"lower `training.max_grad_norm` ({norm:g})"


def _more_steps(facts: RunFacts) -> str:
    ends_early = facts.max_steps is not None and facts.max_steps <= facts.num_steps
    return f"train more steps (`training.max_steps`, {facts.max_steps:,})" if ends_early else MORE_STEPS.text


def _keep_best(facts: RunFacts) -> str:
    return "" if facts.best_by else KEEP_BEST.text


def _length_loss(facts: RunFacts) -> str:
    counts = any(loss.type in ("r_dpo", "ld_dpo") or loss.takes_means for loss in facts.losses)
    return "" if counts else LENGTH_LOSS.text


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
MORE_STEPS = Remedy("train more steps (`training.epochs`)", _more_steps)
CLIP = Remedy("set or lower `training.max_grad_norm`", _clip)
KEEP_BEST = Remedy("keep the best checkpoint (`evaluation.best_by: loss`)", _keep_best)
LENGTH_LOSS = Remedy("use `r_dpo`, `ld_dpo`, `simpo`, or `dpo` with `logps: mean`", _length_loss)
CHECK_DATA = plain("look at the pairs (`dpo prepare-data`)")
