"""A configuration is plain data: nothing in it runs, and it takes no more time and memory than its size deserves."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.test_bad_inputs import TRAIN
from tests.security.conftest import within


def laughing(levels: int) -> str:
    """Return YAML whose last value holds ten to the `levels` others."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


MERGING = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 20))
BOMBS = {
    "a tag that runs": ("model: !!python/object/apply:os.mkdir [executed]\n", 1),
    "a tag that names": ("model: a\ndata:\n  train: !!python/name:os.system\n", 3),
    "a tag of somebody's own": ("model: a\ndata: !own {a: b}\n", 2),
    "a billion laughs": (laughing(10), None),
    "merge keys": (MERGING, 2),
    "an anchor within itself": ("model: &a\n  name: *a\n", None),
    "nested lists": ("model: a\ndata: " + "[" * 100_000, 2),
    "nested groups": ("model: a\ndata: " + "{a: " * 100_000, 2),
    "nested blocks": ("model: a\n" + "- " * 100_000, None),
    "ten million digits": ("training:\n  epochs: " + "1" * 10_000_000, None),
    "a million digits": ("model: a\ntraining:\n  epochs: " + "1" * 1_000_000, 3),
    "a number to the base 60": ("model: a\ntraining:\n  epochs: " + "1:" * 300_000 + "1", 3),
    "many settings": ("".join(f"a{n}: 1\n" for n in range(60_000)), 10_000),
    "many values": ("model: [" + "a, " * 300_000 + "]", 1),
    "a number that is none": ("model: a\ndata: !!int ''\n", 2),
    "a date that is none": ("model: a\ndata: !!timestamp x\n", 2),
    "a list as a name": ("model: a\n? [" + "[" * 200 + "]" * 200 + "]\n: c\n", 2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_configuration_that_is_a_bomb_is_one_error_with_its_line(project, dpo, name):
    content, line = BOMBS[name]
    Path("run.yaml").write_text(content)
    with within(10, megabytes=200):
        result = dpo(TRAIN)
    assert result.status == 2
    ((_, hint),) = result.errors
    assert hint
    assert f"run.yaml{f', line {line}' if line else ''}\n" in result.said or line is None
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [executed]",
        "{a: &a {x: 1}, b: {<<: [*a, *a]}}",
        "[" * 50_000,
        "1" * 50_000,
        "{" + laughing(9).replace("\n", ", ") + "}",
    ],
    ids=["tag", "merge", "nested", "digits", "laughs"],
)
def test_an_override_that_is_a_bomb_is_one_error(project, dpo, value):
    with within(5, megabytes=200):
        result = dpo(f"{TRAIN} {shlex.quote(f'tracking={value}')}")
    assert result.status == 2
    ((error, hint),) = result.errors
    assert "`tracking` is not valid YAML" in error
    assert hint
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", ["model: &a {b: *a}\n", "data: " + "[" * 5000 + "\n"], ids=["itself", "nested"])
def test_the_configuration_of_a_run_that_is_resumed_may_be_a_bomb(project, started, dpo, content):
    shutil.copytree(started / "runs", "runs")
    file = Path("runs/run/config.yaml")
    file.write_text(file.read_text().splitlines(keepends=True)[0] + content)
    with within(10, megabytes=200):
        result = dpo(f"{TRAIN} --resume")
    assert result.status == 2
    assert result.errors[0][1]
