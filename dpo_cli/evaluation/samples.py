"""Held-out prompts that are answered before, during and after training, to be read beside the chosen responses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from accelerate.utils import gather_object

from dpo_cli.data.checkup.endings import end_tokens
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling.data_ranks import data_rank
from dpo_cli.modeling.generation import Answer, greedy_answers, room
from dpo_cli.preference.dealing import dealt

if TYPE_CHECKING:
    from accelerate import Accelerator
    from numpy.typing import NDArray

    from dpo_cli.modeling.policy import Policy

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Limits:
    """How long answers may be, and how many are generated at once.

    Attributes:
        max_new_tokens: The most tokens of an answer.
        batch_tokens: The most tokens of the prompts and answers of a batch; a prompt that alone has more is one by
            itself.
    """

    max_new_tokens: int
    batch_tokens: int


@dataclass(frozen=True)
class Sample:
    """A held-out prompt that is answered.

    Attributes:
        where: Where its pair was read.
        tokens: Those of the prompt, as a step trains on them.
        prompt: Their text, the template's tokens included.
        chosen: The text of the chosen response, without what ends it.
        chosen_tokens: Its tokens, its end included.
    """

    where: str
    tokens: tuple[int, ...]
    prompt: str
    chosen: str
    chosen_tokens: int

    def row(self, step: int, answer: Answer, tokenizer: Any) -> dict[str, Any]:
        """Return the row of `samples.jsonl` of an answer after a step."""
        return {
            "step": step,
            "where": self.where,
            "prompt": self.prompt,
            "answer": tokenizer.decode(list(answer.tokens)),
            "tokens": answer.num_tokens,
            "ended": answer.ended,
            "chosen": self.chosen,
            "chosen_tokens": self.chosen_tokens,
        }


def sampled_pairs(pairs: PreparedPairs, held_out: NDArray[np.int64], number: int) -> list[int]:
    """Choose held-out pairs of different prompts, spread evenly, in their order; fewer where there are fewer prompts.

    It depends on the held-out pairs alone, and a larger number adds pairs to those of a smaller one.
    """
    _, first = np.unique(pairs.sizes.prompt_ids[held_out], return_index=True)
    distinct = held_out[np.sort(first)]
    # Multiples of the golden ratio, whole parts left aside, are spread evenly however many there are.
    places = np.argsort(np.argsort(np.arange(len(distinct)) * _GOLDEN % 1))
    return sorted(distinct[places[:number]].tolist())


@dataclass(frozen=True)
class Sampling:
    """The held-out prompts of a run that are answered.

    Attributes:
        samples: The prompts.
        stops: The tokens that end an answer.
        limits: How long answers may be, and how many are generated at once.
        tokenizer: What the pairs were tokenized with.
    """

    samples: tuple[Sample, ...]
    stops: frozenset[int]
    limits: Limits
    tokenizer: Any

    @classmethod
    def of(
        cls,
        pairs: PreparedPairs | Sequence[TokenizedPair],
        indices: Sequence[int],
        tokenizer: Any,
        generation_config: Any,
        limits: Limits,
    ) -> Self:
        """Read the prompts of some pairs and what was chosen; the other arguments are those of `stop_tokens`."""
        stops = stop_tokens(tokenizer, generation_config, [pairs[index].chosen.tolist() for index in indices])
        samples = (_sample(pairs[index], tokenizer, stops) for index in indices)
        return cls(tuple(samples), stops, limits, tokenizer)

    def rows(
        self, step: int, policy: Policy, accelerator: Accelerator, progress: Callable[[int, int], None]
    ) -> list[dict[str, Any]]:
        """Let a policy answer; return the rows of `samples.jsonl` of a step. For the arguments see `answered`."""
        prompts = [sample.tokens for sample in self.samples]
        answers = answered(policy, prompts, self.stops, self.limits, accelerator, progress)
        return [sample.row(step, answer, self.tokenizer) for sample, answer in zip(self.samples, answers, strict=True)]


def stop_tokens(tokenizer: Any, generation_config: Any, responses: Sequence[Sequence[int]] = ()) -> frozenset[int]:
    """Return the tokens that end an answer.

    Args:
        tokenizer: Its end-of-sequence token is one.
        generation_config: The model's; the end tokens that it names are some.
        responses: Responses as the template closes them; the special token that closes one is another.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.bos_token_id}
    closing = (response[len(_without_end(response, special, tokenizer)) :] for response in responses)
    return end_tokens(tokenizer, generation_config) | {token for end in closing for token in end if token in special}


def _sample(pair: TokenizedPair, tokenizer: Any, stops: Collection[int]) -> Sample:
    """Read the prompt of a pair and what was chosen."""
    prompt, chosen = pair.prompt.tolist(), pair.chosen.tolist()
    text = tokenizer.decode(_without_end(chosen, stops, tokenizer))
    return Sample(pair.origin, tuple(prompt), tokenizer.decode(prompt), text, len(chosen))


def _without_end(response: Sequence[int], stops: Collection[int], tokenizer: Any) -> Sequence[int]:
    """Return a response without the token that ends it and white space behind that; all of it where none does."""
    for end in range(len(response) - 1, -1, -1):
        if response[end] in stops:
            return response[:end]
        if tokenizer.decode([response[end]]).strip():
            break
    return response


def answered(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    limits: Limits,
    accelerator: Accelerator,
    progress: Callable[[int, int], None],
) -> list[Answer]:
    """Let a policy answer prompts greedily, dealt to the processes; where these share its weights, all answer all.

    Every process gets all answers. How many processes there are decides which prompts are in a batch with which, and
    so how an answer is rounded.

    Args:
        policy: The policy.
        prompts: The tokens of each.
        stops: The tokens that end an answer.
        limits: How long answers may be, and how many are generated at once.
        accelerator: Knows the processes.
        progress: Called with prompts done and prompts in all, by all processes together.
    """
    num_ranks = 1 if policy.sharded else data_rank(accelerator).num_ranks
    rooms = [room(policy, prompt, limits.max_new_tokens) for prompt in prompts]
    cuts = [MicroBatch(tuple(rows)) for rows in _cut([*map(len, prompts)], rooms, limits.batch_tokens, num_ranks)]
    shares = cuts if policy.sharded else dealt(cuts, accelerator, lambda done: progress(done, len(prompts)))
    found: dict[int, Answer] = {}
    for cut in shares:
        rows = [prompts[row] for row in cut.pairs]
        answers = greedy_answers(policy, rows, stops, rooms[cut.pairs[0]])
        found |= {} if cut.filler else dict(zip(cut.pairs, answers, strict=True))
    everywhere = found if policy.sharded else dict(gather_object([*found.items()]))
    progress(len(prompts), len(prompts))
    return [everywhere[row] for row in range(len(prompts))]


def _cut(lengths: Sequence[int], rooms: Sequence[int], batch_tokens: int, num_ranks: int) -> list[list[int]]:
    """Cut prompts into batches, in each of which all answers may have as many tokens."""
    alike: dict[int, list[int]] = defaultdict(list)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        alike[rooms[row]].append(row)
    cuts: list[list[int]] = []
    for answer_tokens, rows in alike.items():
        share = -(-len(rows) // num_ranks)
        while rows:
            fit = max(1, batch_tokens // (lengths[rows[0]] + answer_tokens))
            cuts.append(rows[: min(share, fit)])
            rows = rows[min(share, fit) :]
    return cuts
