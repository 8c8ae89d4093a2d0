"""Rows: whatever JSON can say, under the columns that shapes look at."""

from __future__ import annotations

from hypothesis import strategies as st

from dpo_cli.data.pairs.shapes import FORMATS
from tests.conftest import ROW_OF

COLUMNS = sorted({name for row in ROW_OF.values() for name in row})
EXTRAS = [
    "system",
    "history",
    "ranks",
    "messages",
    "weight",
    "margin",
    "source",
    "category",
    "tools",
    "chat_template_kwargs",
]

_WORDS = st.sampled_from(
    [
        *(
            "",
            "a",
            "user",
            "assistant",
            "GPT",
            "tool",
            "true",
            "{}",
            "\ud800",
            '[{"role": "user"',
            "[{'role': 'user'}]",
        ),
        *("\n\nHuman: a\n\nAssistant: b", "<|im_end|>", "<|im_start|>assistant\n", "\ufdd0", "\x1b[2J", "\0"),
    ]
)
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.text(max_size=8) | st.just(10**400)
_KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "tool_calls", "name", "thinking", "weight", "train", "\udc00"]
) | st.text(max_size=4)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "judge", "function_call"]), "content": VALUES},
        optional={"tool_calls": VALUES, "reasoning": _SCALARS},
    ),
    max_size=4,
)
PARTS = st.dictionaries(st.sampled_from([*COLUMNS, *EXTRAS]), VALUES | _MESSAGES, max_size=4)
"""Columns of a row: a row by themselves, or what a good one has otherwise."""

SHAPES = st.sampled_from(sorted(FORMATS))
