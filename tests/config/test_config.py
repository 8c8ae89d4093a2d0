"""The configuration: strict, typed, every error at once with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.config import Config, as_config, json_schema, load_config, resolved_yaml
from dpo_cli.data.pairs.sources import Source, as_sources
from dpo_cli.errors import UserError
from dpo_cli.reporting.trackers import TensorBoard, WandB
from dpo_cli.settings import all_settings
from dpo_cli.system import plain_yaml
from dpo_cli.training.optimizer import AdamW, RMSprop
from tests.conftest import ROOT

MINIMAL = "model: some/name\ndata:\n  train: pairs.jsonl\n"


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def problems(file: Path, *overrides: str) -> list[UserError]:
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        load_config(file, overrides)
    return [caught.value] if isinstance(caught.value, UserError) else list(caught.value.exceptions)


def test_numbers_in_exponent_form_are_numbers(tmp_path):
    text = MINIMAL + "training:\n  learning_rate: 5e-7\nloss:\n  beta: 5E-1\n"
    config = load_config(write(tmp_path, text), ["training.weight_decay=1e-2"])
    assert (config.training.learning_rate, config.loss.beta, config.training.weight_decay) == (5e-7, 0.5, 0.01)


def test_one_word_stands_for_a_group(tmp_path):
    config = load_config(write(tmp_path, "model: a/b\nloss: dpo\nreference: frozen\n"), ["model.dtype=float32"])
    assert (config.model.name, config.model.dtype) == ("a/b", "float32")
    assert (config.loss.type, config.reference.type) == ("dpo", "frozen")


def test_trackers_are_one_or_a_list_each_a_word_or_a_group(tmp_path):
    board, weights = TensorBoard(), WandB(project="mine", name="first")
    for text, trackers in {
        "tracking: tensorboard": [board],
        "tracking: [tensorboard, {type: wandb, project: mine, name: first}]": [board, weights],
        "tracking: {type: wandb, project: mine, name: first}": [weights],
        "tracking: wandb": [WandB(project="dpo", name=None)],
        "tracking: []": [],
    }.items():
        config = load_config(write(tmp_path, MINIMAL + text + "\n"))
        assert config.trackers == trackers
        assert load_config(write(tmp_path, resolved_yaml(config), "again.yaml")).trackers == trackers


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("tracking: tensorbored\n", "`tracking.type` should be one of `tensorboard`, `wandb`", "`tensorboard`"),
        ("tracking: [tensorboard, wand]\n", "`tracking.1.type` should be one of", "`wandb`"),
        ("tracking: {type: wandb, projct: x}\n", "`tracking.projct` is not a setting of `wandb`", "project"),
        ("tracking: {type: tensorboard, project: x}\n", "`tracking.project` is not a setting of `tensorb", "`name`"),
        ("tracking: [{project: x}]\n", "`tracking.0.type` is missing", "`wandb`"),
        ("tracking: {type: tensorboard, name: ../x}\n", "`tracking.name` should", "name"),
        ("tracking: {type: wandb, name: ''}\n", "`tracking.name` should", "name"),
    ],
)
def test_a_wrong_tracker_is_an_error_with_a_line_and_a_hint(tmp_path, text, what, hint):
    (error,) = problems(write(tmp_path, MINIMAL + text))
    assert what in error.what
    assert error.where
    assert hint in error.hint


def test_losses_are_one_or_a_list(tmp_path):
    text = MINIMAL + "loss:\n  - dpo\n  - {type: sft, weight: 0.5}\n  - {beta: 0.3}\n"
    losses = load_config(write(tmp_path, text)).objective.losses
    assert [(loss.type, loss.weight) for loss in losses] == [("dpo", 1.0), ("sft", 0.5), ("dpo", 1.0)]
    assert losses[2].beta == 0.3
    again = load_config(write(tmp_path, resolved_yaml(load_config(write(tmp_path, text))), "again.yaml"))
    assert again.objective.losses == losses


def test_overrides_reach_into_a_list_of_losses_and_never_throw_it_away(tmp_path):
    file = write(tmp_path, MINIMAL + "loss: [dpo, {type: sft, weight: 0.5}]\n")
    losses = load_config(file, ["loss.0.beta=0.3", "loss.1=bco"]).objective.losses
    assert [(loss.type, getattr(loss, "beta", None)) for loss in losses] == [("dpo", 0.3), ("bco", 0.1)]
    for override in ("loss.beta=0.3", "loss.2.beta=0.3", "loss.-1.weight=2"):
        (error,) = problems(file, override)
        assert "`loss` is a list of 2" in error.what
        assert error.where == f"the command line: {override}"


SOURCES = "model: some/name\ndata:\n  train:\n    - a.jsonl\n    - path: b/c\n      split: test\n      weight: 2\n"


@pytest.mark.parametrize(
    ("train", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("{path: a.jsonl, limit: 3}", ["a.jsonl"]),
        ("[a.jsonl]", ["a.jsonl"]),
        (
            "[a.jsonl, {path: b/c, config: d, split: test, format: instruction, weight: 0.5, limit: 3}]",
            ["a.jsonl", "b/c"],
        ),
        ("[]", []),
        ("null", []),
    ],
)
@pytest.mark.parametrize("setting", ["train", "eval"])
def test_sources_are_a_path_a_group_or_a_list_of_them(tmp_path, setting, train, paths):
    config = load_config(write(tmp_path, f"model: some/name\ndata:\n  {setting}: {train}\n"))
    sources = as_sources(getattr(config.data, setting))
    assert [source.path for source in sources] == paths
    again = load_config(write(tmp_path, resolved_yaml(config), "again.yaml"))
    assert as_sources(getattr(again.data, setting)) == sources


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=c.jsonl", [Source(path="c.jsonl")]),
        ("data.train.0=c.jsonl", [Source(path="c.jsonl"), Source(path="b/c", split="test", weight=2)]),
        ("data.train.0.weight=3", [Source(path="a.jsonl", weight=3), Source(path="b/c", split="test", weight=2)]),
        ("data.train.1.weight=3", [Source(path="a.jsonl"), Source(path="b/c", split="test", weight=3)]),
        ("data.train=[{path: c, limit: 1}]", [Source(path="c", limit=1)]),
    ],
)
def test_overrides_reach_into_sources(tmp_path, override, expected):
    assert as_sources(load_config(write(tmp_path, SOURCES), [override]).data.train) == expected


def test_a_setting_joins_a_source_that_was_named_by_its_path(tmp_path):
    config = load_config(
        write(tmp_path, MINIMAL + "  eval: held.jsonl\n"), ["data.train.weight=2", "data.eval.limit=9"]
    )
    assert as_sources(config.data.train) == [Source(path="pairs.jsonl", weight=2)]
    assert as_sources(config.data.eval) == [Source(path="held.jsonl", limit=9)]


@pytest.mark.parametrize(
    ("before", "after", "line", "what", "hint"),
    [
        ("a.jsonl", "5", 4, "`data.train.0` should be a path or a group of settings, but is 5", "a data file"),
        ("a.jsonl", "[a.jsonl]", 4, "`data.train.0` should be a path or a group", "a data file"),
        ("weight: 2", "wieght: 2", 7, "`data.train.1.wieght` is not a setting", "did you mean `data.train.1.weight`?"),
        ("weight: 2", "wheat: 2", 7, "`data.train.1.wheat` is not a setting", "known here: `data.train.path`"),
        ("weight: 2", "weight: 0", 7, "`data.train.1.weight` should be greater than 0, but is 0", "how often"),
        ("weight: 2", "weight: .inf", 7, "`data.train.1.weight` should be", "how often"),
        ("weight: 2", "weight: twice", 7, "`data.train.1.weight` should be a number, but is 'twice'", "how often"),
        ("weight: 2", "limit: 0", 7, "`data.train.1.limit` should be greater than or equal to 1", "the number of rows"),
        (
            "weight: 2",
            "format: chat",
            7,
            "`data.train.1.format` should be one of `auto`, `instruction`, ",
            "shape of these rows",
        ),
        (
            "path: b/c",
            "config: b/c",
            5,
            "`data.train.1.path` is missing",
            "add it, as in `path: pairs.jsonl`: a data file",
        ),
        ("split: test", "split: 1", 6, "`data.train.1.split` should be text, but is 1", "which split"),
    ],
)
def test_a_mistake_in_a_source_is_named_with_its_line(tmp_path, before, after, line, what, hint):
    text = SOURCES.replace(before, after)
    (error,) = problems(write(tmp_path, text))
    assert error.what.startswith(what)
    assert error.where.endswith(f"line {line}")
    assert hint in error.hint


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("train: 5", "`data.train` should be a path, a group of settings, or a list of them or null, but is 5"),
        ("train: {path: a, wieght: 1}", "`data.train.wieght` is not a setting"),
        ("eval: 1.5", "`data.eval` should be a fraction between 0 and 1, a source of pairs or null, but is 1.5"),
        ("eval: 8", "`data.eval` should be a fraction between 0 and 1, a source of pairs or null, but is 8"),
        ("eval: true", "`data.eval` should be a fraction between 0 and 1, a source of pairs or null, but is true"),
        ("eval: [a, 0.5]", "`data.eval.1` should be a path or a group of settings, but is 0.5"),
        ("eval: {path: a, weight: -1}", "`data.eval.weight` should be greater than 0, but is -1"),
    ],
)
def test_a_mistake_in_what_names_the_data_is_explained(tmp_path, setting, what):
    (error,) = problems(write(tmp_path, f"model: a/b\ndata:\n  {setting}\n"))
    assert error.what == what
    assert error.where.endswith("line 3")
    assert error.hint


@pytest.mark.parametrize(
    ("loss", "reference"),
    [("simpo", "none"), ("[cpo, sft]", "none"), ("dpo", "cached"), ("[sft, dpo]", "cached"), ("orpo", "none")],
)
def test_a_reference_is_had_where_a_loss_needs_one_and_only_there(tmp_path, loss, reference):
    assert load_config(write(tmp_path, MINIMAL + f"loss: {loss}\n")).reference.type == reference


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("loss: simpo\nreference: cached\n", "ignores the reference"),
        ("loss: [sft, dpo]\nreference: none\n", "the loss `dpo` needs a reference"),
        ("loss: [bco, {type: dpo, adaptive_beta: {alpha: 0.5}}]\n", "`bco` and `dpo` do"),
        ("loss: {type: dpo, logps: mean, divergence: js}\n", "`divergence: js` is not defined for `logps: mean`"),
        ("loss: {type: ipo, divergence: js}\n", "`loss.divergence` is not a setting of `ipo`"),
        ("loss: {type: hinge, label_smoothing: 0.1}\n", "`loss.label_smoothing` is not a setting of `hinge`"),
        ("loss: [dpo, {type: simpo, gama: 1}]\n", "`loss.1.gama` is not a setting of `simpo`"),
        ("loss: {type: aot, wpo: true}\n", "compares the pairs of a step with each other"),
        ("loss: [{type: dpo, router_aux: 0.1}, {type: sft, router_aux: 0.1}]\n", "several do"),
        ("loss: {type: dpo, router_aux: -0.1}\n", "`loss.router_aux` should be greater than or equal to 0"),
        ("loss: {type: dpo, divergence: {type: alpha, alpha: 1.0}}\n", "`loss.divergence.alpha` should be less than 1"),
        ("loss: {type: dpo, divergence: hellinger}\n", "`loss.divergence.type` should be one of `reverse_kl`"),
        ("loss: {divergence: {alpha: 0.3}}\n", "`loss.divergence.type` is missing"),
        ("loss: {type: exo, label_smoothing: 0}\n", "`loss.label_smoothing` should be greater"),
        ("loss: {type: dpo, beta: 101}\n", "`loss.beta` should be less than or equal to 100"),
        ("loss: [{type: dpo, weight: 0}]\n", "`loss.0.weight` should be greater than 0"),
        ("loss: []\n", "`loss` should be a list of at least one"),
        ("loss: {adaptive_beta: {alhpa: 1}}\n", "`loss.adaptive_beta.alhpa` is not a setting"),
        ("loss: {type: kto}\n", "`loss.type` should be one of `dpo`"),
    ],
)
def test_losses_and_references_that_do_not_go_together_are_errors_with_a_line(tmp_path, text, what):
    (error,) = problems(write(tmp_path, MINIMAL + text))
    assert what in error.what
    assert "line 4" in error.where or "line 5" in error.where
    assert error.hint


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (
            "adam",
            "`training.optimizer.type` should be one of `adamw`, `adamw_8bit`, `adafactor`, `rmsprop`, but is 'adam'",
        ),
        ("{betas: [0.9]}", "`training.optimizer.betas` should be a list of at least 2"),
        ("{betas: [0.9, 0.99, 0.999]}", "`training.optimizer.betas` should be a list of at most 2"),
        ("{betas: [0.9, 1.0]}", "`training.optimizer.betas.1` should be less than 1"),
        ("{betas: 0.9}", "`training.optimizer.betas` should be a list"),
        ("{type: rmsprop, betas: [0.9, 0.99]}", "`training.optimizer.betas` is not a setting of `rmsprop`"),
        ("{epz: 1e-6}", "`training.optimizer.epz` is not a setting of `adamw`"),
        ("{eps: 0}", "`training.optimizer.eps` should be greater than 0"),
    ],
)
def test_what_is_wrong_with_an_optimizer_is_reported_with_its_line(tmp_path, asked, what):
    (error,) = problems(write(tmp_path, f"{MINIMAL}training:\n  optimizer: {asked}\n"))
    assert what in error.what
    assert "line 5" in error.where
    assert error.hint


def test_a_setting_of_an_optimizer_that_is_written_as_its_type_can_be_overridden(tmp_path):
    file = write(tmp_path, f"{MINIMAL}training: {{optimizer: rmsprop}}\n")
    assert load_config(file, ["training.optimizer.momentum=0.9"]).training.optimizer == RMSprop(momentum=0.9)
    assert load_config(write(tmp_path, MINIMAL), ["training.optimizer.eps=1e-6"]).training.optimizer == AdamW(eps=1e-6)


def test_overrides_reach_every_setting_and_are_parsed_as_yaml(tmp_path):
    overrides = ["data.eval=null", "tracking=[tensorboard]", "training.shuffle=false", "output_dir=elsewhere"]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert (config.data.eval, config.trackers, config.training.shuffle) == (None, [TensorBoard()], False)
    assert config.output_dir == "elsewhere"


def test_all_errors_come_together_each_with_its_line(tmp_path):
    text = (
        "model: a/b\n"
        "data:\n"
        "  train: 5\n"
        "loss:\n"
        "  type: dpo\n"
        "  beta: much\n"
        "reference:\n"
        "  type: frozzen\n"
        "training:\n"
        "  learning_rat: 5e-7\n"
        "  warmup_ratio: -1\n"
    )
    file = write(tmp_path, text)
    found = problems(file, "training.seed=soon")
    assert [(error.what.split("`")[1], error.where) for error in found] == [
        ("data.train", f"{file}, line 3"),
        ("loss.beta", f"{file}, line 6"),
        ("reference.type", f"{file}, line 8"),
        ("training.learning_rat", f"{file}, line 10"),
        ("training.warmup_ratio", f"{file}, line 11"),
        ("training.seed", "the command line: training.seed=soon"),
    ]


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("modle: a/b", "model"),
        ("training: {learning_rat: 1.0}", "training.learning_rate"),
        ("learning_rate: 1.0", "training.learning_rate"),
        ("training: {beta: 1.0}", "loss.beta"),
        ("data: {max_lenght: 5}", "data.max_length"),
        ("format: instruction", "data.format"),
        ("loss: {type: dpo, label_smooth: 0.1}", "loss.label_smoothing"),
    ],
)
def test_an_unknown_setting_names_the_nearest_known_one(tmp_path, line, suggestion):
    error = next(e for e in problems(write(tmp_path, f"{line}\n")) if "is not a setting" in e.what)
    assert error.hint == f"did you mean `{suggestion}`?"


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("training: {schedule: cosin}", "cosine"),
        ("training: {optimizer: adam}", "adamw"),
        ("data: {train: p.jsonl, format: mesages}", "messages"),
        ("model: {name: a/b, dtype: bfloat}", "bfloat16"),
    ],
)
def test_a_choice_that_is_misspelled_names_the_nearest_one(tmp_path, line, suggestion):
    error = next(e for e in problems(write(tmp_path, f"{line}\n")) if "should be one of" in e.what)
    assert error.hint == f"did you mean `{suggestion}`?"


def test_a_choice_that_is_nothing_like_the_known_ones_is_told_the_default(tmp_path):
    (error,) = problems(write(tmp_path, MINIMAL), "training.schedule=wsd")
    assert error.hint.startswith("leave it out for the default, `schedule: linear`")


def test_a_setting_without_effect_is_an_error(tmp_path):
    text = MINIMAL + "  eval: null\nevaluation:\n  every_steps: 5\n"
    (error,) = problems(write(tmp_path, text))
    assert "has no effect" in error.what
    assert error.where.endswith("line 6")


def test_a_kernel_of_attention_that_the_layout_does_not_use_is_an_error(tmp_path):
    asked = ["training.layout=padded", "training.attention=pieces"]
    (error,) = problems(write(tmp_path, MINIMAL), *asked)
    assert "`training.attention: pieces` has no effect with `training.layout: padded`" in error.what
    load_config(write(tmp_path, MINIMAL), ["training.layout=packed", "training.attention=pieces"])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("- a\n- b\n", id="a list"),
        pytest.param("just text", id="a scalar"),
        pytest.param("model: a\nmodel: b\n", id="twice"),
        pytest.param("model: [unclosed\n", id="syntax"),
        pytest.param("model:\n\t- tab\n", id="tab"),
        pytest.param("model: !!python/object/apply:os.system ['false']\n", id="python tag"),
        pytest.param("5: a\n", id="number as a name"),
        pytest.param("model: a\x07\n", id="control character"),
        pytest.param("? [a, b]\n: c\n", id="list as a name"),
        pytest.param(f"model: {'[' * 5000}{']' * 5000}\n", id="nested deeply"),
        pytest.param(
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 10)}]\n" for p, n in zip("abcde", "bcdef", strict=True)),
            id="anchors that multiply",
        ),
        pytest.param("a: &a [*a]\n", id="an anchor within itself"),
    ],
)
def test_broken_yaml_is_one_clear_error(tmp_path, text):
    file = write(tmp_path, text)
    found = problems(file)
    assert str(file) in found[0].where
    assert all(error.hint for error in found)


def test_bytes_that_are_not_text_are_one_clear_error(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"model: \xff\xfe\n")
    assert problems(file)[0].what == "the configuration is not UTF-8 text"


def test_a_missing_file_suggests_one_that_exists(tmp_path):
    write(tmp_path, MINIMAL, "quickstart.yaml")
    (error,) = problems(tmp_path / "quickstrat.yaml")
    assert error.hint == f"did you mean `{tmp_path / 'quickstart.yaml'}`?"


def test_a_file_that_shares_the_ending_alone_is_not_suggested(tmp_path):
    write(tmp_path, MINIMAL, "co.yaml")
    (error,) = problems(tmp_path / "nope.yaml")
    assert error.hint.startswith("check the path")


def test_the_resolved_configuration_is_the_same_configuration(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["training.max_steps=7", "loss.beta=0.3"])
    again = load_config(write(tmp_path, resolved_yaml(config), "other.yaml"))
    assert again == config


@given(st.text() | st.sampled_from(["5e-7", "12e3", "1E5", "+3e1", "null", "0x1f", "1_0", "2024-01-01", "yes", "a: b"]))
def test_any_text_that_is_written_out_is_read_again(text):
    found, _ = plain_yaml.parse(plain_yaml.dump({"a": {"b": text, "c": [text, 5e-7]}}))
    assert found == {"a": {"b": text, "c": [text, 5e-7]}}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_configuration_loads_and_names_its_schema(file):
    assert isinstance(load_config(file), Config)
    first = file.read_text(encoding="utf-8").splitlines()[0]
    schema = first.removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / schema).samefile(ROOT / "configs" / "schema.json")


def test_the_checked_in_schema_is_current_and_describes_every_setting():
    schema = json_schema()
    assert json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8")) == schema
    groups = [schema, *schema["$defs"].values()]
    for group in groups:
        for name, setting in group.get("properties", {}).items():
            assert setting.get("description") or "$ref" in setting, f"{group.get('title')}.{name} has no description"


def test_editors_accept_that_there_is_no_adapter_as_every_resolved_configuration_says():
    accepted = json_schema()["properties"]["adapter"]["anyOf"]
    assert {"type": "null"} in accepted
    assert {"const": "lora", "type": "string"} in accepted


@pytest.mark.parametrize(
    ("overrides", "places"),
    [
        ([], {"training.attention": ("line 6", "line 7"), "model.weights": ("line 3",)}),
        (["training.layout=padded"], {"training.attention": ("line 6", "the command line: training.layout=padded")}),
        (["adapter=lora", "model.quantize=nf4"], {"model.weights": ("line 3", "the command line: model.quantize=nf4")}),
        (["model.dtype=float32"], {"computes in bfloat16": ("line 3", "the command line: model.dtype=float32")}),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_told_at_once_each_where_it_was_made(tmp_path, overrides, places):
    text = "model:\n  name: a/b\n  weights: bfloat16\ndata: {train: pairs.jsonl}\ntraining:\n  attention: flex\n"
    found = problems(write(tmp_path, text + "  layout: padded\n"), *overrides)
    assert len(found) >= 2
    for named, wanted in places.items():
        (error,) = [error for error in found if f"{named}" in error.what]
        assert all(place in error.where for place in wanted)


def test_members_of_a_group_that_do_not_go_together_are_told_where_each_was_made(tmp_path):
    (error,) = problems(
        write(tmp_path, MINIMAL + "  min_response: 5\n"), "data.on_too_long=truncate", "data.max_length=5"
    )
    assert error.where == f"{tmp_path / 'run.yaml'}, line 4 and the command line: data.max_length=5"


def test_a_configuration_knows_where_its_settings_were_made_and_is_the_same_wherever(tmp_path):
    text = MINIMAL + "training:\n  epochs: 2\n"
    one, other = (load_config(write(tmp_path, f"{start}{text}"), ["adapter=lora"]) for start in ("", "\n"))
    assert one == other
    assert one.where("training.epochs") == f"{tmp_path / 'run.yaml'}, line 5"
    assert other.where("training.epochs") == f"{tmp_path / 'run.yaml'}, line 6"
    assert one.where("adapter") == "the command line: adapter=lora"
    assert as_config({"model": "a/b"}).where("training.epochs") == "`training.epochs`"


def test_what_a_setting_means_is_read_in_a_hint_as_the_rest_of_a_sentence(tmp_path):
    """Where a default is named before it, `null:` and `auto:` go on with what it does."""
    described = {path: field.description or "" for path, field in all_settings(Config)}
    assert [path for path, text in described.items() if re.search(r"\. (null|auto):", " ".join(text.split()))] == []
    file = write(tmp_path, MINIMAL + "training: {offload: 1, compile: 2}\n")
    for error in problems(file, "model.weights=3", "adapter.targets=4", "model.attention=5"):
        assert "\n" not in error.hint
