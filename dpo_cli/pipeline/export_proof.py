"""The proof that what was written answers as what it was made of: on the pairs of its run, or on made-up tokens.

What was written is read by the reader that it is for. It has to give the log-probabilities that the same weights give,
rounded in memory as they were for writing, whatever rounding by itself does; and it ends texts at the same tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.agreement import Difference, Listener
from dpo_cli.evaluation.figures import figures
from dpo_cli.modeling.batch import Batches, scored_tokens
from dpo_cli.modeling.folders.model_files import most_tokens
from dpo_cli.modeling.generation import Answer
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.products import Multiplying, in_two_parts, response_logps
from dpo_cli.pipeline.evaluate import scored
from dpo_cli.pipeline.export_answers import ANSWERS, greedy
from dpo_cli.pipeline.export_facts import NOTHING_WRITTEN
from dpo_cli.pipeline.session import Session
from dpo_cli.preference.reference import OpenReference
from dpo_cli.reporting.console import Console

EXACT = 1e-4
"""How far, in nats a token, log-probabilities of the same weights in float32 may be from each other."""

_LARGEST, _MEAN, _MOST = 8.0, 4.0, 1e-2
"""How many times as far as sums in another order take a merged model in memory merging may, at one token and on
average; and how far at most.

Of 24 merged random Llamas of 2 to 24 layers, whose weights are 1 to 50 times as large as usual, up to 4.3 and 1.9
times as far.
"""

ROUTED = 0.1
"""Of how many scored tokens merging may change more than that, in a model with experts.

Sums in another order let routers exchange two experts that are as good as each other, of which a token, and those that
attend to it, get other values.
"""

FEW = 64
"""How many pairs tell whether weights are read as they are in memory; figures are those of all pairs."""

NONE, _FAR = Difference(0.0, 0.0), -1
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROWS, _TOKENS = 8, 64
_MERGED = "the merged model is not the adapter's"


@dataclass(frozen=True)
class Said:
    """What a model says.

    Attributes:
        figures: As `dpo eval` has them; empty where no pairs were scored.
        logps: By pair, the log-probability of each scored token.
        far: The log-probabilities of made-up tokens that are as far from each other as the model has positions.
        answers: Greedy answers, one to each prompt.
        gap: How much likelier, in nats, its own token is at most where an answer leaves that of the model before.
        routes: Whether it chooses among experts.
    """

    figures: dict[str, Any]
    logps: dict[int, Tensor]
    far: Tensor
    answers: Sequence[Answer] = ()
    gap: float = 0.0
    routes: bool = False

    def lengths(self, beside: Said) -> list[int]:
        """Return how many tokens are scored of each pair that another scored too, and of those that are far apart."""
        return [*(len(self.logps[pair]) for pair in sorted(self.logps.keys() & beside.logps.keys())), len(self.far)]


@dataclass(frozen=True)
class Scored:
    """A response behind a prompt.

    Attributes:
        prompt: The tokens of the prompt.
        response: Those of the response.
        tokens: Which of those are scored.
    """

    prompt: list[int]
    response: list[int]
    tokens: slice | NDArray[np.bool_]


@dataclass(frozen=True)
class OnPairs:
    """Compares models on the same pairs against the same reference.

    Attributes:
        session: Says by which objective.
        batches: How pairs go through the models.
        reference: That of the run.
        pairs: Indices of the pairs.
        scored: What they are called.
        prompts: The tokens of prompts that are answered.
    """

    session: Session
    batches: Batches
    reference: OpenReference
    pairs: NDArray[np.int64]
    scored: str
    prompts: Sequence[Sequence[int]]

    def logps(self, policy: Policy, what: str) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Score the pairs with a policy as it is now; return their figures, and log-probabilities by pair.

        Raises:
            UserError: A pair's loss is not finite.
        """
        policy.read(self.batches.layout)
        policy.place(self.session.accelerator, trained=False, collisions=self.session.config.objective.wpo)
        listener = Listener(policy.scorer)
        results = scored(self.session, listener, self.reference, self.batches, self.pairs, what, f"scoring {what}")
        return figures(results), listener.logps

    def sequences(self, policy: Policy) -> dict[int, list[Scored]]:
        """Return what is scored, by pair."""
        found = {}
        for index in map(int, self.pairs):
            pair = self.batches.pairs[index]
            sides = ((pair.chosen, pair.chosen_gaps), (pair.rejected, pair.rejected_gaps))
            found[index] = [
                Scored(pair.prompt.tolist(), side.tolist(), scored_tokens(len(side), gaps)) for side, gaps in sides
            ]
        return found

    def few(self) -> OnPairs:
        """Return the same on few pairs, spread over all lengths: the shortest and the longest are among them."""
        by_length = self.pairs[np.argsort(self.batches.pairs.sizes.longest[self.pairs], kind="stable")]
        places = np.linspace(0, len(by_length) - 1, min(FEW, len(by_length))).round().astype(np.int64)
        return replace(self, pairs=np.sort(by_length[places]))

    def of(self, said: Said) -> dict[int, Tensor]:
        """Return what was said of these pairs, and perhaps of others."""
        return {pair: said.logps[pair] for pair in map(int, self.pairs)}

    def texts(self, tokenizer: Any) -> list[str]:
        """Return the texts of some pairs."""
        some = [self.batches.pairs[int(index)] for index in self.pairs[:ANSWERS]]
        return [tokenizer.decode(pair.prompt.tolist() + pair.chosen.tolist()) for pair in some]


