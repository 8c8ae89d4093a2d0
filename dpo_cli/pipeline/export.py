"""`dpo export --merge`: an adapter and its base become one model, which is proved before it is there.

All of it is computed in float32, whatever the run computed in: what is compared are weights, not the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config import Config
from dpo_cli.config.exporting import Merging, Rewriting
from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.agreement import Difference
from dpo_cli.modeling.folders import tokenizers
from dpo_cli.modeling.folders.saving import saved_folder
from dpo_cli.modeling.folders.tokenizers import end_at
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.held import QUANTIZED
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.pipeline.memory import settling_scores
from dpo_cli.pipeline.merge_proof import OnPairs, OnTokens, Proof, Scores, check_merged
from dpo_cli.pipeline.models import loaded, open_reference, opened, trained_policy
from dpo_cli.pipeline.pairs import RunData, load_tokenizer, run_data
from dpo_cli.pipeline.session import Session, started
from dpo_cli.preference.reference import Cached, NoReference
from dpo_cli.reporting.card import model_card
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.environment import versions
from dpo_cli.reporting.row_log import figures_at
from dpo_cli.reporting.tables import HELD_OUT, figures_table
from dpo_cli.settings import located
from dpo_cli.system.storage import remove_strays_of
from dpo_cli.training.checkpoints import beginning_of
from dpo_cli.training.run_folder import RunFolder, step_of
from dpo_cli.training.state import read_state

_TRAINING_PAIRS = 64
"""How many training pairs are scored where none are held out."""


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
        try:
            found = _merge(session, merging)
        except torch.OutOfMemoryError as error:
            hint = "set the environment variable ACCELERATE_USE_CPU to true, which takes the host's memory instead"
            what = "the device has no room for the model in float32"
            raise UserError(what, str(session.accelerator.device), hint, status=FAILED) from error
    _show(found, merging.to, console)
    return found


def rewrite(asked: Rewriting, console: Console) -> dict[str, Any]:
    """Write a checkpoint of a run of all weights as a model folder in a dtype; return what was written.

    Raises:
        UserError: It cannot be loaded, the dtype cannot hold its weights, or the disk refuses.
    """
    remove_strays_of(asked.to)
    folder, types = str(asked.checkpoint), WeightTypes({}, PRECISIONS[asked.dtype].dtype)
    policy, tokenizer = Policy.load(folder, asked.config.model.trust), tokenizers.load_tokenizer(folder)
    if policy.largest() > types.most:
        what = f"{types} cannot hold all weights: the largest is {policy.largest():.3g}"
        raise UserError(what, folder, "choose `--dtype float32` or `bfloat16`")
    step, rows = step_of(asked.checkpoint), read_state(asked.checkpoint).metrics
    figures = figures_at(asked.run.metrics, step, rows)
    rounding = ", rounded from float32 after the figures were measured" if types.rounds else ""
    facts = {
        "optimizer steps": step,
        "weights": f"{types}{rounding}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    card = model_card(asked.run.path.name, asked.config.model_dump(mode="json"), facts, figures)
    with saved_folder(asked.to, "writing the model") as temporary:
        policy.write(temporary, tokenizer, types=types)
        policy.check_written(temporary, types)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    console.result(f"model  {asked.to} ({types}, after step {step})")
    return {"step": step, "dtype": str(types), "figures": figures}


def _exactly(config: Config) -> Config:
    """Return the run's configuration in float32, with a reference that is no second model."""
    reference = config.reference
    if not isinstance(reference, NoReference):
        reference = Cached(model=reference.model)
    model = config.model.model_copy(update={"dtype": "float32"})
    return config.model_copy(update={"model": model, "reference": reference})


def _merge(session: Session, merging: Merging) -> dict[str, Any]:
    """Score the adapter, merge it, write the model, score that, and compare."""
    tokenizer, policy, proof = _of_run(session, merging, merging.run) if merging.run else _of_none(session, merging)
    trained = adapter = proof.scores(policy, "the adapter")
    quantize = session.config.model.quantize
    if quantize:
        del policy
        session = _alone(session).under(_unquantized(session.config))
        policy = trained_policy(session)
        _give_adapter(policy, merging, tokenizer)
        adapter = proof.scores(policy, "the adapter on the unquantized base")
    types = WeightTypes({}, PRECISIONS[merging.dtype].dtype) if merging.dtype else policy.came_in
    policy.merge()
    rounding = _rounded(policy, proof, types, adapter, merging.to)
    with saved_folder(merging.to, "writing the merged model") as folder:
        policy.write(folder, tokenizer, types=types)
        policy.check_written(folder, types)
        del policy
        merged = proof.scores(loaded(_alone(session), str(folder)), "the merged model")
        difference = Difference.between(adapter.logps, merged.logps)
        check_merged(difference, rounding, merging.to)
        found = {
            **({f"adapter on {quantize}": trained.figures} if quantize else {}),
            "scored": proof.scored,
            "adapter": adapter.figures,
            "merged": merged.figures,
            "dtype": str(types),
            "difference": difference.as_dict(),
            "rounding": rounding.as_dict(),
            **({quantize: Difference.between(trained.logps, merged.logps).as_dict()} if quantize else {}),
        }
        if merging.run:
            (folder / "README.md").write_text(_card(merging, merging.run, found), encoding="utf-8")
    return found


