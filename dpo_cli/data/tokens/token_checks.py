"""What is found while pairs are tokenized: what was done to a pair, and what the template makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.data.findings import TokenCheck
from dpo_cli.data.tokens.unwritten import NOT_JSON, UNWRITTEN

if TYPE_CHECKING:
    from dpo_cli.data.tokens.tokenize import Tokenized

RESPONSES_CUT = TokenCheck(
    "responses_cut",
    "warning",
    "a response was truncated to fit `data.max_length`",
    "A response was truncated to fit `data.max_length`: the model does not see how it ends.",
    "Raise `data.max_length`, or set `data.on_too_long: drop`.",
    when="a response was truncated to fit `data.max_length`",
    bit=31,
    holds=lambda result: result.responses_cut > 0,
)
"""A response that was cut does not end."""

TOKEN_CHECKS = (
    TokenCheck(
        "prompt_differs",
        "warning",
        "inference sends a different prompt than the template writes",
        "The prompt that inference sends is not how the template writes the answered conversation (it opens a "
        "thought, say): the boundary was put where the two part.",
        "Use a template that writes an answered conversation as it asks for an answer; `data.turns: last` changes "
        "nothing here.",
        when=(
            "the prompt that inference sends differs from what the template writes in an answered conversation (for"
            " instance, it opens a thought); the boundary is where the two diverge. `data.turns: last` does not "
            "help"
        ),
        bit=26,
        holds=lambda result: result.prompt_differs,
    ),
    TokenCheck(
        "context_differs",
        "warning",
        "inference sends earlier turns differently than the template writes them",
        "Within a response of several turns the template writes earlier turns otherwise than inference would send "
        "them.",
        "Use a template that leaves earlier turns as they are, or set `data.turns: last`.",
        when=(
            "in a response of several turns, the template writes earlier turns differently than inference would "
            "send them. `data.turns: last` helps"
        ),
        bit=27,
        holds=lambda result: result.context_differs,
    ),
    *UNWRITTEN.values(),
    NOT_JSON,
    TokenCheck(
        "control_tokens_as_text",
        "warning",
        "a text spells out a control token",
        "A text spells out a control token of the template; it was encoded as text.",
        "Check whether a template was applied to the data before; if so, split it into messages.",
        when="a text spells out a control token of the template; it was encoded as text",
        bit=28,
        holds=lambda result: result.literals > 0,
    ),
    RESPONSES_CUT,
    TokenCheck(
        "rewritten",
        "info",
        "the template strips or rewrites what the assistant says",
        "What the assistant says does not stand in the template's text as the data has it: the template strips or "
        "rewrites it (thoughts, for instance).",
        "Look at some examples; if something is missing, use a template that keeps it.",
        when=(
            "the assistant's message does not appear in the template's output as it is in the data: the template "
            "strips or rewrites it (reasoning, for instance)"
        ),
        bit=25,
        holds=lambda result: result.rewritten,
    ),
    TokenCheck(
        "truncated",
        "info",
        "a prompt was truncated to fit `data.max_length`",
        "The beginning of a prompt was truncated to fit `data.max_length`.",
        "Nothing to do if the end of a prompt is enough; otherwise raise `data.max_length`.",
        when="a prompt was truncated to fit `data.max_length`",
        bit=30,
        holds=lambda result: result.truncated,
    ),
    TokenCheck(
        "joined_at_boundary",
        "info",
        "prompt and response were tokenized separately",
        "The tokenizer would have merged the end of the prompt with the beginning of the response; they were "
        "tokenized apart, so that the response begins with a token of its own.",
        "Nothing to do.",
        when="prompt and response had to be tokenized separately",
        bit=29,
        holds=lambda result: result.joined,
    ),
)
"""All that is looked for."""


def token_flags(result: Tokenized) -> int:
    """Return what is found of a tokenized pair, as the bits of `TOKEN_CHECKS`."""
    return sum([check.flag for check in TOKEN_CHECKS if check.holds(result)])