@dataclass(frozen=True)
class OnTokens:
    """Compares models on the same made-up tokens, where there is no run that has pairs.

    Attributes:
        session: Is told what is done.
        prompts: The tokens of prompts that are answered.
    """

    session: Session
    prompts: Sequence[Sequence[int]]
    scored: ClassVar[str] = "made-up tokens"

    def logps(self, policy: Policy, what: str) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Score each token by those before it."""
        tokens = self._tokens(policy)
        self.session.console.notice(f"scoring {what}: {len(tokens) * (tokens.shape[1] - 1)} made-up tokens")
        policy.place(self.session.accelerator, trained=False)
        return {}, {0: _token_logps(policy, tokens)}

    def sequences(self, policy: Policy) -> dict[int, list[Scored]]:
        """Return what is scored."""
        return {0: [Scored(row[:1], row[1:], slice(None)) for row in self._tokens(policy).tolist()]}

    def _tokens(self, policy: Policy) -> Tensor:
        return _made_up(policy, _ROWS, min(_TOKENS, most_tokens(policy.model.config) or _TOKENS))

    def of(self, said: Said) -> dict[int, Tensor]:
        """Return what was said of all."""
        return said.logps

    def few(self) -> OnTokens:
        """Return the same: there are few tokens."""
        return self

    def texts(self, tokenizer: Any) -> list[str]:
        """Return the texts of the prompts."""
        return [tokenizer.decode(list(prompt)) for prompt in self.prompts]


Proof = OnPairs | OnTokens
"""What models are compared on."""


def asked(
    proof: Proof, policy: Policy, what: str, stops: Collection[int] | None, drafts: Sequence[Answer] = ()
) -> Said:
    """Let a policy score and answer.

    Args:
        proof: What it scores.
        policy: The policy.
        what: What it is called.
        stops: The tokens that end an answer; None: nothing is answered.
        drafts: What another one answered, whose answers may be the same.
    """
    figures, logps = proof.logps(policy, what)
    answers, gap = ([], 0.0) if stops is None else greedy(policy, proof.prompts, stops, drafts, proof.session, what)
    return Said(figures, logps, _far(policy), answers, gap, _routes(policy))


def _routes(policy: Policy) -> bool:
    """Tell whether a model chooses among experts, by how its settings count them."""
    config = policy.model.config.get_text_config()
    return any(getattr(config, name, None) for name in _EXPERTS)


def _far(policy: Policy) -> Tensor:
    """Score made-up tokens that are spread over all positions: scaled ones differ most where tokens are far apart."""
    most = most_tokens(policy.model.config) or 0
    length = min(_TOKENS, most)
    if length < 2 or "position_ids" not in inspect.signature(policy.model.forward).parameters:
        return torch.zeros(0)
    places = torch.arange(length) * (most - 1) // (length - 1)
    return _token_logps(policy, _made_up(policy, 1, length), places[None])


def _made_up(policy: Policy, rows: int, length: int) -> Tensor:
    return torch.randint(policy.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _token_logps(policy: Policy, tokens: Tensor, places: Tensor | None = None) -> Tensor:
    """Return the log-probability of each token behind those before it in its row, at whatever positions they are."""
    tokens = tokens.to(policy.model.device)
    # Without a mask, positions that do not follow each other would be those of several texts.
    at = {} if places is None else {"position_ids": places.to(tokens.device), "attention_mask": torch.ones_like(tokens)}
    with policy.reading_plainly() as model:
        logps: Tensor = model(input_ids=tokens, use_cache=False, **at).logits[:, :-1].float().log_softmax(-1)
    return logps.gather(-1, tokens[:, 1:, None]).flatten().cpu()


def check_alike(
    ours: Said, theirs: Said, what: str, where: str, noise: Callable[[], Difference] = lambda: NONE
) -> Difference:
    """Refuse a model that does not give the log-probabilities of another one of the same weights.

    Args:
        ours: What it should say.
        theirs: What it says.
        what: What is compared, in a sentence without its end.
        where: The folder that is then not written.
        noise: Measures how far sums in another order take one of them, where theirs are; what is not finite is none.

    Returns:
        The difference.

    Raises:
        UserError: It says something else.
    """
    if ours.lengths(theirs) != theirs.lengths(ours):
        told = f"{what}: it takes texts of another length"
        raise UserError(told, where, NOTHING_WRITTEN, status=FAILED)
    difference = Difference.between(ours.logps, theirs.logps)
    far = Difference.between({0: ours.far}, {0: theirs.far}).largest if len(ours.far) else 0.0
    # What is NaN is infinitely far.
    apart, of = max((difference.largest, ""), (far, " where positions are far apart"))
    if not apart <= EXACT:
        measured = noise()
        if not math.isfinite(measured.largest):
            measured = NONE
        most = Difference(min(_MOST, max(EXACT, _LARGEST * measured.largest)), _MEAN * measured.mean)
        for told, found, allowed in ((of, apart, most.largest), (" on average", difference.mean, most.mean)):
            if not found <= allowed:
                by = f"{found:.1e} nats per token{told}, where {allowed:.1e} is allowed"
                raise UserError(f"{what}: its log-probabilities differ by {by}", where, NOTHING_WRITTEN, status=FAILED)
    return difference


def logps_by_row(
    ask: Callable[[Sequence[int], Sequence[int]], Tensor],
    rows: Mapping[int, Sequence[Scored]],
    what: str,
    console: Console,
) -> dict[int, Tensor]:
    """Return the log-probabilities of the scored tokens, by pair, of rows that are scored one at a time.

    Args:
        ask: Returns those of a response's tokens behind a prompt.
        rows: What is scored, by pair.
        what: What scores.
        console: Shows what is done.
    """
    found: dict[int, Tensor] = {}
    with console.progress(f"scoring {what}", len(rows)) as progress:
        for pair, some in rows.items():
            found[pair] = torch.cat([ask(one.prompt, one.response)[one.tokens] for one in some])
            progress(len(found), len(rows))
    return found


def in_another_order(proof: Proof, policy: Policy) -> Difference:
    """Return how far sums in another order take what a policy says of pairs, and of tokens that are far apart.

    Weights that are large, or many layers, make more of the last digits of float32: of a random Llama of 48 layers and
    a standard deviation of 0.3 up to 1e-3 nats.
    """
    rows = proof.sequences(policy)

    def said(what: str) -> dict[int, Tensor]:
        found = logps_by_row(partial(response_logps, policy), rows, what, proof.session.console)
        return {**found, _FAR: _far(policy)}

    plain = said("the merged model, row by row")
    with Multiplying(in_two_parts):
        return Difference.between(plain, said("the merged model, with sums in another order"))


def check_merged(ours: Said, theirs: Said, where: str, noise: Callable[[], Difference]) -> Difference:
    """Refuse a merged model that does not give the log-probabilities of its adapter, but for a few where experts are.

    Returns:
        How far sums in another order take it; none of a model with experts, where these would be exchanged, too.

    Raises:
        UserError: It gives others.
    """
    if not ours.routes:
        return check_alike(ours, theirs, _MERGED, where, noise)
    if ours.lengths(theirs) == theirs.lengths(ours):
        both = [(ours.logps[pair], theirs.logps[pair]) for pair in ours.logps.keys() & theirs.logps.keys()]
        apart = torch.cat([(one - other).abs() for one, other in [*both, (ours.far, theirs.far)]])
        if bool(apart.isfinite().all()) and float((apart > EXACT).double().mean()) <= ROUTED:
            return NONE
    return check_alike(ours, theirs, _MERGED, where)