def _of_run(session: Session, merging: Merging, run: RunFolder) -> tuple[Any, Policy, Proof]:
    """Return the tokenizer, what the run has trained, and the proof on its pairs."""
    tokenizer, tokenize = load_tokenizer(session.config, session.console, run.first_day())
    policy, proof = _opened(session, merging, run_data(session.config, tokenize, session.console))
    _give_adapter(policy, merging, tokenizer)
    return tokenizer, policy, proof


def _of_none(session: Session, merging: Merging) -> tuple[Any, Policy, Proof]:
    """Return the tokenizer and the model of an adapter that has no run, and the proof on made-up tokens."""
    session.console.notice("no run is here: no pairs are scored, but made-up tokens")
    adapter = str(merging.adapter)
    return tokenizers.load_tokenizer(adapter), loaded(session, adapter), OnTokens(session)


def _opened(session: Session, merging: Merging, data: RunData) -> tuple[Policy, OnPairs]:
    """Return the policy as it was before step 1, and what proves others; the reference is opened before it moves."""
    config, indices = session.config, data.held_out
    if not len(indices):
        indices = data.train[:_TRAINING_PAIRS]
        session.console.notice(f"no pairs are held out: {len(indices)} of the training pairs are scored")
    settle = settling_scores(session, data.pairs)
    name, reference = config.reference.model, NoReference().open()
    if name is not None:
        (other,), batches = opened(session, {"`reference.model`": name}, data.pairs, indices, settle)
        reference = open_reference(session, other, batches, indices)
        del other
        _alone(session)
    (policy,), batches = opened(session, {"`model.name`": trained_policy(session)}, data.pairs, indices, settle)
    _check_base(policy, merging)
    if name is None and not isinstance(config.reference, NoReference):
        reference = open_reference(session, policy, batches, indices)
    scored = HELD_OUT if len(data.held_out) else "training pairs"
    return policy, OnPairs(session, batches, reference, indices, scored)


def _check_base(policy: Policy, merging: Merging) -> None:
    """Refuse a base that is not the one that the adapter was trained on.

    Raises:
        UserError: It is another.
    """
    if (known := beginning_of(merging.adapter)) and (other := policy.began_with(known)):
        adapter = merging.config.adapter
        start = adapter.start if adapter else None
        setting, name = ("model.name", merging.config.model.name) if other == "model" else ("adapter.start", start)
        named = f"the {'base' if other == 'model' else other}{f' {located(name)}' if name else ''}"
        hint = f"restore it, or name it where it is now, as in `{setting}=PATH`"
        raise UserError(f"{named} is not the one that the adapter was trained on", f"`{setting}`", hint)


def _give_adapter(policy: Policy, merging: Merging, tokenizer: Any) -> None:
    """Let a policy that is as it was before step 1 be what the run has trained."""
    policy.restore(merging.adapter)
    if merging.config.model.eos_token is not None:
        end_at(policy.model, tokenizer.eos_token_id)


def _unquantized(config: Config) -> Config:
    """Return the configuration with the base as it is in its files."""
    return config.model_copy(update={"model": config.model.model_copy(update={"quantize": None})})


def _alone(session: Session) -> Session:
    """Let go of the models that nobody has any more: two are never in memory at once. Accelerate would keep them."""
    session.accelerator.free_memory()
    return session


def _rounded(policy: Policy, proof: Proof, types: WeightTypes, adapter: Scores, to: Path) -> Difference:
    """Round a merged policy's weights; return how far that alone takes its log-probabilities.

    Raises:
        UserError: The policy was not what the adapter was before that.
    """
    if not types.rounds:
        return Difference(0.0, 0.0)
    exact = proof.scores(policy, "the merged model before rounding")
    check_merged(Difference.between(adapter.logps, exact.logps), Difference(0.0, 0.0), to)
    policy.round_to(types)
    return Difference.between(exact.logps, proof.scores(policy, "the merged model after rounding").logps)


def _differences(found: Mapping[str, Any]) -> dict[str, str]:
    """Name what was compared, and say how far apart it is."""
    names = {
        "difference": "merged against adapter",
        "rounding": f"of the weights to {found['dtype']}, alone",
        **{name: f"merged against the adapter on the {name} base" for name in QUANTIZED},
    }
    compared = {name: Difference(**found[name]) for name in names if name in found}
    return {name: f"{apart} (nats per token, {names[name]})" for name, apart in compared.items() if apart.largest}


def _columns(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of the scored pairs by the model."""
    return {name: value for name, value in found.items() if name == "merged" or name.startswith("adapter")}


def _card(merging: Merging, run: RunFolder, found: Mapping[str, Any]) -> str:
    """Write the model card."""
    config = merging.config.model_dump(mode="json")
    facts = {
        "adapter": f"{config['adapter']['type']}, merged in float32",
        "weights": found["dtype"],
        **_differences(found),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return model_card(run.path.name, config, facts, _columns(found), merged=True, scored=found["scored"])


def _show(found: Mapping[str, Any], to: Path, console: Console) -> None:
    """Print how exact the merged model is."""
    console.block()
    if found["merged"]:
        console.result(figures_table(_columns(found), found["scored"]))
        console.result("")
    lines = {**_differences(found), "model": f"{to} ({found['dtype']})"}
    width = max(map(len, lines))
    for name, line in lines.items():
        console.result(f"{name:<{width}}  {line}")
