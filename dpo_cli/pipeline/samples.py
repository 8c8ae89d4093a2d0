"""The held-out prompts of a run that are answered: which, when, and where the answers go."""

from __future__ import annotations

from dpo_cli.evaluation.samples import Limits, Sampling, sampled_pairs
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.memory import without_gradient
from dpo_cli.pipeline.out_of_memory import ANSWERING
from dpo_cli.pipeline.plan import PlannedRun
from dpo_cli.pipeline.run import Records, Run


def sampling_of(plan: PlannedRun, policy: Policy, batches: Batches) -> Sampling | None:
    """Return the held-out prompts that a run answers, and how; None where it answers none.

    Args:
        plan: Says how many, and has the pairs.
        policy: What answers.
        batches: How pairs go through it: of a token, activations that are kept take more than a cache.
    """
    config, data = plan.session.config, plan.data
    evaluation = config.evaluation
    indices = sampled_pairs(data.pairs, data.held_out, evaluation.samples)
    if not indices:
        return None
    if not policy.model.can_generate():
        plan.session.console.notice(f"no held-out prompts are answered: {policy} cannot generate")
        return None
    if not config.training.gradient_checkpointing:
        # Where activations are computed again, the cache of all layers is about as large as what is kept of a token.
        batches = without_gradient(batches)
    limits = Limits(evaluation.max_new_tokens, batches.micro_batch_tokens)
    return Sampling.of(data.pairs, indices, plan.tokenizer, policy.model.generation_config, limits)


def answer_samples(run: Run, records: Records, step: int) -> None:
    """Let the policy answer the held-out prompts as it is after a step, and keep the answers; every process calls it.

    Raises:
        UserError: The answers cannot be written.
    """
    session, policy = run.session, run.learner.policy
    if run.sampling is None:
        return
    shown = session.console.progress("answering prompts of held-out pairs", len(run.sampling.samples))
    with shown as progress, session.during(ANSWERING):
        rows = run.sampling.rows(step, policy, session.accelerator, progress)
    records.answered(rows)
