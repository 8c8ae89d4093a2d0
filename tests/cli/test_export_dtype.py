"""`final/` has the dtype that came in; `dpo export --dtype` writes a checkpoint, or a merged model, in another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.in_process import call
from tests.conftest import build_llama, make_config, write_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any, tokenizer: Any, demo_rows: Any) -> Path:
    """A folder with a run of all weights of a model that came in bfloat16."""
    folder: Path = tmp_path_factory.mktemp("bfloat16")
    model = build_llama(folder / "model", tokenizer, seed=0)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    write_rows(folder / "pairs.jsonl", demo_rows[:40])
    training = {"learning_rate": 1e-3, "max_steps": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_config(folder, Path("model"), Path("pairs.jsonl"), training=training, output_dir="runs/run")
        assert call("train run.yaml") == 0
    return folder


@pytest.fixture
def project(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


LAST = "runs/run/checkpoints/step-000003"


def test_the_trained_model_is_rounded_once_and_the_checkpoint_is_not(project: Path) -> None:
    final, exact = weights("runs/run/final"), weights(LAST)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert final.keys() == exact.keys() == weights("model").keys()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in final.items())
    assert any(not torch.equal(tensor.float(), exact[name]) for name, tensor in final.items())
    assert any(not torch.equal(tensor, weights("model")[name]) for name, tensor in final.items())
    assert json.loads(Path("runs/run/final/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads(Path(LAST, "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained("runs/run/final").dtype == torch.bfloat16
    assert (
        "bfloat16, rounded from float32 after the figures were measured" in Path("runs/run/final/README.md").read_text()
    )


@pytest.mark.parametrize("how", ["", "--dtype bfloat16"])
def test_the_trained_model_is_written_as_it_is(project: Path, tmp_path: Path, how: str) -> None:
    assert call(f"export runs/run/final --to {tmp_path}/out {how}") == 0
    assert call(f"export runs/run --to {tmp_path}/again") == 0
    final = Path("runs/run/final")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (final / name).read_bytes(), name
        assert (tmp_path / "again" / name).read_bytes() == (final / name).read_bytes(), name


@pytest.mark.parametrize(("setting", "gone"), [("data.train", "pairs.jsonl"), ("model.name", "model")])
def test_a_run_without_what_it_read_is_exported_on_made_up_tokens(
    project: Path, tmp_path: Path, capsys: Any, setting: str, gone: str
) -> None:
    """A model of all weights is complete by itself; where settings say where its data is, that has to be there."""
    Path(gone).rename("elsewhere")
    try:
        assert call(f"export runs/run --to {tmp_path}/out") == 0
        assert call(f"export runs/run --to {tmp_path}/other {setting}=nowhere.jsonl") == 2
    finally:
        Path("elsewhere").rename(gone)
    said = capsys.readouterr()
    assert re.search(rf"warning: the pairs of the run are not scored, but made-up tokens.*{gone}", said.err)
    assert "difference" not in said.out and "10 of 10 greedy answers" in said.out
    assert "nowhere.jsonl" in said.err


def test_a_run_says_that_it_rounded_and_how_to_have_what_was_not(project: Path, capsys: Any) -> None:
    assert call("train run.yaml output_dir=runs/told") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "`runs/told/final` has the weights in bfloat16" in said
    assert "`dpo export runs/told --dtype float32 --to FOLDER`" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_checkpoint_is_written_in_a_dtype(project: Path, tmp_path: Path, capsys: Any, dtype: str) -> None:
    assert call(f"export runs/run --dtype {dtype} --to {tmp_path}/out") == 0
    out, exact = weights(f"{tmp_path}/out"), weights(LAST)
    assert all(torch.equal(tensor, exact[name].to(getattr(torch, dtype))) for name, tensor in out.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(loaded.dtype) == f"torch.{dtype}"
    theirs, ours = (Path(folder, "README.md").read_text() for folder in ("runs/run/final", tmp_path / "out"))
    figures = theirs[theirs.index("| pairs | 8 |") : theirs.index("## Intended use")].strip().splitlines()
    for row in figures:
        # The figures before training are the run's, and so are those after it unless weights were rounded.
        assert "|".join(row.split("|")[: 4 if dtype == "float32" else 3]) in ours
    assert f"| weights | {dtype}" in ours
    names = {path.name for path in Path("runs/run/final").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    if dtype == "bfloat16":
        assert (tmp_path / "out/model.safetensors").read_bytes() == Path(
            "runs/run/final/model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(
    ("named", "how", "said", "hint"),
    [
        ("runs/run/final", "--dtype float32", "rounded already, to bfloat16", "name the run's folder"),
        ("runs/run/final", "--dtype float16", "rounded already, to bfloat16", "name the run's folder"),
        ("runs/run", "--dtype float64", "`float64` is not a dtype", "float32, bfloat16, float16"),
        ("runs/run", "--merge --dtype float32", "no adapter to merge", "leave `--merge` out"),
        ("runs/run/checkpoints", "", "has no config.json", "one of its checkpoints"),
    ],
)
def test_what_cannot_be_written_is_said(
    project: Path, tmp_path: Path, capsys: Any, named: str, how: str, said: str, hint: str
) -> None:
    assert call(f"export {named} {how} --to {tmp_path}/out") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and hint in error
    assert not (tmp_path / "out").exists()
