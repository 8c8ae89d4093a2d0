"""`dpo export --merge`: an adapter and its base become one model, which is proved on the run's own pairs.

All of it is computed in float32, whatever the run computed in: what is compared are weights, not the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.config import Config
from dpo_cli.config.exporting import Merging
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.agreement import Difference, Listener
from dpo_cli.evaluation.figures import figures
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.saving import saved_folder
from dpo_cli.modeling.tokenizers import end_at
from dpo_cli.modeling.weight_types import WeightTypes
from dpo_cli.pipeline.evaluate import scored
from dpo_cli.pipeline.memory import wanted_tokens, without_gradient
from dpo_cli.pipeline.models import loaded, open_reference, opened, trained_policy
from dpo_cli.pipeline.pairs import load_tokenizer, run_data
from dpo_cli.pipeline.session import Session, started
from dpo_cli.preference.reference import Cached, NoReference, OpenReference
from dpo_cli.reporting.card import model_card
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.environment import versions
from dpo_cli.reporting.tables import figures_table
from dpo_cli.system.storage import remove_strays_of
from dpo_cli.training.checkpoints import beginning_of

EXACT = 1e-4
"""How far, in nats a token, sums in another order may take log-probabilities of a model in float32."""

ROUNDING_SHARE = 1.5
"""How many times as far as rounding the weights does by itself, where they are rounded."""

_TRAINING_PAIRS = 64
"""How many training pairs are scored where none are held out."""


@dataclass(frozen=True)
class Scores:
    """What a model says of the pairs.

    Attributes:
        figures: As `dpo eval` has them.
        logps: By pair, the log-probability of each scored token.
    """

    figures: dict[str, Any]
    logps: dict[int, Tensor]


@dataclass(frozen=True)
class Examiner:
    """Scores models on the same pairs against the same reference.

    Attributes:
        session: Says by which objective.
        batches: How pairs go through the models.
        reference: That of the run.
        pairs: Indices of the pairs.
    """

    session: Session
    batches: Batches
    reference: OpenReference
    pairs: NDArray[np.int64]

    def scores(self, policy: Policy, what: str) -> Scores:
        """Score the pairs with a policy as it is now.

        Raises:
            UserError: A pair's loss is not finite.
        """
        policy.place(self.session.accelerator, trained=False, collisions=self.session.config.objective.wpo)
        listener = Listener(policy.scorer)
        results = scored(self.session, listener, self.reference, self.batches, self.pairs, what, f"scoring {what}")
        return Scores(figures(results), listener.logps)


def export(merging: Merging, console: Console) -> dict[str, Any]:
    """Merge an adapter into its base, prove what was written, and print how exact it is; return that.

    Raises:
        UserError: Something is wrong that the user can fix, or the merged model is not the adapter's.
    """
    with started(_exactly(merging.config), console) as session:
        if session.accelerator.num_processes > 1:
            hint = "start it without torchrun or accelerate"
            raise UserError("a model is exported by one process", "the command line", hint)
        remove_strays_of(merging.to)
        found = _merge(session, merging)
    _show(found, merging.to, console)
    return found


def _exactly(config: Config) -> Config:
    """Return the run's configuration in float32, with a reference that is no second model."""
    model = config.model.model_copy(update={"dtype": "float32"})
    fixed = isinstance(config.reference, NoReference)
    reference = config.reference if fixed else Cached(model=config.reference.model)
    return config.model_copy(update={"model": model, "reference": reference})


def _merge(session: Session, merging: Merging) -> dict[str, Any]:
    """Score the adapter, merge it, write the model, score that, and compare."""
    config, console = session.config, session.console
    tokenizer, tokenize = load_tokenizer(config, console, merging.run.first_day())
    data = run_data(config, tokenize, console)
    pairs = data.held_out
    if not len(pairs):
        pairs = data.train[:_TRAINING_PAIRS]
        console.notice(f"no pairs are held out: {len(pairs)} of the training pairs are scored")
    policy, examiner = _opened(session, data.pairs, pairs)
    _check_base(policy, merging)
    policy.restore(merging.adapter)
    if config.model.eos_token is not None:
        end_at(policy.model, tokenizer.eos_token_id)
    adapter = examiner.scores(policy, "the adapter")
    types = WeightTypes.of_files(Path(policy.model.name_or_path))
    policy.merge()
    rounding = _rounded(policy, examiner, types, adapter, merging.to)
    with saved_folder(merging.to, "writing the merged model") as folder:
        policy.hold_as(types)
        policy.write(folder, tokenizer)
        policy.check_written(folder)
        # Two models are never in memory at once; Accelerate would keep the first.
        del policy
        session.accelerator.free_memory()
        written = loaded(session, str(folder))
        written.read(examiner.batches.layout)
        merged = examiner.scores(written, "the merged model")
        difference = Difference.between(adapter.logps, merged.logps)
        _check(difference, rounding, merging.to)
        found = {
            "adapter": adapter.figures,
            "merged": merged.figures,
            "dtype": str(types),
            "difference": difference.as_dict(),
            "rounding": rounding.as_dict(),
        }
        (folder / "README.md").write_text(_card(merging, found), encoding="utf-8")
    return found


