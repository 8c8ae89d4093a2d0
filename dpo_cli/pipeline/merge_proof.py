"""The proof that a merged model answers as the adapter did: on the pairs of its run, or on made-up tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.agreement import Difference, Listener
from dpo_cli.evaluation.figures import figures
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders.model_files import most_tokens
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.evaluate import scored
from dpo_cli.pipeline.session import Session
from dpo_cli.preference.reference import OpenReference

EXACT = 1e-4
"""How far, in nats a token, sums in another order may take log-probabilities of a model in float32."""

ROUNDING_SHARE = 1.5
"""How many times as far as rounding the weights does by itself, where they are rounded."""


_ROWS, _TOKENS = 8, 64


@dataclass(frozen=True)
class Scores:
    """What a model says.

    Attributes:
        figures: As `dpo eval` has them; empty where no pairs were scored.
        logps: By pair, the log-probability of each scored token.
    """

    figures: dict[str, Any]
    logps: dict[int, Tensor]


@dataclass(frozen=True)
class OnPairs:
    """Scores models on the same pairs against the same reference.

    Attributes:
        session: Says by which objective.
        batches: How pairs go through the models.
        reference: That of the run.
        pairs: Indices of the pairs.
        scored: What they are called.
    """

    session: Session
    batches: Batches
    reference: OpenReference
    pairs: NDArray[np.int64]
    scored: str

    def scores(self, policy: Policy, what: str) -> Scores:
        """Score the pairs with a policy as it is now.

        Raises:
            UserError: A pair's loss is not finite.
        """
        policy.read(self.batches.layout)
        policy.place(self.session.accelerator, trained=False, collisions=self.session.config.objective.wpo)
        listener = Listener(policy.scorer)
        results = scored(self.session, listener, self.reference, self.batches, self.pairs, what, f"scoring {what}")
        return Scores(figures(results), listener.logps)


@dataclass(frozen=True)
class OnTokens:
    """Scores models on the same made-up tokens, where there is no run that has pairs.

    Attributes:
        session: Is told what is done.
    """

    session: Session
    scored: ClassVar[str] = "made-up tokens"

    @torch.no_grad()
    def scores(self, policy: Policy, what: str) -> Scores:
        """Score each token by those before it."""
        length = min(_TOKENS, most_tokens(policy.model.config) or _TOKENS)
        self.session.console.notice(f"scoring {what}: {_ROWS * (length - 1)} made-up tokens")
        chance = torch.Generator().manual_seed(0)
        tokens = torch.randint(policy.vocabulary, (_ROWS, length), generator=chance).to(policy.model.device)
        with policy.reading_plainly() as model:
            logps = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return Scores({}, {0: logps.gather(-1, tokens[:, 1:, None]).flatten().cpu()})


Proof = OnPairs | OnTokens
"""What models are compared on."""


def check_merged(difference: Difference, rounding: Difference, to: Path) -> None:
    """Refuse a merged model that is not what the adapter was.

    Args:
        difference: Between both.
        rounding: What rounding the weights does by itself.
        to: The folder that is then not written.

    Raises:
        UserError: The log-probabilities are further from each other than the rounding explains.
    """
    for name, ours, by_rounding in (
        ("at most", difference.largest, rounding.largest),
        ("on average", difference.mean, rounding.mean),
    ):
        if not ours <= (allowed := max(EXACT, ROUNDING_SHARE * by_rounding)):
            what = f"the merged model is not the adapter's: its log-probabilities differ by {ours:.1e} nats per token"
            hint = "nothing was written; update PEFT and transformers to versions that fit each other, or report this"
            raise UserError(f"{what} {name}, where {allowed:.1e} is allowed", str(to), hint, status=FAILED)
