"""A checkpoint of a run that trains an adapter holds the adapter alone, and goes on from nothing but what it should."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cli.modeling.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dpo_cli.system.storage import MANIFEST, sealed_folder
from dpo_cli.training.checkpoints import PRECISION
from dpo_cli.training.state import OPTIMIZER, REFERENCE
from tests.builders import save_adapter
from tests.conftest import build_llama, make_config, read_metrics, without_clock, write_rows
from tests.faults.trials import Gate, content, named
from tests.marks import slow_unless

MB = 10**6
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MOVES = {"type": "synced", "every_steps": 2, "alpha": 0.5}
SHORT = {"training": {"max_steps": 4, "micro_batch_tokens": 512}, "data": {"eval": None}}
LAST, BEFORE = "step-000004", "step-000002"


def train(forked_dpo, file, *arguments, status=0):
    """Train, and return what was said."""
    ended = forked_dpo("train", "--config", file, *arguments)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def aside(folder: Path) -> Path:
    """Return where a copy of a folder is kept; a worker that is given tests anew makes another of both."""
    return folder.with_name(f"{folder.name}-aside")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama, demo_rows, forked_dpo):
    """The folder of a run that went on from an adapter: that adapter, pairs, configuration and the run."""
    folder = tmp_path_factory.mktemp("whole")
    start = save_adapter(tiny_llama, folder / "start")
    adapter = {"rank": 4, "dropout": 0.2, "start": str(start)}
    pairs = write_rows(folder / "pairs.jsonl", demo_rows[:20])
    train(forked_dpo, make_config(folder, tiny_llama, pairs, adapter=adapter, **SHORT))
    shutil.copytree(folder, aside(folder))
    return folder


@pytest.fixture
def run(whole):
    """The run's configuration and its folder, both as they were in the end, whatever a test did to them."""
    shutil.rmtree(whole)
    shutil.copytree(aside(whole), whole)
    return whole / "run.yaml", whole / "runs" / "run"


def unfinish(run: Path) -> None:
    """Make a run what it was before its last two steps."""
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / LAST)


def size(folder: Path, *names: str) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if not names or path.name in names)


def tensor_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.parametrize("reference", ["cached", MOVES], ids=["cached", "synced"])
def test_a_checkpoint_takes_three_times_the_adapter_and_a_reference_that_moves_once_more(
    write_config, forked_dpo, tokenizer, tmp_path, reference
):
    """A, B and AdamW's two moments of each: 262,144 numbers in each of two layers. The base of 5 MB is not in it."""
    build_llama(tmp_path / "model", tokenizer, seed=0, hidden_size=256, intermediate_size=512)
    adapter = {"rank": 64}
    file = write_config("run", model={"name": str(tmp_path / "model")}, adapter=adapter, reference=reference, **SHORT)
    train(forked_dpo, file)
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / LAST
    adapter_bytes = tensor_bytes(checkpoint / ADAPTER_WEIGHTS)
    assert adapter_bytes == 2 * 262_144 * 4
    times, tokenizer_bytes = 3 + (reference == MOVES), size(checkpoint, *TOKENIZER)
    assert tokenizer_bytes
    assert size(checkpoint) < times * adapter_bytes + MB + tokenizer_bytes
    moments = load_file(checkpoint / OPTIMIZER)
    assert sum(tensor.nbytes for name, tensor in moments.items() if tensor.dim()) == 2 * adapter_bytes
    started = json.loads((checkpoint / "training_state.json").read_text())["stands_on"]
    assert (started.keys(), started[PRECISION]) == ({PRECISION, "model", "data", "settings"}, "float32")
    assert (checkpoint / REFERENCE).exists() == (reference == MOVES)
    if reference == MOVES:
        assert tensor_bytes(checkpoint / REFERENCE) == adapter_bytes


