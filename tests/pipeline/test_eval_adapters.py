"""`dpo eval` with adapters: the figures of the run, and those of PEFT, with the base loaded once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.modeling import policy as policies
from dpo_cli.reporting.console import Console
from tests.builders import prepare_pairs, save_adapter
from tests.conftest import build_llama, read_metrics

# PEFT asks transformers in a way that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA = {"type": "lora", "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tiny_llama):
    """An adapter of other rank and layers than the runs' that PEFT has saved."""
    return save_adapter(tiny_llama, tmp_path_factory.mktemp("foreign"), rank=3, target_modules=["q_proj", "down_proj"])


class Loads(list):
    """The names of the models whose weights are read, and how these are held."""

    def __init__(self):
        super().__init__()
        self.held, self._load = [], policies.load_policy

    def __call__(self, name, trust, held, *device):
        self.append(str(name))
        self.held.append(str(held))
        return self._load(name, trust, held, *device)


@pytest.fixture
def loads(monkeypatch):
    noted = Loads()
    monkeypatch.setattr(policies, "load_policy", noted)
    return noted


def trained(file):
    list(dpo_cli.train(file))
    return Path(load_config(file).output_dir)


def numbers(row):
    return {name: value for name, value in row.items() if isinstance(value, float) and name != "epoch"}


@pytest.mark.parametrize(
    ("adapter", "reference"),
    [
        (LORA, "cached"),
        ({**LORA, "dora": True}, "frozen"),
        ({**LORA, "rslora": True, "dropout": 0.3}, {"type": "synced", "every_steps": 2}),
        ({"type": "lora", "start": "foreign"}, "cached"),
    ],
    ids=["lora", "dora", "rslora", "start"],
)
def test_the_figures_are_those_of_the_run_and_the_base_is_loaded_once(
    write_config, adapter, reference, foreign, tiny_llama, loads
):
    if "start" in adapter:
        adapter = {**adapter, "rank": 3, "alpha": 32, "targets": ["q_proj", "down_proj"], "start": str(foreign)}
    file = write_config(adapter=adapter, reference=reference, training={"max_steps": 4}, evaluation={"every_steps": 2})
    run = trained(file)
    rows = {row["step"]: row for row in read_metrics(run, "eval")}
    for model, step in ((run / "final", 4), (run / "checkpoints" / "step-000002", 2)):
        loads.clear()
        found = dpo_cli.evaluate(file, model=str(model))
        assert loads == [str(tiny_llama)]
        assert {name: found[name] for name in numbers(rows[step])} == pytest.approx(numbers(rows[step]), abs=1e-6)
        assert (found["model"], found["base"]) == (str(model), str(tiny_llama))
    begun = f"{tiny_llama} with {foreign}" if "start" in adapter else str(tiny_llama)
    assert found["reference"] == begun


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_adapters_are_put_beside_the_quantized_base_and_whole_models_are_not_quantized(
    write_config, quantize, foreign, tiny_llama, tokenizer, tmp_path, loads, capfd
):
    """The figures are those of the run, to the bit where the reference is asked in the same batches."""
    adapter = {"type": "lora", "rank": 3, "alpha": 32, "targets": ["q_proj", "down_proj"], "start": str(foreign)}
    model = {"name": str(tiny_llama), "quantize": quantize}
    file = write_config(adapter=adapter, model=model, reference="frozen", training={"max_steps": 2})
    run = trained(file)
    assert loads.held == [quantize]
    capfd.readouterr()
    found = dpo_cli.evaluate(file, console=Console())
    assert found["quantize"] == quantize
    assert f"base       {tiny_llama} ({quantize})\n" in capfd.readouterr().out
    assert loads.held == [quantize] * 2
    assert numbers(found) == pytest.approx(numbers(read_metrics(run, "eval")[-1]), abs=1e-6)
    other = build_llama(tmp_path / "other", tokenizer, seed=5)
    assert "quantize" not in dpo_cli.evaluate(file, model=str(other))
    assert loads.held == [quantize] * 3 + ["float32"]


