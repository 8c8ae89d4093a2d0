"""`dpo eval` reads the reference's weights only where the cache lacks an answer, or its files may have changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import dpo_cli
from dpo_cli.modeling import policy as policies
from dpo_cli.modeling.folders import identities
from dpo_cli.system.storage import cache_root
from tests.conftest import build_llama, write_rows


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models whose weights are read."""
    names: list[str] = []
    load = policies.load_policy

    def noted(name: str, *how: Any) -> Any:
        names.append(str(name))
        return load(name, *how)

    monkeypatch.setattr(policies, "load_policy", noted)
    monkeypatch.setattr(identities, "_SETTLED_SECONDS", 0.0)
    return names


@pytest.fixture
def run(write_config: Any, tiny_llama: Path, tmp_path: Path, loads: list[str]) -> tuple[Path, Path, Path]:
    """A configuration that was trained, its model, and what was trained."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    file = write_config(model=str(model), training={"max_steps": 2}, reference="cached")
    list(dpo_cli.train(file))
    loads.clear()
    return file, model, tmp_path / "runs/run/final"


def test_the_base_is_not_read_where_the_cache_answers(run: Any, loads: list[str]) -> None:
    file, model, final = run
    known = dpo_cli.evaluate(file)
    assert loads == [str(final)]
    loads.clear()
    shutil.rmtree(cache_root() / "identities")
    assert dpo_cli.evaluate(file) == known
    assert loads == [str(model), str(final)]
    loads.clear()
    # That evaluation kept what it found out.
    assert dpo_cli.evaluate(file) == known
    assert loads == [str(final)]


def test_a_base_whose_files_were_touched_is_read_again(run: Any, loads: list[str]) -> None:
    file, model, final = run
    before = dpo_cli.evaluate(file)
    os.utime(model / "model.safetensors")
    loads.clear()
    assert dpo_cli.evaluate(file) == before
    assert loads == [str(model), str(final)]


def test_other_weights_of_the_same_size_and_date_are_another_reference(
    run: Any, loads: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    file, model, final = run
    before, weights = dpo_cli.evaluate(file), model / "model.safetensors"
    was = weights.stat()
    other = build_llama(tmp_path / "other", tokenizer, seed=5) / "model.safetensors"
    weights.write_bytes(other.read_bytes())
    os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    loads.clear()
    assert dpo_cli.evaluate(file)["loss"] != before["loss"]
    assert loads == [str(model), str(final)]


def test_pairs_that_the_cache_does_not_know_need_the_base(
    run: Any, loads: list[str], demo_rows: Any, tmp_path: Path
) -> None:
    file, model, final = run
    others = write_rows(tmp_path / "others.jsonl", demo_rows[-6:])
    dpo_cli.evaluate(file, data=str(others))
    assert loads == [str(model), str(final)]
    loads.clear()
    dpo_cli.evaluate(file, data=str(others))
    assert loads == [str(final)]


@pytest.mark.parametrize("content", ["", "[]", '{"identity": 3, "files": {}}', '{"identity": "x", "files": {}}'])
def test_a_record_that_is_no_record_is_not_believed(run: Any, loads: list[str], content: str) -> None:
    file, model, final = run
    before = dpo_cli.evaluate(file)
    for record in (cache_root() / "identities").iterdir():
        record.write_text(content)
    loads.clear()
    assert dpo_cli.evaluate(file) == before
    assert loads == [str(model), str(final)]


def test_a_file_that_has_just_been_written_is_not_remembered(
    run: Any, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written once more within one tick of the clock."""
    file, model, final = run
    monkeypatch.setattr(identities, "_SETTLED_SECONDS", 600.0)
    os.utime(model / "config.json")
    for _ in range(2):
        loads.clear()
        dpo_cli.evaluate(file)
        assert loads == [str(model), str(final)]