def test_a_checkpoint_is_a_folder_that_peft_loads_onto_the_base(run, tiny_llama):
    """After the last step it is the trained adapter, tensor by tensor, and both move the model's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, folder = run
    tokens = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    logits = {"base": base(tokens).logits}
    for name in ("final", f"checkpoints/{LAST}", f"checkpoints/{BEFORE}"):
        with warnings.catch_warnings():
            # PEFT asks transformers in a way that is deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder / name)
        with torch.no_grad():
            logits[name] = model(tokens).logits
    assert torch.equal(logits["final"], logits[f"checkpoints/{LAST}"])
    assert not torch.allclose(logits["final"], logits[f"checkpoints/{BEFORE}"], atol=1e-4)
    assert not torch.allclose(logits["final"], logits["base"], atol=1e-2)


def test_a_run_does_not_go_on_with_an_adapter_of_another_base(write_config, forked_dpo, tokenizer, tmp_path):
    model = build_llama(tmp_path / "model", tokenizer, seed=1)
    file = write_config("run", model={"name": str(model)}, adapter="lora", **SHORT)
    train(forked_dpo, file)
    unfinish(tmp_path / "runs" / "run")
    build_llama(model, tokenizer, seed=2)
    said = train(forked_dpo, file, "--resume", status=2)
    assert "error: the model is not the one that the run was started with" in said


def test_nor_where_the_adapter_that_it_went_on_from_is_another(run, forked_dpo, whole, tiny_llama):
    file, folder = run
    unfinish(folder)
    before = content(folder)
    save_adapter(tiny_llama, whole / "start", seed=2)
    said = train(forked_dpo, file, "--resume", status=2)
    start = whole / "start"
    assert f"error: the start adapter `{start}` is not the one that the run was started with" in said
    assert content(folder) == before


def test_nor_where_that_is_gone(run, forked_dpo, whole, tmp_path):
    """What a run began with is needed for as long as it goes on, as its model is; put back, it goes on."""
    (file, folder), start = run, whole / "start"
    final = content(folder / "final")
    unfinish(folder)
    start.rename(tmp_path / "moved")
    said = train(forked_dpo, file, "--resume", status=2)
    assert "adapter.start" in said
    assert "hint: " in said
    (tmp_path / "moved").rename(start)
    # Its own configuration has all settings, those that the adapter had included.
    assert "resuming after step 2" in train(forked_dpo, folder / "config.yaml", "--resume")
    assert content(folder / "final") == final


@pytest.mark.parametrize("setting", ["adapter.dropout=0.3", "adapter.start=null", "adapter=null", "model.quantize=nf4"])
def test_nor_with_other_settings_of_the_adapter(run, forked_dpo, setting):
    file, folder = run
    unfinish(folder)
    said = train(forked_dpo, file, "--resume", setting, status=2)
    assert f"`{setting.partition('=')[0]}` was" in said
    assert not (folder / "final").exists()


def reseal(folder: Path, change) -> None:
    """Change the adapter in a folder, and its manifest with it, as no fault of a disk would."""
    before = aside(folder)
    folder.rename(before)
    facts = {name: value for name, value in json.loads((before / MANIFEST).read_text()).items() if name != "files"}
    with sealed_folder(folder, facts) as temporary:
        shutil.copytree(before, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        save_file(change(load_file(before / ADAPTER_WEIGHTS)), temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(before)


OTHERS = {
    "names": lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()},
    "shapes": lambda tensors: {name: tensor[:-1].contiguous() for name, tensor in tensors.items()},
    "fewer": lambda tensors: dict(list(tensors.items())[:-1]),
    "more": lambda tensors: {**tensors, "one.more": torch.zeros(3)},
}
"""What the adapter in a checkpoint may have become."""


@pytest.mark.parametrize("what", slow_unless(lambda what: what == "shapes", OTHERS))
def test_nor_from_a_checkpoint_whose_adapter_has_other_names_or_shapes(run, forked_dpo, what):
    file, folder = run
    unfinish(folder)
    reseal(folder / "checkpoints" / BEFORE, OTHERS[what])
    said = train(forked_dpo, file, "--resume", status=2)
    assert said.count("error: ") == 1
    assert "the adapter does not fit" in said
    assert BEFORE in said
    assert not (folder / "final").exists()


DAMAGES = {"cut": lambda data: data[:-7], "flipped": lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]}


@pytest.mark.parametrize(
    ("name", "damage"),
    slow_unless(
        lambda case: case in ((ADAPTER_WEIGHTS, "flipped"), (ADAPTER_CONFIG, "cut")),
        itertools.product((ADAPTER_WEIGHTS, ADAPTER_CONFIG, OPTIMIZER), DAMAGES),
    ),
)
def test_a_damaged_adapter_is_passed_over_for_the_checkpoint_before(run, forked_dpo, name, damage):
    file, folder = run
    final, rows = content(folder / "final"), without_clock(read_metrics(folder))
    shutil.rmtree(folder / "final")
    damaged = folder / "checkpoints" / LAST / name
    damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    said = train(forked_dpo, file, "--resume")
    assert f"skipping the damaged checkpoint {damaged.parent}: {name}" in said
    assert "resuming after step 2" in said
    assert content(folder / "final") == final
    assert without_clock(read_metrics(folder)) == rows


def test_a_finished_run_is_finished_and_one_with_more_steps_goes_on(write_config, forked_dpo, tmp_path):
    """Under a constant rate it is the same as one that was started with more steps; the newest checkpoints stay."""
    settings = {"adapter": {"dropout": 0.3}, "checkpoints": {"every_steps": 1, "keep": 2}}
    steady = {"schedule": "constant", "warmup_ratio": 0, "micro_batch_tokens": 512}
    files = [
        write_config(name, **settings, data={"eval": None}, training={"max_steps": steps, **steady})
        for name, steps in (("short", 3), ("long", 6))
    ]
    for file in files:
        train(forked_dpo, file)
    short, long = (tmp_path / "runs" / file.stem for file in files)
    finished = forked_dpo("train", "--config", files[0], "--resume")
    assert finished.returncode == 0
    assert "is finished" in finished.stdout + finished.stderr
    assert {path.name for path in (short / "checkpoints").iterdir()} == {"step-000002", "step-000003"}
    train(forked_dpo, files[0], "--resume", "training.max_steps=6")
    weights = [(run / "final" / ADAPTER_WEIGHTS).read_bytes() for run in (short, long)]
    assert weights[0] == weights[1]
    assert {path.name for path in (short / "checkpoints").iterdir()} == {"step-000005", "step-000006"}


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "status"), slow_unless(lambda case: case == SIGNALS[1], SIGNALS))
def test_asked_to_stop_it_saves_the_adapter_and_goes_on_to_the_same(run, zygote, forked_dpo, tmp_path, number, status):
    file, folder = run
    final = content(folder / "final")
    shutil.rmtree(folder)
    gate = Gate(tmp_path / "gate")
    running = zygote.start("train", "--config", file, fault=named(gate.at_step(1)))
    gate.wait_for(running)
    running.send(number)
    running.until("stopping after this step")
    gate.open()
    assert running.wait().status == status
    done = read_metrics(folder)[-1]["step"]
    assert 1 <= done < 4
    assert (folder / "checkpoints" / f"step-{done:06d}" / ADAPTER_WEIGHTS).is_file()
    assert f"resuming after step {done}" in train(forked_dpo, file, "--resume")
    assert content(folder / "final") == final