def _opened(session: Session, pairs: PreparedPairs, indices: NDArray[np.int64]) -> tuple[Policy, Examiner]:
    """Return the policy as it was before step 1, and who examines it; the reference is opened before it moves."""
    name = session.config.reference.model

    def settle(policy: Policy, layout: Layout) -> tuple[Batches, Mapping[str, str]]:
        return without_gradient(Batches(pairs, layout, wanted_tokens(session), session.accelerator.device)), {}

    reference = NoReference().open()
    if name is not None:
        (other,), batches = opened(session, {"`reference.model`": name}, pairs, indices, settle)
        reference = open_reference(session, other, batches, indices)
        del other
    (policy,), batches = opened(session, {"`model.name`": trained_policy(session)}, pairs, indices, settle)
    if name is None and not isinstance(session.config.reference, NoReference):
        reference = open_reference(session, policy, batches, indices)
    return policy, Examiner(session, batches, reference, indices)


def _check_base(policy: Policy, merging: Merging) -> None:
    """Refuse a base that is not the one that the adapter was trained on.

    Raises:
        UserError: It is another.
    """
    if (known := beginning_of(merging.adapter)) and (other := policy.began_with(known)):
        what = f"the {'base' if other == 'model' else other} is not the one that the adapter was trained on"
        setting = "model.name" if other == "model" else "adapter.start"
        raise UserError(what, f"`{setting}`", f"restore it, or name it where it is now, as in `{setting}=PATH`")


def _rounded(policy: Policy, examiner: Examiner, types: WeightTypes, adapter: Scores, to: Path) -> Difference:
    """Round a merged policy's weights; return how far that alone takes its log-probabilities.

    Raises:
        UserError: The policy was not what the adapter was before that.
    """
    if not types.rounds:
        return Difference(0.0, 0.0)
    exact = examiner.scores(policy, "the merged model before rounding")
    _check(Difference.between(adapter.logps, exact.logps), Difference(0.0, 0.0), to)
    policy.round_to(types)
    return Difference.between(exact.logps, examiner.scores(policy, "the merged model after rounding").logps)


def _check(difference: Difference, rounding: Difference, to: Path) -> None:
    """Refuse a merged model that is not what the adapter was.

    Raises:
        UserError: Its log-probabilities are further from the adapter's than the rounding of its weights explains.
    """
    for name, ours, by_rounding in (
        ("at most", difference.largest, rounding.largest),
        ("on average", difference.mean, rounding.mean),
    ):
        if not ours <= (allowed := max(EXACT, ROUNDING_SHARE * by_rounding)):
            what = f"the merged model is not the adapter's: its log-probabilities differ by {ours:.1e} nats per token"
            hint = "nothing was written; update PEFT and transformers to versions that fit each other, or report this"
            raise UserError(f"{what} {name}, where {allowed:.1e} is allowed", str(to), hint, status=FAILED)


def _card(merging: Merging, found: Mapping[str, Any]) -> str:
    """Write the model card."""
    config = merging.config.model_dump(mode="json")
    facts = {
        "adapter": f"{config['adapter']['type']}, merged in float32",
        "weights": found["dtype"],
        "log-probabilities, merged against adapter": f"{Difference(**found['difference'])} (nats per token)",
        "the rounding of weights alone": f"{Difference(**found['rounding'])} (nats per token)",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    columns = {"adapter": found["adapter"], "merged": found["merged"]}
    return model_card(merging.run.path.name, config, facts, columns)


def _show(found: Mapping[str, Any], to: Path, console: Console) -> None:
    """Print how exact the merged model is."""
    console.block()
    console.result(figures_table({"adapter": found["adapter"], "merged": found["merged"]}))
    console.result("")
    difference, rounding = Difference(**found["difference"]), Difference(**found["rounding"])
    console.result(f"difference  {difference} (nats per token, merged against adapter)")
    if rounding.largest:
        console.result(f"rounding    {rounding} (of the weights to {found['dtype']}, alone)")
    console.result(f"model       {to} ({found['dtype']})")
