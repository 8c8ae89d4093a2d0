"""Decoder layers are compiled where it pays, proved to compute the same, and the time that it took is told."""

from __future__ import annotations

import itertools
import time

from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.compiled import decoder_layers, leave_uncompiled
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.proof import prove_compiled
from dpo_cli.pipeline.models import shortest_pair
from dpo_cli.pipeline.session import Session
from dpo_cli.system.text import several

_FEWEST_PASSES = 1000
"""The forward passes of training from which `auto` compiles. Compiling takes a minute or two, and a pass of some
thousand tokens gains a tenth of a second: reckoned, not measured on a GPU yet."""

_STEPS_LOOKED_AT = 4
"""Steps from which the number of passes of all is reckoned."""


def compile_layers_of(
    session: Session, policy: Policy, batches: Batches, steps: Plan, backend: str = "inductor"
) -> None:
    """Compile the decoder layers of a policy as `training.compile` says, before step 1.

    Args:
        session: Says whether.
        policy: The policy, placed.
        batches: How pairs go through it.
        steps: The steps of the run.
        backend: The compiler, by its name in torch.

    Raises:
        UserError: It was asked for and cannot be done, or layers compute something else when they are compiled.
    """
    if not _asked_for(session, batches, steps):
        return
    model, before = policy.model, time.monotonic()
    num_layers = len(decoder_layers(model))
    if not num_layers:
        _refuse(session, f"{policy} has no decoder layers that transformers tells apart")
        return
    session.console.notice(f"compiling {several(num_layers, 'decoder layer')} …")
    batch = shortest_pair(batches, steps.trained_on())
    proof = prove_compiled(policy.bare, batch, session.precision, backend)
    failure = next(filter(None, session.of_all(proof.fails(session.precision))), "")
    if failure:
        leave_uncompiled(model)
        _refuse(session, failure)
        return
    took = f"compiled {several(num_layers, 'decoder layer')} in {time.monotonic() - before:.0f} s"
    moved = proof.rounding.logps if proof.rounding else proof.difference
    given = "they give the same as before" if not moved else f"up to {moved:.1g} nats per token"
    session.console.notice(f"checked: {took}; {given}")


def _asked_for(session: Session, batches: Batches, steps: Plan) -> bool:
    """Tell whether layers are to be compiled: with `auto`, where the run is on a GPU and has passes enough."""
    asked = session.config.training.compile
    if asked != "auto":
        return asked
    if session.accelerator.device.type != "cuda":
        return False
    first = list(itertools.islice(steps.steps(batches.cut), _STEPS_LOOKED_AT))
    passes = sum(len(step.micro_batches) for step in first) / max(1, len(first)) * steps.num_steps
    return passes >= _FEWEST_PASSES


def _refuse(session: Session, failure: str) -> None:
    """Go on with layers as they are, and say why; or, where compiling was asked for, stop.

    Raises:
        UserError: It was asked for.
    """
    if session.config.training.compile == "auto":
        session.console.warning(f"decoder layers are not compiled ({failure})")
        return
    hint = "install a C++ compiler, on a GPU Triton as well; or set `training.compile: false`"
    raise UserError(f"the decoder layers cannot be compiled: {failure}", "`training.compile`", hint)
