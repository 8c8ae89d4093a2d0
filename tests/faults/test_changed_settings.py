"""A run that goes on under other settings: what decides its weights is refused, all in one list; the rest may change.

Each setting says itself, in the schema, whether it may change; the tables say so once more, of every setting there is:
a new one is asked for here what it means for a resumed run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from dpo_cli.config.schema import Config, changeable
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.settings import Adapter
from dpo_cli.preference.losses import Loss
from dpo_cli.preference.reference import Reference
from dpo_cli.settings import MAY_CHANGE, MAY_GROW, is_within, members, on_resume
from dpo_cli.training.optimizer import Optimizer
from dpo_cli.training.recorded_settings import RESOLVED, RecordedSettings
from tests.faults.conftest import FULL

DECIDES = {
    "model.name", "model.dtype", "model.weights", "model.quantize", "model.attention",
    "model.chat_template", "model.eos_token", "model.allow_pickle",
    "model.trust_remote_code",
    "data.train", "data.eval", "data.format", "data.columns", "data.system", "data.on_bad_row",
    "data.max_length", "data.on_too_long",
    "data.min_response", "data.turns", "data.ranked", "data.drop",
    "training.pairs_per_step", "training.shuffle", "training.optimizer.type", "training.optimizer.betas",
    "training.optimizer.eps",
    "training.learning_rate", "training.schedule", "training.warmup_ratio", "training.weight_decay",
    "training.max_grad_norm", "training.seed",
}  # fmt: skip
"""What decides the weights, beside everything of the adapter, of the loss and of the reference."""

WATCHES = {
    "training.micro_batch_tokens", "training.layout", "training.gradient_checkpointing", "training.rank_timeout",
    "training.offload", "training.sharding", "training.attention", "training.compile", "training.deterministic",
    "training.on_nonfinite", "training.max_skipped",
    "evaluation.every_steps", "evaluation.samples", "evaluation.max_new_tokens", "evaluation.best_by",
    "evaluation.patience", "logging.every_steps",
    "checkpoints.every_steps", "checkpoints.at_end", "checkpoints.keep", "checkpoints.keep_best",
    "checkpoints.background",
    "tracking", "output_dir",
}  # fmt: skip
"""What decides memory and speed, what is kept and who is told."""

GROUPS = {"adapter": Adapter, "loss": Loss, "reference": Reference, "training.optimizer": Optimizer}
"""Groups of which nothing may change, whichever members of these unions they are."""

LENGTH = {"training.epochs", "training.max_steps"}
"""How many steps there are; `tests/cli/test_extend.py` gives runs more of them."""


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def started(folder, config: Config) -> RecordedSettings:
    file = folder / "config.yaml"
    file.write_text(RESOLVED + yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return RecordedSettings(file)


def changed(config: Config, name: str) -> dict[str, Any]:
    """Return all settings, one of them another than it was."""
    settings = config.model_dump(mode="json")
    *above, last = name.split(".")
    group = settings
    for part in above:
        group = group[part]
    group[last] = "something else"
    return settings


def test_every_setting_is_known_to_decide_the_weights_or_not():
    named = {name for name, _ in leaves(Config(model={"name": "m"}).model_dump(mode="json"))}
    groups = ("adapter", "loss.", "reference.")
    assert {name for name in named if not name.startswith(groups)} == DECIDES | WATCHES | LENGTH
    assert len(DECIDES) + len(WATCHES) + len(LENGTH) == len(DECIDES | WATCHES | LENGTH)


@pytest.mark.parametrize("name", sorted(DECIDES))
def test_what_decides_the_weights_may_not_change(tmp_path, name):
    config = Config(model={"name": "m"})
    with pytest.raises(UserError, match=f"other settings: `{name}` was .* and is something else") as refused:
        started(tmp_path, config).check_unchanged(changed(config, name), changeable())
    assert refused.value.status == 2
    assert refused.value.hint


@pytest.mark.parametrize("name", sorted(WATCHES | LENGTH))
def test_what_does_not_may(tmp_path, name):
    config = Config(model={"name": "m"})
    started(tmp_path, config).check_unchanged(changed(config, name), changeable())


def test_every_setting_says_itself_what_it_may_do():
    marks = on_resume(Config)
    assert set(marks.values()) == {MAY_CHANGE, MAY_GROW}
    for name in DECIDES | WATCHES | LENGTH:
        found = {mark for above, mark in marks.items() if is_within(name, [above])}
        assert found == ({MAY_CHANGE} if name in WATCHES else {MAY_GROW} if name in LENGTH else set()), name


@pytest.mark.parametrize(("group", "union"), GROUPS.items())
def test_nothing_of_an_adapter_a_loss_a_reference_or_an_optimizer_may_change(tmp_path, group, union):
    for kind in members(union):
        *above, last = group.split(".")
        settings = {last: kind().model_dump()}
        config = Config(model={"name": "m"}, **({above[0]: settings} if above else settings))
        run = started(tmp_path, config)
        for name in (name for name, _ in leaves(config.model_dump(mode="json")) if is_within(name, [group])):
            with pytest.raises(UserError, match=f"`{name}` was"):
                run.check_unchanged(changed(config, name), changeable())


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (None, "lora", "`adapter` was null and is lora"),
        ("lora", None, "`adapter` was lora and is null"),
        ("lora", {"rank": 8}, "`adapter.rank` was 16 and is 8"),
        ({"start": "a/b"}, {"start": "a/c"}, "`adapter.start` was a/b and is a/c"),
        ("lora", {"start": "a/c"}, "`adapter.start` was null and is a/c"),
    ],
)
def test_another_adapter_is_refused_by_what_is_another(tmp_path, before, now, said):
    run = started(tmp_path, Config(model={"name": "m"}, adapter=before))
    with pytest.raises(UserError, match="cannot be resumed") as refused:
        run.check_unchanged(Config(model={"name": "m"}, adapter=now).model_dump(mode="json"), changeable())
    assert refused.value.what.endswith(f"other settings: {said}")


def test_another_optimizer_is_refused_by_its_name_and_other_betas_by_theirs(tmp_path):
    run = started(tmp_path, Config(model={"name": "m"}))
    for asked, said in [
        ("rmsprop", "`training.optimizer.type` was adamw and is rmsprop"),
        ({"betas": [0.9, 0.95]}, r"`training.optimizer.betas` was \[0.9, 0.999\] and is \[0.9, 0.95\]"),
        ({"eps": 1e-6}, "`training.optimizer.eps` was 1e-08 and is 1e-06"),
    ]:
        settings = Config(model={"name": "m"}, training={"optimizer": asked}).model_dump(mode="json")
        with pytest.raises(UserError, match=said):
            run.check_unchanged(settings, changeable())


def test_all_that_changed_stands_in_one_list(tmp_path):
    config = Config(model={"name": "m"})
    settings = config.model_dump(mode="json")
    for name in (*DECIDES, *WATCHES):
        *above, last = name.split(".")
        group = settings
        for part in above:
            group = group[part]
        group[last] = "something else"
    with pytest.raises(UserError) as refused:
        started(tmp_path, config).check_unchanged(settings, changeable())
    assert all(f"`{name}`" in refused.value.what for name in DECIDES)
    assert not any(f"`{name}`" in refused.value.what for name in WATCHES)


OTHERS = {
    "training.micro_batch_tokens": 300,
    "training.layout": "padded",
    "training.compile": "false",
    "training.sharding": "full",
    "training.deterministic": "false",
    "training.gradient_checkpointing": "true",
    "training.rank_timeout": "null",
    "training.on_nonfinite": "skip",
    "training.max_skipped": 3,
    "evaluation.every_steps": 1,
    "evaluation.samples": 3,
    "evaluation.max_new_tokens": 2,
    "evaluation.best_by": "rewards/margins",
    "evaluation.patience": 5,
    "logging.every_steps": 2,
    "checkpoints.every_steps": 3,
    "checkpoints.at_end": "false",
    "checkpoints.keep": 1,
    "checkpoints.keep_best": 2,
    "checkpoints.background": "true",
    "tracking": "[tensorboard]",
}


def test_a_run_goes_on_with_all_that_may_change_changed(write_config, tmp_path, zygote):
    # Offloading is for GPUs, kernels of attention are for the packed layout, and both are refused here.
    assert {*OTHERS, "output_dir", "training.offload", "training.attention"} == WATCHES
    # Importing a tracker takes longer than all the rest.
    others = OTHERS if FULL else {**OTHERS, "tracking": "[]"}
    file = write_config("run", training={"max_steps": 4}, checkpoints={"every_steps": 2})
    ended = zygote.run("train", "--config", file)
    assert ended.status == 0, ended.said
    run = tmp_path / "runs" / "moved"
    shutil.move(tmp_path / "runs" / "run", run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    overrides = [f"{name}={value}" for name, value in others.items()]
    ended = zygote.run("train", "--config", file, "--resume", f"output_dir={run}", *overrides)
    assert ended.status == 0, ended.said
    assert "resuming after step 2" in ended.said
    # What was refused stays as it was: nothing is begun.
    shutil.rmtree(run / "final")
    ended = zygote.run("train", "--config", file, "--resume", f"output_dir={run}", "training.seed=7", "loss.beta=0.3")
    assert ended.status == 2
    assert "`loss.beta` was 0.1 and is 0.3; `training.seed` was 42 and is 7" in ended.said
    assert not (run / "final").exists()
