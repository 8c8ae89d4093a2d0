"""llama.cpp as the second reader of a GGUF file that was written: what it says has to be what transformers says.

Its products of matrices take activations in the type of the weights, float16 or blocks of 8 bits, so that its
log-probabilities differ by far more than sums in another order explain. How far, depends on the model; so transformers
does the same to the same weights, and what that changes is the measure of what llama.cpp may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.agreement import Difference
from dpo_cli.modeling.generation import Answer, room
from dpo_cli.modeling.gguf import llama_cpp
from dpo_cli.modeling.gguf.activations import rounded_logps
from dpo_cli.modeling.gguf.types import GgufType
from dpo_cli.modeling.gguf.vocabulary_texts import same_in_llama_cpp
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.export_answers import ANSWER_TOKENS, first_gap
from dpo_cli.pipeline.export_facts import QUESTIONS, Facts
from dpo_cli.pipeline.export_proof import Proof, Said, logps_by_row
from dpo_cli.reporting.console import Console

LLAMA_CPP, READERS, ACTIVATIONS, ANSWERS_BESIDE = "llama.cpp", "readers", "activations", "answers of llama.cpp"
"""What is kept of it in the manifest, and shown: differences, and how many answers are alike."""

LEAST = Difference(2e-2, 2e-3)
"""How far llama.cpp may be from transformers, in nats a token, whatever rounding explains: its tables have 16 bits."""

_LARGEST, _MEAN = 4.0, 2.0
"""How many times as far as rounding the activations takes transformers, at one token and on average."""

MISSING = "llama.cpp did not read the file: `pip install 'dpo-cli[llama]'` installs its package, which takes minutes"


@dataclass(frozen=True)
class ByTransformers:
    """What transformers has read from the file.

    Attributes:
        policy: The model.
        said: What it says.
        tokenizer: Its tokenizer.
        facts: What that says, and where texts end.
    """

    policy: Policy
    said: Said
    tokenizer: Any
    facts: Facts


@dataclass(frozen=True)
class ByLlamaCpp:
    """What llama.cpp has read from the file.

    Attributes:
        logps: By pair, the log-probability of each scored token.
        apart: How far they are from those of transformers.
        explained: How far rounding its activations takes transformers from itself.
        answers: How many answers were compared, and how many are those of transformers.
    """

    logps: dict[int, Tensor]
    apart: Difference
    explained: Difference
    answers: dict[str, int]

    def beside(self, source: Said) -> dict[str, dict[str, Any]]:
        """Return what is kept of it, with how far it is from what was exported."""
        return {
            LLAMA_CPP: Difference.between(source.logps, self.logps).as_dict(),
            READERS: self.apart.as_dict(),
            ACTIVATIONS: self.explained.as_dict(),
            ANSWERS_BESIDE: self.answers,
        }


def read_by_llama_cpp(
    file: Path, kind: GgufType, other: ByTransformers, proof: Proof, console: Console, where: str
) -> ByLlamaCpp:
    """Let llama.cpp read a file, and compare what it says with what transformers says.

    Args:
        file: The file.
        kind: The type that it keeps weights in.
        other: What transformers has read from it.
        proof: What both are compared on.
        console: Shows what is done.
        where: What is then not written.

    Raises:
        UserError: llama.cpp cannot read the file, or reads another model from it.
    """
    prompts = [prompt for prompt in proof.prompts if room(other.policy, prompt, 1)] if other.said.answers else []
    scored = proof.sequences(other.policy)
    longest = max(len(one.prompt) + len(one.response) for some in scored.values() for one in some)
    positions = max([longest, *(len(one) + room(other.policy, one, ANSWER_TOKENS) for one in prompts)])
    with llama_cpp.opened(file, positions) as reader:
        _check_vocabulary(reader, other.tokenizer, other.facts, where)
        logps = logps_by_row(reader.logps, scored, "llama.cpp", console)
        with console.progress("answers of llama.cpp", len(prompts), "prompt") as progress:
            answers = []
            for prompt in prompts:
                most = room(other.policy, prompt, ANSWER_TOKENS)
                answers.append(reader.greedy(prompt, other.facts.stops, most))
                progress(len(answers), len(prompts))

    def as_llama_cpp(prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        return rounded_logps(other.policy, kind, prompt, response)

    explained = Difference(0.0, 0.0)
    if kind != "f32":
        rounded = logps_by_row(as_llama_cpp, scored, "transformers, with rounded activations", console)
        explained = Difference.between(other.said.logps, rounded)
    apart, allowed = Difference.between(other.said.logps, logps), allowed_beside(explained)
    _check_logps(apart, allowed, where)
    alike = _check_answers(prompts, answers, other, allowed, where)
    return ByLlamaCpp(logps, apart, explained, {"compared": len(answers), "alike": alike})


def allowed_beside(explained: Difference) -> Difference:
    """Return how far llama.cpp may be from transformers.

    Args:
        explained: How far rounding the activations takes transformers from itself.
    """
    largest = max(LEAST.largest, _LARGEST * explained.largest)
    return Difference(largest, max(LEAST.mean, _MEAN * explained.mean))


def _check_vocabulary(reader: llama_cpp.LlamaCpp, tokenizer: Any, facts: Facts, where: str) -> None:
    """Refuse a file of which llama.cpp takes other tokens for a text, or which does not end where it should.

    Raises:
        UserError: It does.
    """
    if not facts.stops <= (ends := reader.ends()):
        missing = ", ".join(map(str, sorted(facts.stops - ends)))
        raise _other(f"texts end at the tokens {missing} too, where llama.cpp goes on", where)
    for text in same_in_llama_cpp(tokenizer, facts.tokens):
        tokens = facts.tokens[text]
        if (found := tuple(reader.tokens(text))) != tokens:
            pairs = enumerate(zip(found, tokens, strict=False), 1)
            parted = next((at for at, (one, other) in pairs if one != other), min(len(found), len(tokens)) + 1)
            raise _other(f"the tokens of {text[:40]!r} are others from the {parted}. on", where)
    begin = reader.begins()
    start = (reader.tokens(QUESTIONS[0])[0] if begin is None else begin,)
    # Where there is a template, it says how conversations begin: a token before texts is the one that it begins with.
    chats = [] if facts.whole or begin is None else [reader.tokens(text)[:1] for text in facts.conversations()]
    if any(tuple(first) != start for first in [*([facts.whole[:1]] if facts.whole else []), *chats]):
        raise _other(f"texts begin with {'no token of their own' if begin is None else f'the token {begin}'}", where)


def _check_logps(apart: Difference, allowed: Difference, where: str) -> None:
    """Refuse a file that llama.cpp reads another model from.

    Raises:
        UserError: The log-probabilities are further from each other than the rounding explains.
    """
    for name, ours, most in (
        ("on average", apart.mean, allowed.mean),
        ("at most", apart.largest, allowed.largest),
    ):
        if not ours <= most < float("inf"):
            told = f"its log-probabilities differ by {ours:.1e} nats per token {name}, where {most:.1e} is allowed"
            raise _other(told, where)


def _check_answers(
    prompts: Sequence[Sequence[int]], answers: Sequence[Answer], other: ByTransformers, allowed: Difference, where: str
) -> int:
    """Return how many answers are those of transformers.

    Raises:
        UserError: One is another at a token where transformers tells both clearly apart.
    """
    pairs = list(zip(prompts, other.said.answers, answers, strict=True))
    for number, (prompt, one, another) in enumerate(pairs, 1):
        if one != another:
            gap = first_gap(other.policy, prompt, one, another, other.facts.stops)
            if not gap <= 2 * allowed.largest:
                raise _other(f"answer {number} is another, where {gap:.1e} nats are between two tokens", where)
    return sum(one == another for _, one, another in pairs)


def _other(told: str, where: str) -> UserError:
    what = f"what was written is, as llama.cpp reads it, another model than transformers reads: {told}"
    hint = "nothing was written; update the package `llama-cpp-python`, or report this"
    return UserError(what, where, hint, status=FAILED)