def peft_logps(base, adapter, pairs):
    """Return the mean log-probability of the chosen and of the rejected responses, by PEFT's own model's logits."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    sums = {"chosen": 0.0, "rejected": 0.0}
    for pair in pairs:
        for name in sums:
            prompt, response = pair.prompt.tolist(), getattr(pair, name).tolist()
            with torch.no_grad():
                logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            sums[name] += sum(float(logps[len(prompt) - 1 + at, token]) for at, token in enumerate(response))
    return {f"logps/{name}": value / len(pairs) for name, value in sums.items()}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 6}, "use_rslora": True}])
def test_an_adapter_that_peft_saved_has_the_log_probabilities_that_peft_gives_it(
    write_config, tiny_llama, pairs_file, tokenizer, tmp_path, settings
):
    """Also where its ranks differ from layer to layer; the configuration says nothing of adapters."""
    adapter = save_adapter(tiny_llama, tmp_path / "adapter", target_modules="all-linear", **settings)
    found = dpo_cli.evaluate(write_config(), model=str(adapter), data=str(pairs_file))
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    expected = peft_logps(tiny_llama, adapter, [pairs[at] for at in range(len(pairs))])
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    base = dpo_cli.evaluate(write_config(), model=str(tiny_llama), data=str(pairs_file))
    margin = found["rewards/chosen"] * 10 + base["logps/chosen"]
    assert margin == pytest.approx(expected["logps/chosen"], abs=2e-3)


def test_what_a_run_has_trained_has_the_log_probabilities_that_peft_gives_it(
    write_config, tiny_llama, pairs_file, tokenizer, tmp_path
):
    file = write_config(adapter={**LORA, "dora": True}, training={"max_steps": 3, "learning_rate": 0.01})
    run = trained(file)
    found = dpo_cli.evaluate(file, data=str(pairs_file))
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    expected = peft_logps(tiny_llama, run / "final", [pairs[at] for at in range(len(pairs))])
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)


def test_an_adapter_of_other_rank_and_layers_than_the_run_s_is_scored_beside_the_same_base(
    write_config, foreign, tiny_llama, loads
):
    file = write_config(adapter=LORA, reference="frozen")
    found = dpo_cli.evaluate(file, model=str(foreign))
    assert loads == [str(tiny_llama)]
    assert found["loss"] != pytest.approx(0.6931, abs=0.1)
    loads.clear()
    whole = dpo_cli.evaluate(file, model=str(tiny_llama))
    assert (whole["loss"], whole["rewards/margins"]) == (pytest.approx(0.693147, abs=1e-6), 0.0)
    assert "base" not in whole


def test_the_adapter_that_training_goes_on_from_is_its_own_reference(write_config, foreign, tiny_llama, loads):
    """It is compared with base and adapter, and all are ties; the base differs from it."""
    adapter = {"type": "lora", "rank": 3, "alpha": 32, "targets": ["q_proj", "down_proj"], "start": str(foreign)}
    file = write_config(adapter=adapter, reference="frozen")
    found = dpo_cli.evaluate(file, model=str(foreign))
    assert loads == [str(tiny_llama)]
    assert (found["rewards/margins"], found["ties"]) == (0.0, found["pairs"])
    base = dpo_cli.evaluate(file, model=str(tiny_llama))
    assert base["ties"] == 0
    assert abs(base["rewards/margins"]) > 0.01


@pytest.mark.parametrize("reference", ["cached", "frozen", "none"])
def test_an_adapter_of_another_base_is_put_into_that(write_config, tokenizer, tmp_path, tiny_llama, loads, reference):
    other = build_llama(tmp_path / "other", tokenizer, seed=5)
    adapter = save_adapter(other, tmp_path / "adapter")
    loss = {"type": "cpo"} if reference == "none" else {"type": "dpo"}
    file = write_config(reference=reference, loss=loss, adapter=LORA)
    found = dpo_cli.evaluate(file, model=str(adapter))
    # A cached reference is read only where the cache lacks an answer.
    without = [str(other)]
    assert loads in {"none": [without], "frozen": [[str(tiny_llama), *without]]}.get(
        reference, [without, [str(tiny_llama), *without]]
    )
    assert found["base"] == str(other)
    copied = shutil.copytree(tiny_llama, tmp_path / "copied")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(other), adapter).merge_and_unload()
    merged.save_pretrained(copied)
    expected = dpo_cli.evaluate(file, model=str(copied))
    assert numbers(found) == pytest.approx(numbers(expected), abs=1e-3)


def test_another_whole_model_is_the_reference_of_an_adapter(write_config, tokenizer, tmp_path, foreign, tiny_llama):
    other = build_llama(tmp_path / "other", tokenizer, seed=5)
    figures = [
        dpo_cli.evaluate(write_config(adapter=LORA, reference={"type": kind, "model": str(other)}), model=str(foreign))
        for kind in ("cached", "frozen")
    ]
    assert numbers(figures[0]) == pytest.approx(numbers(figures[1]), abs=1e-4)
    assert figures[0]["reference"] == str(other)
    other_alone = dpo_cli.evaluate(write_config(), model=str(other))
    log_ratio = figures[0]["logps/chosen"] - other_alone["logps/chosen"]
    assert figures[0]["rewards/chosen"] == pytest.approx(0.1 * log_ratio, abs=1e-3)


def says(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, other: says(folder, base_model_name_or_path=str(other)), "another base: .* 64 outputs"),
        (lambda folder, other: says(folder, base_model_name_or_path="./gone"), "relative path"),
        (lambda folder, other: says(folder, base_model_name_or_path=str(folder / "gone")), "does not exist"),
        (lambda folder, other: (folder / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda folder, other: says(folder, peft_type="IA3"), "only LORA is known"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(write_config, tokenizer, foreign, tmp_path, change, message):
    other = build_llama(tmp_path / "other", tokenizer, seed=5, head_dim=16)
    folder = Path(shutil.copytree(foreign, tmp_path / "adapter"))
    change(folder, other)
    with pytest.raises(dpo_cli.UserError, match=message):
        dpo_cli.evaluate(write_config(), model=str(folder))


def test_an_adapter_with_layers_that_the_model_lacks_is_refused(write_config, tokenizer, tiny_llama, tmp_path):
    deep = build_llama(tmp_path / "deep", tokenizer, seed=5)
    adapter = save_adapter(deep, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.7"): tensor for name, tensor in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(dpo_cli.UserError, match=r"another base: the model has no .*layers\.7\."):
        dpo_cli.evaluate(write_config(), model=str(adapter))


def test_an_adapter_is_not_scored_beside_other_weights_than_it_was_trained_beside(
    write_config, tiny_llama, tokenizer, tmp_path
):
    """The folder of the base has another model of the same sizes now."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    file = write_config(model={"name": str(base)}, adapter=LORA, training={"max_steps": 1})
    run = trained(file)
    assert dpo_cli.evaluate(file)["base"] == str(base)
    build_llama(base, tokenizer, seed=8)
    for config in (file, write_config("other")):
        with pytest.raises(dpo_cli.UserError, match="belongs to another base"):
            dpo_cli.evaluate(config, model=str(run / "final"))
