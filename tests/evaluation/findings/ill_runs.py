"""Short real runs of a tiny model, each ill in another way; `ILL` lists what is to be found in each."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import dpo_cli
from tests.conftest import make_config, write_rows

Row = dict[str, Any]


def swapped(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def with_opening(rows: Sequence[Row], num_rows: int) -> list[Row]:
    """Return many rows in which an opening tells the chosen response, and all else is chance."""
    return [
        {"instruction": f"Say {number}.", "chosen": "!!!!!!!!!! " + row["chosen"][:9], "rejected": row["chosen"][:20]}
        for number, row in ((number, rows[number % len(rows)]) for number in range(num_rows))
    ]


def third_swapped(rows: Sequence[Row]) -> list[Row]:
    return [swapped(row) if number % 3 == 0 else row for number, row in enumerate(rows[:60])]


def every_other_swapped(rows: Sequence[Row]) -> list[Row]:
    return [swapped(row) if number % 2 else row for number, row in enumerate(rows)]


def one_heavy(rows: Sequence[Row]) -> list[Row]:
    """Return pairs of which one weighs as much as thousands."""
    return [{**row, "weight": 3000.0 if number == 150 else 1.0} for number, row in enumerate(rows[:180])]


def odd_category(rows: Sequence[Row]) -> list[Row]:
    return [
        {**(swapped(row) if number % 4 == 0 else row), "category": "odd" if number % 4 == 0 else "other"}
        for number, row in enumerate(rows)
    ]


def one_after_the_other(rows: Sequence[Row]) -> list[Row]:
    return [{**row, "source": "first" if number < 100 else "second"} for number, row in enumerate(rows[:200])]


SPEECHLESS = "one whose layers do nothing"
"""In place of a model: the tiny one, of which every token is followed by the same one, wherever it is."""

LARGE_STEPS = {"pairs_per_step": 16, "warmup_ratio": 0, "schedule": "constant"}
ONE_IN_FOUR = {"pairs_per_step": 4, "learning_rate": 3e-3, "schedule": "constant", "epochs": 8}

ILL: dict[str, tuple[Callable[[Sequence[Row]], list[Row]], dict[str, Any], set[str]]] = {
    "learning rate 0.1": (
        lambda rows: list(rows[:200]),
        {"training": {**LARGE_STEPS, "learning_rate": 0.1, "max_steps": 10}},
        {"rate_too_high", "both_fall", "saturated"},
    ),
    "learning rate 1e-8": (
        lambda rows: list(rows[:330]),
        {"training": {**LARGE_STEPS, "learning_rate": 1e-8, "max_steps": 20}},
        {"rate_too_low"},
    ),
    "every other label swapped": (
        every_other_swapped,
        {"training": {**LARGE_STEPS, "learning_rate": 1e-4, "max_steps": 28}},
        {"stuck_at_ln2"},
    ),
    "a pair that weighs thousands": (
        one_heavy,
        {"training": {**LARGE_STEPS, "learning_rate": 1e-5, "shuffle": False, "epochs": 1}},
        {"gradient_spike"},
    ),
    "an opening gives it away": (
        lambda rows: with_opening(rows, 1600),
        {"training": {**LARGE_STEPS, "learning_rate": 3e-3, "max_steps": 8}},
        {"easy_pairs"},
    ),
    "a third of few labels swapped": (
        third_swapped,
        {"data": {"eval": 0.4}, "training": ONE_IN_FOUR, "evaluation": {"every_steps": 9}},
        {"overfitting", "held_out_loss_rose"},
    ),
    "held-out labels swapped": (
        lambda rows: list(rows[:200]),
        {"data": {"eval": "swapped.jsonl"}, "training": {**LARGE_STEPS, "learning_rate": 1e-3, "max_steps": 8}},
        {"held_out_accuracy_fell", "held_out_loss_rose"},
    ),
    "chosen falls": (
        lambda rows: list(rows[:200]),
        {
            "data": {"eval": 0.2},
            "training": {**LARGE_STEPS, "learning_rate": 1e-2, "max_steps": 8},
            "evaluation": {"every_steps": 2},
        },
        {"chosen_falls"},
    ),
    "a category of swapped labels": (
        lambda rows: odd_category(rows[:320]),
        {"data": {"eval": 0.25}, "training": {**LARGE_STEPS, "learning_rate": 1e-3, "max_steps": 12}},
        {"category_reversed"},
    ),
    "chosen responses that repeat a phrase": (
        lambda rows: [{**row, "chosen": "very good, " * 20} for row in rows[:200]],
        {
            "data": {"eval": 0.1},
            "loss": "sft",
            "reference": "none",
            "training": {**LARGE_STEPS, "learning_rate": 1e-2, "max_steps": 12},
            "evaluation": {"every_steps": 6, "max_new_tokens": 100},
        },
        {"repetition"},
    ),
    "answers that become one word": (
        lambda rows: [{**row, "chosen": "Yes.", "rejected": row["chosen"]} for row in rows[:200]],
        {
            "data": {"eval": "swapped.jsonl"},
            "loss": "sft",
            "reference": "none",
            "training": {**LARGE_STEPS, "learning_rate": 1e-2, "max_steps": 12},
            "evaluation": {"samples": 8, "max_new_tokens": 100},
        },
        {"lengths_drift"},
    ),
    "a model without a word": (
        lambda rows: list(rows[:60]),
        {
            "model": SPEECHLESS,
            "data": {"eval": 0.2},
            "training": {**LARGE_STEPS, "learning_rate": 1e-4, "max_steps": 2},
            "evaluation": {"max_new_tokens": 100},
        },
        {"nonsense_before"},
    ),
    "sources one after the other": (
        one_after_the_other,
        {"training": {**LARGE_STEPS, "learning_rate": 1e-4, "shuffle": False, "epochs": 1}},
        {"one_source"},
    ),
}
"""The rows, the settings, and what is to be found."""


def without_layers(model: Path, folder: Path) -> Path:
    """Copy a model into a folder, with layers that add nothing to what they are given."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    quiet = {name: one * ("o_proj" not in name and "down_proj" not in name) for name, one in weights.items()}
    save_file(quiet, folder / "model.safetensors", {"format": "pt"})
    return folder


def trained(folder: Path, model: Path, rows: Sequence[Row], /, **groups: Any) -> tuple[Path, list[str]]:
    """Train; return the run's folder and what it warned of."""
    return folder / "runs" / "run", warned(configured(folder, model, rows, **groups))


def configured(folder: Path, model: Path, rows: Sequence[Row], /, **groups: Any) -> Path:
    """Write the rows and a configuration; return its file."""
    pairs = write_rows(folder / "pairs.jsonl", rows)
    if groups.get("data", {}).get("eval") == "swapped.jsonl":
        held_out = write_rows(folder / "swapped.jsonl", [swapped(row) for row in rows[:40]])
        groups = {**groups, "data": {"eval": str(held_out)}}
    if groups.get("model") == SPEECHLESS:
        model, groups = without_layers(model, folder / "speechless"), {**groups, "model": {}}
    quiet = {"data": {"eval": None}, "checkpoints": {"every_steps": 1000, "at_end": False}}
    return make_config(folder, model, pairs, **{**quiet, **groups})


def warned(config: Path, until: int | None = None, **how: Any) -> list[str]:
    """Train by a configuration, until a step is taken; return what it warned of."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dpo_cli")
    logger.addHandler(handler)
    try:
        with contextlib.closing(dpo_cli.train(config, **how)) as results:  # type: ignore[type-var]
            for _ in itertools.islice(results, until):
                pass
    finally:
        logger.removeHandler(handler)
    return said
