"""Configurations: what the schema allows with a few things changed, YAML in pieces, overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from hypothesis import strategies as st

from dpo_cli.config import json_schema
from tests.fuzz.changes import CUTS, EDITS, WORDS, Change

_NAMES = st.sampled_from(["pairs.jsonl", "model", "data", "a/b", "missing.csv", "data/*.jsonl"])

_PIECES = (
    *("model: model\n", "model:\n", "  name: model\n", "data:\n", "  train: pairs.jsonl\n", "loss: ", "- ", "? ", ": "),
    *("[", "]", "{", "}", ", ", "\n", "\t", "  ", "'", '"', "#", "|\n", ">-\n", "%YAML 9.9\n", "---\n", "...\n"),
    *("&a ", "*a", "<<: ", "!!set ", "!!binary ", "!!omap ", "!!timestamp ", "!!python/object/apply:os.system "),
    *("2001-99-99", "0x", "1_0", "190:20:30", ".inf", ".nan", "1e400", "=", "~", "\\ud800", "\\x1b", "\ufeff", "\0"),
    *("9" * 4500, "[" * 2000, "é", "\x85", "\u2028"),
)


def _of_schema(schema: Mapping[str, Any], groups: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Draw what a JSON schema allows.

    Args:
        schema: The schema.
        groups: The schemas that it refers to, by name.
    """
    if "$ref" in schema:
        return _of_schema(groups[schema["$ref"].rpartition("/")[2]], groups)
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if ways := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([_of_schema(way, groups) for way in ways])
    kind = schema.get("type")
    if kind == "object" and "properties" not in schema:
        names = _of_schema(schema.get("propertyNames", {"type": "string"}), groups)
        return st.dictionaries(names, _of_schema(schema["additionalProperties"], groups), max_size=3)
    if kind == "object":
        members = {name: _of_schema(inner, groups) for name, inner in schema["properties"].items()}
        needed = {name: members.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=members)
    if kind == "array":
        return st.lists(_of_schema(schema["items"], groups), max_size=3)
    return _SCALARS[kind](schema)


def _numbers(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Draw numbers at and around the edges of what is allowed."""
    edges = [schema[name] for name in schema if "inimum" in name or "aximum" in name]
    return st.sampled_from([0.5, 1, 2, 16, *edges])


_SCALARS = {
    "boolean": lambda schema: st.booleans(),
    "integer": _numbers,
    "null": lambda schema: st.none(),
    "number": _numbers,
    "string": lambda schema: _NAMES,
}

_SCHEMA = json_schema()
TREES = _of_schema(_SCHEMA, _SCHEMA["$defs"])
TEXTS = st.lists(st.sampled_from(_PIECES) | st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)

_KEYS = st.sampled_from(
    [
        *(
            "model",
            "model.name",
            "data.train",
            "data.train.0.weight",
            "data.train.9",
            "loss",
            "loss.0.beta",
            "loss.beta.x",
        ),
        *(
            "loss.divergence.type",
            "training.epochs",
            "training",
            "output_dir",
            "x",
            "",
            ".",
            "a..b",
            "loss.-1",
            "loss.²",
        ),
    ]
)
OVERRIDES = st.lists(
    st.builds("{}={}".format, _KEYS, TEXTS) | TEXTS | st.text(max_size=6),
    max_size=3,
)

NAMES = st.sampled_from([*WORDS, "saved", "saved/train", "saved/*", "saved/train/data.jsonl"]) | TEXTS
"""What may be written where a source is named."""

_TREES = st.builds(
    lambda tree, edits: Change(edits).to_text(tree, lambda changed: yaml.safe_dump(changed, sort_keys=False)),
    TREES,
    st.lists(EDITS, max_size=3),
)
_FILES = st.one_of(
    _TREES,
    TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.builds(lambda data, cuts: Change((), cuts).to_bytes(data), _TREES, st.lists(CUTS, max_size=3)),
)
FILES_AND_OVERRIDES = st.tuples(_FILES, OVERRIDES)
"""The bytes of a configuration file, and what stands behind it on the command line."""
