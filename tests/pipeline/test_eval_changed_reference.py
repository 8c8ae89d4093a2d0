"""`dpo eval` says so where the reference is not the one that the run began with: what `--resume` refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.errors import UserError
from dpo_cli.modeling.folders import identities
from dpo_cli.pipeline.beginning import noted_by
from tests.builders import save_adapter
from tests.conftest import build_llama

# PEFT asks transformers in a way that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CHANGED = "is not what it was when the run began"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model of the test's own, whose weights may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def move(file: Path) -> None:
    """Change one weight by a little."""
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def warned(file: Path, caplog: pytest.LogCaptureFixture, **asked: Any) -> list[str]:
    """Evaluate, and return what is said of changes."""
    caplog.clear()
    dpo_cli.evaluate(file, **asked)
    return [record.getMessage() for record in caplog.records if CHANGED in record.getMessage()]


def refused(file: Path) -> str:
    """Return why the run of a configuration cannot go on."""
    file.write_text(file.read_text().replace("max_steps: 2", "max_steps: 3"))
    with pytest.raises(UserError) as refusal:
        list(dpo_cli.train(file, extend=True))
    return str(refusal.value)


@pytest.mark.parametrize("reference", ["cached", "frozen"])
def test_another_base(write_config: Any, model: Path, caplog: pytest.LogCaptureFixture, reference: str) -> None:
    file = write_config(model=str(model), training={"max_steps": 2}, reference=reference)
    list(dpo_cli.train(file))
    assert warned(file, caplog) == []
    assert warned(file, caplog, model=str(model)) == []
    move(model / "model.safetensors")
    (line,) = warned(file, caplog)
    assert f"`model.name` `{model}` {CHANGED}" in line
    assert "the model is not the one that the run was started with" in refused(file)


def test_another_base_whose_answers_are_cached(
    write_config: Any, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has asked it since: its weights need not be read for the figures, and are for the comparison."""
    monkeypatch.setattr(identities, "_SETTLED_SECONDS", 0.0)
    settings = {"model": str(model), "training": {"max_steps": 2}}
    file = write_config(**settings)
    list(dpo_cli.train(file))
    move(model / "model.safetensors")
    other = write_config("other", **settings)
    list(dpo_cli.train(other))
    assert warned(other, caplog) == []
    assert len(warned(file, caplog)) == 1


def test_another_model_of_the_reference(
    write_config: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = build_llama(tmp_path / "reference", tokenizer, seed=5)
    file = write_config(training={"max_steps": 2}, reference={"type": "frozen", "model": str(other)})
    list(dpo_cli.train(file))
    assert warned(file, caplog) == []
    move(other / "model.safetensors")
    (line,) = warned(file, caplog)
    assert f"`reference.model` `{other}` {CHANGED}" in line


def test_another_start_adapter(
    write_config: Any, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = save_adapter(tiny_llama, tmp_path / "start")
    file = write_config(training={"max_steps": 2}, adapter={"type": "lora", "start": str(start)})
    list(dpo_cli.train(file))
    assert warned(file, caplog) == []
    move(start / "adapter_model.safetensors")
    (line,) = warned(file, caplog)
    assert f"`adapter.start` `{start}` {CHANGED}" in line


@pytest.mark.parametrize("at_end", [True, False])
def test_of_a_run_without_checkpoints_nothing_is_known(
    write_config: Any, model: Path, caplog: pytest.LogCaptureFixture, at_end: bool
) -> None:
    checkpoints = {"every_steps": 100, "at_end": at_end}
    file = write_config(model=str(model), training={"max_steps": 2}, checkpoints=checkpoints)
    list(dpo_cli.train(file))
    move(model / "model.safetensors")
    assert len(warned(file, caplog)) == at_end


@pytest.mark.parametrize("weights", [{"dtype": "bfloat16"}, {"weights": "split"}, {"eos_token": "<|endoftext|>"}])
def test_the_same_base_held_or_ended_otherwise_is_the_same(
    write_config: Any, model: Path, caplog: pytest.LogCaptureFixture, weights: dict[str, str]
) -> None:
    settings = {"training": {"max_steps": 2}, "reference": "frozen"}
    file = write_config(model={"name": str(model), **weights}, **settings)
    list(dpo_cli.train(file))
    assert warned(file, caplog) == []
    if "eos_token" not in weights:
        # The same run, looked at on another machine.
        assert warned(write_config(model=str(model), **settings), caplog) == []
    move(model / "model.safetensors")
    assert len(warned(write_config(model={"name": str(model), **weights}, **settings), caplog)) == 1


@pytest.mark.parametrize("then", ["float32", "bfloat16"])
def test_a_reference_of_an_adapter_in_another_precision_is_no_other(
    write_config: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, then: str
) -> None:
    """Beside an adapter, models are rounded to what is computed in; of rounded weights nothing is known."""
    other = build_llama(tmp_path / "reference", tokenizer, seed=5)
    settings = {"training": {"max_steps": 2}, "adapter": "lora", "reference": {"type": "frozen", "model": str(other)}}
    file = write_config(model={"dtype": then}, **settings)
    list(dpo_cli.train(file))
    assert warned(file, caplog) == []
    now = "bfloat16" if then == "float32" else "float32"
    assert warned(write_config(model={"dtype": now}, **settings), caplog) == []


@pytest.mark.parametrize("fault", [PermissionError, NotADirectoryError, OSError])
def test_a_folder_that_cannot_be_read_has_noted_nothing(
    write_config: Any, monkeypatch: pytest.MonkeyPatch, fault: type[OSError]
) -> None:
    def refuse(path: Path) -> Any:
        raise fault(13, "refused", str(path))

    config = load_config(write_config())
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert noted_by(config) == {}


@pytest.mark.parametrize("name", ["runs/\0", "x" * 300], ids=["NUL", "too long"])
def test_a_name_that_no_folder_has_is_scored_without_a_warning(
    write_config: Any, tiny_llama: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Nothing is written to `output_dir`: whatever it is called hinders no evaluation."""
    assert warned(write_config(output_dir=name), caplog, model=str(tiny_llama)) == []
