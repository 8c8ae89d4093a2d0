"""What people know by the name that another trainer gives it leads to the setting that does it here."""

from __future__ import annotations

import re

import pytest

from dpo_cli.config import translations
from dpo_cli.config.explain import option_hint
from dpo_cli.config.schema import Config
from dpo_cli.settings import all_settings
from tests.config.test_config import MINIMAL, problems, write

NAMES = sorted(translations._BY_NAME)
SETTINGS = {
    "per_device_train_batch_size": "training.pairs_per_step",
    "gradient_accumulation_steps": "training.pairs_per_step",
    "num_train_epochs": "training.epochs",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup_ratio",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "report_to": "tracking",
    "max_prompt_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "loss_type": "loss.type",
    "router_aux_loss_coef": "loss.router_aux",
    "ref_model": "reference.model",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep",
    "eval_steps": "evaluation.every_steps",
    "logging_steps": "logging.every_steps",
    "output": "output_dir",
    "model_name_or_path": "model.name",
    "name_or_path": "model.name",
    "prompt_column": "data.columns",
    "field_rejected": "data.columns",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "template": "model.chat_template",
    "padding_free": "training.layout",
    "packing": "training.layout",
    "peft_config": "adapter",
    "lora": "adapter",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_target_modules": "adapter.targets",
    "use_dora": "adapter.dora",
    "adapter_name_or_path": "adapter.start",
    "load_in_4bit": "model.quantize",
    "quantization_bit": "model.quantize",
}
ABSENT = ["modules_to_save", "init_lora_weights", "deepspeed", "fsdp", "logging_strategy", "bnb_4bit_compute_dtype"]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("group", ["", "model.", "data.", "loss.", "training.", "checkpoints."])
def test_a_name_of_another_trainer_leads_to_the_setting_at_any_level(tmp_path, group, name):
    (error,) = problems(write(tmp_path, MINIMAL), f"{group}{name}=1")
    assert error.what.startswith(f"`{group}{name}` is not a setting")
    assert f"`{SETTINGS[name]}" in error.hint
    assert error.where == f"the command line: {group}{name}=1"


@pytest.mark.parametrize("name", ABSENT)
def test_what_there_is_not_is_said_to_be_absent(tmp_path, name):
    (error,) = problems(write(tmp_path, f"{MINIMAL}{name}: 1\n"))
    assert error.hint.startswith("leave it out: ")
    assert error.where.endswith("line 4")


@pytest.mark.parametrize("name", NAMES)
def test_every_advice_names_settings_that_there_are(tmp_path, name):
    """Those that it names with their group exist; and the name is no setting itself, which would never be advised."""
    advice = translations.advice(name)
    groups = "model|adapter|data|reference|training|evaluation|checkpoints|logging"
    for dotted in re.findall(rf"`((?:{groups})\.\w+)", advice):
        assert dotted in dict(all_settings(Config)), dotted
    assert name not in Config.model_fields


@pytest.mark.parametrize(
    ("loss", "hint"),
    [
        ("kto", "not from pairs"),
        ("ppo", "write responses while it trains"),
        ("rloo", "write responses while it trains"),
        ("grpo", "write responses while it trains"),
        ("sigmoid", "write `dpo`"),
        ("exo_pair", "write `exo`"),
        ("cdpo", "label_smoothing"),
        ("sipmo", "did you mean `simpo`?"),
    ],
)
def test_a_loss_of_another_trainer_leads_to_ours(tmp_path, loss, hint):
    for text in (f"loss: {loss}", f"loss: {{type: {loss}}}", f"loss: [dpo, {loss}]"):
        (error,) = problems(write(tmp_path, f"{MINIMAL}{text}\n"))
        assert hint in error.hint
    (error,) = problems(write(tmp_path, f"{MINIMAL}reference: {loss}\n"))
    assert hint not in error.hint


@pytest.mark.parametrize(
    ("adapter", "hint"),
    [
        ("dora", "`adapter: {type: lora, dora: true}`"),
        ("rslora", "`adapter: {type: lora, rslora: true}`"),
        ("full", "`adapter: null`"),
        ("lroa", "did you mean `lora`?"),
    ],
)
def test_an_adapter_of_another_trainer_leads_to_ours(tmp_path, adapter, hint):
    for text in (f"adapter: {adapter}", f"adapter: {{type: {adapter}}}"):
        (error,) = problems(write(tmp_path, f"{MINIMAL}{text}\n"))
        assert hint in error.hint


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--learning_rate", "`training.learning_rate=…`"),
        ("--learning-rate", "`training.learning_rate=…`"),
        ("--training.learning_rate", "`training.learning_rate=…`"),
        ("--lr", "set `training.learning_rate`"),
        ("--num_train_epochs", "set `training.epochs`"),
        ("--beta", "`loss.beta=…`"),
    ],
)
def test_a_setting_that_is_given_as_an_option_is_written_as_a_setting(option, hint):
    assert hint in option_hint(option)
    assert "without dashes" in option_hint(option)


def test_what_is_neither_option_nor_setting_has_no_such_hint():
    assert option_hint("--resum") is None


def test_the_settings_there_are_are_listed_once(tmp_path):
    text = MINIMAL + "training: {foo: 1, bar: 2}\nloss: {zoo: 3}\nwheat: 4\n"
    found = problems(write(tmp_path, text))
    assert len(found) == 4
    assert sum(error.hint.count("`") > 10 for error in found) == 1
    assert all(error.hint for error in found)


def test_values_that_cannot_be_read_are_reported_with_all_else(tmp_path):
    text = (
        "model: !!int x\ndata:\n  train: 5\ntraining:\n  learning_rate: 5e-6.0\n  epochs: !!float much\n"
        "  epochs: 2\n  sed: 3\n"
    )
    found = {error.where.rpartition("line ")[2]: error.what for error in problems(write(tmp_path, text))}
    assert list(found) == ["1", "6", "7", "3", "5", "8"]
    assert found["1"] == "the value of `model` is not valid YAML: `x` is not a `!!int`"
    assert found["5"] == "`training.learning_rate` should be a number, but is '5e-6.0'"
    assert found["7"] == "`training.epochs` is set twice"


@pytest.mark.parametrize("name", ["5e-7b/model", "3e5-instruct", "1e3"])
def test_a_name_that_begins_like_a_number_is_text(tmp_path, name):
    from dpo_cli.config import load_config

    if name == "1e3":
        assert "should be" in problems(write(tmp_path, f"model: {name}\n"))[0].what
    else:
        assert load_config(write(tmp_path, f"model: {name}\n")).model.name == name
