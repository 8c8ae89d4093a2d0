"""Files that somebody made up, digests and all: refused by what they say, or read as what they are.

They were found by `make fuzz`, or are of the kinds that it found.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.system.storage import MANIFEST
from dpo_cli.training.recorded_settings import RESOLVED
from tests.fuzz import parts
from tests.fuzz.changes import seal_again
from tests.fuzz.targets import TARGETS, Target, check, go_on_in, read_manifest_of, take_up


def check_run(spoil: Any, read: Any) -> None:
    """Check that a copy of the stopped run, spoilt, is read or refused."""

    def read_spoilt(value: object, folder: Path) -> None:
        shutil.copytree(parts.stopped_run(), folder, dirs_exist_ok=True)
        spoil(folder / "run")
        read(folder)

    check(Target(None, read_spoilt, 1, (parts.stopped_run,)), None)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "../x", "/etc/passwd", "x" * 300, "", "."])
def test_a_manifest_may_name_anything(name):
    content = json.dumps({"files": {name: {"bytes": 3, "sha256": "0"}}}).encode()
    check(Target(None, read_manifest_of, 1, reads_elsewhere=False), content)


@pytest.mark.parametrize(
    "text",
    [
        "a: 2001-99-99",
        "a: !!int x",
        f"a: {'9' * 5000}",
        f"a: {'[' * 5000}",
        "a: &a {b: *a}",
        "a: \0",
        "? {a: b}\n: c",
        "1: {2: 3}",
    ],
)
def test_a_run_s_configuration_may_be_any_text(text):
    check_run(lambda run: (run / "config.yaml").write_text(RESOLVED + text), take_up)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"step": 1, "x": [NaN]}',
        '{"step": 1, "x": {"y": 1e999}}',
        '{"step": 1, "x": "\\ud800"}',
        '{"step": 1e999}',
        '{"step": true}',
        f'{{"step": {"9" * 400}}}',
    ],
)
def test_a_line_of_metrics_may_be_anything(line):
    check_run(lambda run: (run / "metrics.jsonl").write_text(line + "\n"), take_up)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "3"),
        ("stands_on", []),
        ("surroundings", None),
        ("memory", "x"),
        ("optimizer", [{}]),
        ("schedule", {}),
    ],
)
def test_a_checkpoint_s_state_may_say_anything(name, value):
    def spoil(run: Path) -> None:
        shutil.rmtree(run / "checkpoints" / "step-000002")
        state = run / "checkpoints" / "step-000003" / "training_state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), name: value}))
        seal_again(state.with_name(MANIFEST))

    check_run(spoil, go_on_in)


@pytest.mark.parametrize(
    "override",
    [
        "model=!!timestamp x",
        "loss.beta=!!float x",
        "training=!!python/name:os.system",
        "data.train=!!binary x",
        "loss=[&a [*a]]",
        f"training.epochs={'[' * 5000}",
    ],
)
def test_an_override_may_be_any_text(override):
    check(TARGETS["configurations"], (b"model: a/b\n", [override]))
