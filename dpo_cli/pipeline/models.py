"""The one place that opens models: loads them, checks that they fit the pairs, settles the layout, and proves both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config import Config
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.errors import UserError
from dpo_cli.evaluation.samples import stop_tokens
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.files import adapter_folder, base_of, holds_adapter
from dpo_cli.modeling.adapters.settings import Saved
from dpo_cli.modeling.attention.kernels import kernels_for
from dpo_cli.modeling.attention.trees import CannotPack, windows_of
from dpo_cli.modeling.batch import Batches, PairBatch
from dpo_cli.modeling.folders.model_names import same_model
from dpo_cli.modeling.folders.saving import end_at, end_generation_at
from dpo_cli.modeling.held import Held
from dpo_cli.modeling.layouts import LAYOUTS, PACKED, PADDED, Layout
from dpo_cli.modeling.memory import activation_bytes
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.proof import REFUSALS, Proof, prove
from dpo_cli.pipeline.out_of_memory import during
from dpo_cli.pipeline.pairs import RunData
from dpo_cli.pipeline.session import Session
from dpo_cli.preference.cache import ReferenceCache, reference_identity
from dpo_cli.preference.reference import Cached, OpenReference
from dpo_cli.preference.reference_work import ReferenceWork, reference_model
from dpo_cli.training.checks import check_base, check_fits, check_logps, own_logps_line

Settle = Callable[[Policy, Layout], tuple[Batches, Mapping[str, str]]]
"""Settles how pairs are cut for a model and a layout; returns the batches, and what is to be said of them."""

_RESPONSES = 64
"""In how many responses the tokens are looked for with which the template closes them."""


def opened(
    session: Session,
    names: Mapping[str, str | Policy],
    pairs: PreparedPairs,
    indices: NDArray[np.int64],
    settle: Settle,
    *,
    trained: bool = False,
) -> tuple[list[Policy], Batches]:
    """Load models that read the same batches, and prove on pairs of the job that they read them as they should.

    Args:
        session: Asks for a layout, or leaves the choice.
        names: The models, or what is opened of them already, each under the setting or option that names it.
        pairs: All pairs of the job.
        indices: Which of them are trained on or scored.
        settle: Settles the batches. It is asked before the proof, which is the first to take much memory.
        trained: Whether gradients of the first model matter.

    Returns:
        The models, prepared for the layout of the batches, and the batches.

    Raises:
        UserError: A model cannot be loaded, does not fit the pairs, or is not exact.
    """
    policies = []
    for where, name in names.items():
        with during("while the model was loaded"):
            policies.append(loaded(session, name) if isinstance(name, str) else name)
        check_fits(pairs, policies[-1], where)
    likely = expected_layout(session, policies[0], pairs, *policies[1:])
    batches, said = settle(policies[0], likely)
    with session.during("while the layout of the pairs was proved"):
        layout, proved = choose_layout(session, policies, pairs, indices, trained=trained)
    if layout != likely:
        batches, said = settle(policies[0], layout)
    if said:
        session.console.facts(said)
    for line, whose in zip(proved, ("", "of the reference, "), strict=False):
        session.console.notice(f"checked: {whose}{line}")
    return policies, batches


def loaded(session: Session, name: str) -> Policy:
    """Return a model as it is; of an adapter's folder, its base with the adapter beside it.

    Raises:
        UserError: It cannot be loaded, or the adapter does not fit.
    """
    trust, device = session.config.model.trust, session.accelerator.device
    if holds_adapter(name):
        named = base_of(name)
        base = Policy.load(named, trust, device, held=session.held, placement=session.placement)
        return beside(session, base, name, named)
    return Policy.load(name, trust, device, held=held_of(session, name), placement=session.placement)


def held_of(session: Session, name: str) -> Held:
    """Return how a whole model is held: what an adapter of the run is put beside may be quantized, another is not."""
    return session.held if same_model(name, session.config.model.name) else session.held_beside


def trained_policy(session: Session, *, empty: bool = False) -> Policy:
    """Return what the run trains, as it is before step 1; or, with `empty`, that without weights.

    Raises:
        UserError: The model cannot be loaded, or the adapter does not fit it.
    """
    name, trust, how = session.config.model.name, session.config.model.trust, (session.trained, session.held)
    if empty:
        return Policy.empty(name, trust, *how)
    return Policy.load(name, trust, session.accelerator.device, *how, placement=session.placement)


def end_as_trained(policy: Policy, config: Config, tokenizer: Any, data: RunData) -> None:
    """Let generation end, by the settings that are saved with a policy, where responses of its training pairs end."""
    if config.model.eos_token is not None:
        end_at(policy.model, tokenizer.eos_token_id)
    responses = [data.pairs[index].chosen.tolist() for index in data.train[:_RESPONSES].tolist()]
    ends = stop_tokens(tokenizer, getattr(policy.model, "generation_config", None), responses)
    end_generation_at(policy.model, sorted(ends))


def scored_and_reference(session: Session, scored: str) -> tuple[str | Policy, Policy]:
    """Return what is scored and the reference before step 1.

    An adapter of the reference's own base is put beside the weights that are loaded already; else the name is returned.

    Raises:
        UserError: The reference cannot be loaded, or an adapter does not fit.
    """
    config = session.config
    name = config.reference.model or config.model.name
    # An adapter that the run was given as its model is merged, as it was then.
    device, held = session.accelerator.device, held_of(session, name)
    base = Policy.load(name, config.model.trust, device, held=held, placement=session.placement)
    reference = base.with_adapter(session.trained) if _goes_on(config) else base
    if not holds_adapter(scored) or not same_model(base_of(scored), name):
        return scored, reference
    return beside(session, base, scored, name), reference


def beside(session: Session, base: Policy, adapter: str, name: str) -> Policy:
    """Return a base with the adapter in a folder beside it.

    Raises:
        UserError: It does not fit, or was trained beside other weights.
    """
    for line in check_base(base, adapter_folder(adapter), name, "the adapter that is scored"):
        session.console.notice(line)
    return base.with_adapter(Adapted(Saved(start=adapter)))


def reference_sketch(session: Session, sketch: Policy) -> Policy:
    """Return the reference without its weights: the model that is named for it, or the policy before step 1.

    Raises:
        UserError: It reads another vocabulary than the policy.
    """
    config = session.config
    if config.reference.model is None:
        return sketch
    name = config.reference.model
    return reference_model(name, sketch, config.model.trust, held_of(session, name), empty=True)


def known_reference(
    session: Session,
    sketch: Policy,
    scored: str,
    pairs: PreparedPairs,
    needed: NDArray[np.int64],
    is_ours: Callable[[str], bool],
) -> OpenReference | None:
    """Return the reference where the cache has all of its answers, and the files of its weights are as they were then.

    Args:
        session: Says which reference.
        sketch: The reference without its weights.
        scored: The model that is scored; where it is an adapter of the reference, that is loaded anyway.
        pairs: All pairs.
        needed: Indices of those that it will be asked for.
        is_ours: Tells of its identity whether it is the one to ask.
    """
    config = session.config
    name = config.reference.model or config.model.name
    shared = holds_adapter(scored) and same_model(base_of(scored), name)
    if not isinstance(config.reference, Cached) or shared or _goes_on(config):
        return None
    identity = session.agreed(sketch.known_identity(name, config.model.trust))
    if identity is None or not is_ours(identity):
        return None
    batches = Batches(pairs, PADDED, 1, session.accelerator.device)
    cache = ReferenceCache(reference_identity(identity, session.accelerator), batches, session.accelerator)
    return OpenReference(cache.lookup) if cache.holds(needed.tolist()) else None


def _goes_on(config: Config) -> bool:
    """Tell whether the reference is the model with the adapter that training goes on from."""
    return config.adapter is not None and bool(config.adapter.start) and not config.reference.model


def open_reference(
    session: Session,
    model: Policy,
    batches: Batches,
    needed: NDArray[np.int64],
    *,
    policy: Policy | None = None,
    held_out: NDArray[np.int64] | None = None,
) -> OpenReference:
    """Let a reference compute before step 1 what it has to.

    Args:
        session: Says which reference.
        model: What it asks.
        batches: How pairs go through it.
        needed: Indices of the pairs that it will be asked for, ascending.
        policy: What is trained, placed, maybe the same; None: nothing is.
        held_out: Indices of the pairs that evaluations will ask for, ascending, where anything is trained.
    """
    reference = session.config.reference
    if model is not policy:
        model.place(session.accelerator, trained=False)
    num_asked = reference.num_asked(len(needed), 0 if held_out is None else len(held_out))
    asking = "while the reference was asked"
    with session.console.progress("reference log-probabilities", num_asked) as progress, session.during(asking):
        work = ReferenceWork(model, policy, session.accelerator, needed, batches, progress, held_out)
        found = reference.open(work)
    config = session.config
    # With another token at the end, the settings of the run's own model are not those of its files.
    as_it_came = bool(reference.model) or config.model.eos_token is None
    if isinstance(reference, Cached) and as_it_came and not _goes_on(config) and session.accelerator.is_main_process:
        model.remember_identity(config.model.trust)
    return found


def expected_layout(session: Session, policy: Policy, pairs: PreparedPairs, *others: Policy) -> Layout:
    """Return the layout that a job will take unless its proof fails; the model's weights may be missing.

    Args:
        session: Asks for a layout, or leaves the choice.
        policy: The model that is asked whether it can read it.
        pairs: All pairs of the job.
        others: Models that read the same batches.

    Raises:
        UserError: The layout was asked for by name and the model refuses it.
    """
    layout = _possible(session, [policy, *others])[0]
    if not layout.needs_proof:
        return layout
    with contextlib.suppress(*(kind for kind in REFUSALS if kind is not CannotPack)):
        try:
            activation_bytes(policy, layout, layout.batch([0], [pairs[0]]), session.precision.dtype, recomputed=False)
        except CannotPack as refusal:
            if error := _asked_for(session, layout, f"{policy}: {refusal}"):
                raise error from None
            return PADDED
    return layout


def _possible(session: Session, policies: Sequence[Policy]) -> Sequence[Layout]:
    """Return the layouts that a job may take, with each kernel of attention, in the order in which they are proved."""
    training, device = session.config.training, session.accelerator.device
    asked = {window for policy in policies for window in windows_of(policy.model.config)}
    windows = tuple(sorted(asked, key=lambda window: window or 0))
    return LAYOUTS.get(training.layout, PACKED).with_kernels(kernels_for(training.attention, device.type), windows)


def choose_layout(
    session: Session, policies: Sequence[Policy], pairs: PreparedPairs, indices: NDArray[np.int64], *, trained: bool
) -> tuple[Layout, list[str]]:
    """Prove the layout on pairs of the job; with `auto`, take the padded one where that fails.

    Where attention has several kernels, the next one is proved where one fails. The shortest pairs do, since nothing is
    known of the memory yet. A layout that is proved gives the model's own log-probabilities; of the padded one that
    remains to be proved.

    Returns:
        The layout, and what was proved of each model's log-probabilities.

    Raises:
        UserError: The layout or the attention was asked for by name and is not exact, or log-probabilities are not the
            model's own.
    """
    possible = _possible(session, policies)
    failure = ""
    for layout, following in zip(possible, [*possible[1:], PADDED], strict=True):
        failure, lines = _proved(session, policies, layout, pairs, indices, trained=trained)
        if not failure and layout.needs_proof:
            return layout, lines
        if failure and following != PADDED:
            what = f"trying {following.described}, since {layout.described} cannot be used with this model ({failure})"
            session.console.warning(what)
    shortest = shortest_pair(Batches(pairs, PADDED, 1, session.accelerator.device), indices)
    lines = []
    for policy in policies:
        policy.read(PADDED)
        lines.append(check_logps(policy.bare, shortest, session.accelerator))
    if failure and (error := _asked_for(session, layout, failure)):
        raise error
    if failure:
        what = f"using the padded layout, since the {layout.described} one is not exact with this model ({failure})"
        session.console.warning(what)
    return PADDED if layout.needs_proof else layout, lines


def _proved(
    session: Session,
    policies: Sequence[Policy],
    layout: Layout,
    pairs: PreparedPairs,
    indices: NDArray[np.int64],
    *,
    trained: bool,
) -> tuple[str, list[str]]:
    """Prove a layout with each model; return why one cannot read it, or what was proved of their log-probabilities."""
    lines = []
    for policy in policies if layout.needs_proof else ():
        policy.read(PADDED)
        proof = _prove(session, policy, layout, pairs, indices, trained=trained)
        # All ranks take the same layout, so the one that fails decides.
        if failure := next(filter(None, session.of_all(proof.fails(session.precision))), ""):
            return f"{policy}: {failure}", []
        # Only now does the policy know of it, and what is copied of the policy will read it too.
        policy.read(layout)
        for line in proof.lines(layout, session.precision, trained=trained):
            session.console.notice(f"checked: {line}")
        lines.append(own_logps_line(proof.difference, session.precision))
    return "", lines


def _prove(
    session: Session,
    policy: Policy,
    layout: Layout,
    pairs: PreparedPairs,
    indices: NDArray[np.int64],
    *,
    trained: bool,
) -> Proof:
    """Prove a layout on the two shortest pairs, and on the shortest beyond the window that a model looks back."""
    lengths = pairs.sizes.longest[indices]
    order = lengths.argsort(kind="stable")
    window = getattr(policy.model.config.get_text_config(), "sliding_window", None) or np.inf
    beyond = [index for index in order if lengths[index] > window][:1]
    shortest, longer = ([pairs[int(indices[place])] for place in places] for places in (order[:2], beyond))
    return prove(
        policy.bare,
        layout,
        shortest,
        session.precision,
        longer=longer,
        trained=trained,
        anywhere=lambda holds: any(session.of_all(holds)),
    )


def _asked_for(session: Session, layout: Layout, failure: str) -> UserError | None:
    """Return the error where a layout that cannot be used, or its attention, was asked for by name."""
    training = session.config.training
    if training.attention != "auto":
        what = f"`{training.attention}` attention cannot be used with this model ({failure})"
        return UserError(what, f"`training.attention: {training.attention}`", "set `training.attention: auto`")
    if training.layout in LAYOUTS:
        what = f"the {layout.name} layout is not exact with this model ({failure})"
        return UserError(what, f"`training.layout: {layout.name}`", "set `training.layout: auto` or `padded`")
    return None


def shortest_pair(batches: Batches, indices: NDArray[np.int64]) -> PairBatch:
    """Return the shortest of some pairs: what holds of all of them is proved on it in the least time."""
    return batches(MicroBatch((int(indices[batches.pairs.sizes.longest[indices].argmin()]),)))
