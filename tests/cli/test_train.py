"""The program as a user runs it: a whole run, its folder, what it says, and that the trained model loads."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
import yaml

from dpo_cli.evaluation.details import DETAILS
from dpo_cli.preference.metrics import PAIR_METRICS
from dpo_cli.system.storage import verify
from tests.builders import run_card
from tests.conftest import build_llama, make_config, read_metrics, run_dpo, without_clock, write_rows
from tests.marks import slow_unless


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, demo_rows):
    """A run of eight steps over 32 pairs, eight held out; the tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    pairs = write_rows(folder / "pairs.jsonl", demo_rows[:40])
    file = make_config(folder, tiny_llama, pairs, evaluation={"every_steps": 4})
    result = run_dpo("train", "--config", file)
    assert result.returncode == 0, result.stderr
    return file, folder / "runs" / "run", result


def test_a_run_leaves_what_the_contract_says(finished, demo_rows):
    file, run, result = finished
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "environment.json", "facts.json", "final", "held_out.jsonl", "metrics.jsonl",
        "report.html", "samples.jsonl",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000006", "step-000008"]

    train, held_out = read_metrics(run), read_metrics(run, "eval")
    assert [row["step"] for row in train] == list(range(1, 9))
    assert [row["step"] for row in held_out] == [0, 4, 8]
    assert set(train[0]) == {
        "split", "step", "epoch", *PAIR_METRICS, "grad_norm", "learning_rate", "tokens_per_second",
        "seconds", "memory_bytes",
    }  # fmt: skip
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert train[-1]["epoch"] == 1.0
    assert all(row["pairs"] == 8 for row in held_out)

    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["command_line"][1:] == ["train", "--config", str(file)]
    assert result.stdout.count("\x1b") == result.stderr.count("\x1b") == 0
    assert result.stderr.count("step ") >= 8
    assert "evaluating: 8/8 in" in result.stderr


def test_the_trained_model_and_every_checkpoint_load_as_hugging_face_folders(finished, tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, run, result = finished
    assert "checked: packed gives the same as padded" in result.stderr
    assert "dpo_prefix_tree" not in (run / "final" / "config.json").read_text()
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    last = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000008")
    final = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), last.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(final.parameters(), base.parameters(), strict=True))


def test_the_model_card_states_base_data_loss_settings_and_held_out_figures(finished, tiny_llama):
    file, run, _ = finished
    card = (run / "final" / "README.md").read_text(encoding="utf-8")
    before, _, last = read_metrics(run, "eval")
    for part in (
        f"Fine-tuned from `{tiny_llama.name}` on preference pairs",
        "| data | pairs.jsonl |",
        "| pairs | 32 to train on, 8 held out |",
        "trained on 32 preference pairs",
        "learning_rate: 0.001",
        f"| loss | {before['loss']:.4f} | {last['loss']:.4f} | {last['loss'] - before['loss']:+.4f} (",
    ):
        assert part in card
    for folder in (tiny_llama, file):
        assert str(folder.parent) not in card, "a card is published: nobody's paths are in it"
    fields = yaml.safe_load(card.split("---")[1])
    assert fields["library_name"] == "transformers"
    assert fields["model-index"][0]["results"][0]["metrics"][0]["value"] == last["rewards/accuracies"]


def test_the_lines_of_the_card_load_the_model_and_let_it_answer(finished, capsys):
    _, run, _ = finished
    run_card(run / "final")
    assert capsys.readouterr().out.strip()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it.
def test_the_card_of_an_adapter_names_its_base_and_its_own_lines_load_both(
    forked_dpo, write_config, tmp_path, tiny_llama
):
    """The code is taken from the card, and answers otherwise than the base alone."""
    done = forked_dpo("train", "--config", write_config(adapter="lora", training={"max_steps": 2}))
    assert done.returncode == 0, done.stderr
    final = tmp_path / "runs/run/final"
    names = run_card(final, **{f"path/to/{tiny_llama.name}": tiny_llama})
    tokens = names["tokenizer"]("Name three primes.", return_tensors="pt")["input_ids"]
    base = names["AutoModelForCausalLM"].from_pretrained(tiny_llama)
    with torch.no_grad():
        assert not torch.allclose(names["model"](tokens).logits, base(tokens).logits, atol=1e-4)


def test_dpo_eval_gives_the_figures_that_the_run_logged(forked_dpo, finished, tmp_path, tiny_llama):
    file, run, _ = finished
    for model, logged in ((tiny_llama, 0), (run / "final", 2), (run / "checkpoints" / "step-000008", 2)):
        result = forked_dpo("eval", "--config", file, "--model", model, "--json", tmp_path / "figures.json")
        assert result.returncode == 0, result.stderr
        found = json.loads((tmp_path / "figures.json").read_text())
        row = read_metrics(run, "eval")[logged]
        for name in set(row) - {"split", "step", "epoch"}:
            assert found[name] == pytest.approx(row[name], abs=1e-5), name
        assert found["model"] == str(model)
        named = {"model", "reference", "data", "objective"}
        assert set(found) == (set(row) - {"split", "step", "epoch"}) | named | {detail.key for detail in DETAILS}


def test_dpo_eval_says_what_it_measures(forked_dpo, finished, pairs_file, tiny_llama):
    file, _, _ = finished
    arguments = ("--data", pairs_file, "loss.beta=0.3", "loss.label_smoothing=0.1", "loss.divergence=js")
    shown = forked_dpo("eval", "--config", file, *arguments)
    assert shown.returncode == 0, shown.stderr
    about = dict(re.split(r"  +", line, maxsplit=1) for line in shown.stdout.split("\n\n")[0].splitlines())
    assert about == {
        "loss": "dpo (beta 0.3, label_smoothing 0.1, divergence js)",
        "reference": str(tiny_llama),
        "pairs of": str(pairs_file),
        "trained on": "32 of the 40 pairs, by their tokens",
    }


def test_dpo_eval_writes_nothing_but_json_to_standard_output(finished):
    file, run, _ = finished
    piped = run_dpo("eval", "--config", file, "--json", "-", "loss.beta=0.3", env={"FORCE_COLOR": "1", "COLUMNS": "40"})
    assert piped.returncode == 0, piped.stderr
    found = json.loads(piped.stdout)
    assert found["objective"]["type"] == "dpo"
    assert found["objective"]["beta"] == 0.3
    # Rewards are as many times the log-ratios as β says.
    (last,) = read_metrics(run, "eval")[-1:]
    assert found["rewards/margins"] == pytest.approx(3 * last["rewards/margins"], rel=1e-4)


def test_dpo_eval_names_each_of_several_losses(forked_dpo, finished, tmp_path):
    file, _, _ = finished
    arguments = ("loss=[{type: dpo}, {type: sft, weight: 0.5}]", "--json", tmp_path / "figures.json")
    shown = forked_dpo("eval", "--config", file, *arguments)
    assert shown.returncode == 0, shown.stderr
    assert "1 · dpo (beta 0.1) + 0.5 · sft" in shown.stdout
    objective = json.loads((tmp_path / "figures.json").read_text())["objective"]
    assert [(loss["type"], loss["weight"]) for loss in objective] == [("dpo", 1), ("sft", 0.5)]


def test_dpo_eval_of_the_base_model_is_all_ties(forked_dpo, finished, tmp_path, tiny_llama, pairs_file):
    file, _, _ = finished
    arguments = ("--model", tiny_llama, "--data", pairs_file, "--json", tmp_path / "figures.json")
    result = forked_dpo("eval", "--config", file, *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["pairs"], found["ties"], found["rewards/accuracies"]) == (40, 40, 0.5)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dpo_eval_tells_the_groups_that_the_data_names(forked_dpo, finished, tmp_path, tiny_llama, demo_rows):
    file, run, _ = finished
    kinds = ["maths", "maths", "[red]letters"]
    rows = [{**row, "category": kind, "source": "one"} for row, kind in zip(demo_rows[40:52], kinds * 4, strict=True)]
    figures = {}
    for name in ("all", "maths", "[red]letters"):
        some = [row for row in rows if name in ("all", row["category"])]
        pairs, found = write_rows(tmp_path / "some.jsonl", some), tmp_path / "figures.json"
        result = forked_dpo("eval", "--config", file, "--model", run / "final", "--data", pairs, "--json", found)
        assert result.returncode == 0, result.stderr
        figures[name] = json.loads(found.read_text())
        assert ("category" in result.stdout) == (name == "all")
    groups = figures["all"].pop("by_category")
    assert "by_source" not in figures["all"]
    assert {name: group["pairs"] for name, group in groups.items()} == {"[red]letters": 4, "maths": 8}
    for name, group in groups.items():
        for figure in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert group[figure] == pytest.approx(figures[name][figure], abs=1e-4)


BEFORE_STEP_1 = {
    "cached": {"reference": "cached"},
    "frozen": {"reference": "frozen"},
    "synced": {"reference": {"type": "synced", "every_steps": 1}},
    "none": {"loss": "simpo"},
    "wpo": {"loss": {"type": "dpo", "wpo": True}},
    "compares pairs": {"loss": "aot"},
    "another model": {"reference": {"type": "cached", "model": "other"}},
}


@pytest.mark.parametrize("name", slow_unless(lambda name: name in ("cached", "frozen", "none"), BEFORE_STEP_1))
def test_the_row_before_step_1_has_the_figures_of_the_untrained_model(
    forked_dpo, write_config, tmp_path, tiny_llama, tokenizer, name
):
    """Whether a pass over the held-out pairs was made for it or the reference had the answers."""
    settings = BEFORE_STEP_1[name]
    if isinstance(settings.get("reference"), dict) and "model" in settings["reference"]:
        settings = {"reference": {**settings["reference"], "model": str(build_llama(tmp_path / "other", tokenizer, 1))}}
    file = write_config(training={"max_steps": 2, "pairs_per_step": 4, "learning_rate": 1e-3}, **settings)
    trained = forked_dpo("train", "--config", file)
    assert trained.returncode == 0, trained.stderr
    figures = tmp_path / "figures.json"
    result = forked_dpo("eval", "--config", file, "--model", tiny_llama, "--json", figures)
    assert result.returncode == 0, result.stderr
    row, found = read_metrics(tmp_path / "runs" / "run", "eval")[0], json.loads(figures.read_text())
    assert (row.pop("split"), row.pop("step"), row.pop("epoch")) == ("eval", 0, 0.0)
    assert set(row) < set(found)
    for name, value in row.items():
        assert value == pytest.approx(found[name], abs=1e-4), name
    head, *lines = trained.stdout.splitlines()
    assert head.split() == ["held-out", "pairs", "before", "after"]
    assert f"{row['loss']:.4f}" in next(line for line in lines if line.startswith("loss"))


def talk(number, side):
    """A conversation of several turns, with a tool; what it returns differs between the sides and is not judged."""
    answer = number + (2 if side == "chosen" else 5)
    return [
        {"role": "user", "content": f"Add 2 to {number}."},
        {"role": "assistant", "content": "Let me see." if side == "chosen" else "Well, well."},
        {"role": "tool", "content": f"{number} + 2 = {answer}"},
        {"role": "assistant", "content": f"It is {answer}."},
    ]


def test_conversations_train_alike_under_both_layouts_and_their_context_is_not_judged(
    forked_dpo, write_config, tmp_path
):
    rows = [{side: talk(number, side) for side in ("chosen", "rejected")} for number in range(12)]
    pairs = str(write_rows(tmp_path / "talks.jsonl", rows))
    losses = {}
    for name, data in {"padded": {}, "packed": {}, "last": {"turns": "last"}}.items():
        layout = "padded" if name == "last" else name
        file = write_config(
            name, data={"train": pairs, "eval": None, **data}, training={"layout": layout, "pairs_per_step": 4}
        )
        result = forked_dpo("train", "--config", file)
        assert result.returncode == 0, result.stderr
        losses[name] = [row["logps/chosen"] for row in read_metrics(tmp_path / "runs" / name)]
    assert losses["packed"] == pytest.approx(losses["padded"], abs=1e-3)
    # Of two turns that are judged, the last alone is less of a surprise than both.
    assert all(last > both for last, both in zip(losses["last"], losses["padded"], strict=True))


RANKED = [
    {"prompt": f"Name a {thing}.", "responses": [answer, f"I would rather not name a {thing}."], "scores": [9, 2]}
    for thing, answer in [("river", "The Elbe."), ("city", "Bonn."), ("fruit", "An apple."), ("tree", "The oak.")]
]


@pytest.mark.parametrize(
    ("settings", "first", "lines"),
    [([], math.log(2), 1), (["loss.margin_scale=0.25"], math.log1p(math.exp(0.25 * 7)), 0)],
    ids=["by default not", "where a scale is set"],
)
def test_scores_of_ranked_responses_move_the_loss_only_where_it_is_told_to_use_them(
    forked_dpo, write_config, tmp_path, settings, first, lines
):
    """Where policy and reference are the same the loss is log(1 + e^m), m = s · (9 − 2); without a scale ln 2."""
    data = {"train": str(write_rows(tmp_path / "ranked.jsonl", RANKED)), "eval": None}
    result = forked_dpo("train", "--config", write_config(data=data, training={"max_steps": 1}), *settings)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "run"
    assert read_metrics(run)[0]["loss"] == pytest.approx(first, abs=1e-4)
    assert f"its reference: the loss is {first:.3f}" in result.stderr
    assert result.stderr.count("4 pairs have a margin, which the loss `dpo` ignores; set `loss.margin_scale`") == lines
    assert ("margin_scale: 0.25" if settings else "margin_scale: null") in (run / "config.yaml").read_text()


def test_the_resolved_configuration_runs_again_to_the_same_result(forked_dpo, finished, tmp_path):
    _, run, _ = finished
    result = forked_dpo("train", "--config", run / "config.yaml", f"output_dir={tmp_path / 'again'}")
    assert result.returncode == 0, result.stderr
    assert without_clock(read_metrics(tmp_path / "again")) == without_clock(read_metrics(run))
    weights = "final/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()


def test_another_run_is_never_written_over_unless_asked(forked_dpo, finished, write_config, tmp_path):
    file, run, _ = finished
    run = shutil.copytree(run, tmp_path / "run")
    file = write_config(output_dir=str(run), data={"train": str(file.parent / "pairs.jsonl")})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = forked_dpo("train", "--config", file)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    resumed = forked_dpo("train", "--config", file, "--resume")
    assert resumed.returncode == 0
    assert "finished" in resumed.stderr
    changed = forked_dpo("train", "--config", file, "--resume", "loss.beta=0.3")
    assert changed.returncode == 2
    assert "`loss.beta` was 0.1 and is 0.3" in changed.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    replaced = forked_dpo("train", "--config", file, "--overwrite", "training.max_steps=1")
    assert replaced.returncode == 0, replaced.stderr
    assert [row["step"] for row in read_metrics(run)] == [1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]


def test_a_dry_run_prints_the_plan_and_writes_no_run(forked_dpo, write_config, tmp_path, tiny_llama):
    result = forked_dpo("train", "--config", write_config(), "--dry-run")
    assert result.returncode == 0, result.stderr
    from transformers import AutoModelForCausalLM

    parameters = AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()
    for part in ("32", "8 of 4 pairs", f"{parameters:,}", "memory: activations", "memory: at the peak"):
        assert part in result.stdout
    assert not (tmp_path / "runs").exists()
    # Nothing is said twice.
    rows = [re.split(r"  +", line)[0] for line in result.stdout.split("\n\n")[0].splitlines()]
    assert {"model", "loss", "learning rate", "steps", "output"} < set(rows)
    assert len(rows) == len(set(rows))
    assert not re.search(r"^(model|steps|output)  ", result.stderr, re.M)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (
            {"checkpoints": {"every_steps": 9}, "training": {"pairs_per_step": 4}},
            "warning: `checkpoints.every_steps` 9",
        ),
        ({"evaluation": {"every_steps": 9}, "training": {"pairs_per_step": 4}}, "warning: `evaluation.every_steps` 9"),
        ({"training": {"pairs_per_step": 33}}, "warning: `training.pairs_per_step` 33 is above the 32 training pairs"),
        ({"checkpoints": {}}, None),
    ],
)
def test_a_setting_beyond_the_end_of_the_run_is_reported(forked_dpo, write_config, settings, start):
    """Eight steps of four pairs; the last of the settings are all within reach."""
    result = forked_dpo("train", "--config", write_config(**settings), "--dry-run")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "is never reached" in line or "is above" in line]
    assert any(line.startswith(start) for line in lines) if start else not lines


def test_a_default_beyond_the_end_of_the_run_is_a_note(forked_dpo, tmp_path, tiny_llama, pairs_file):
    file = tmp_path / "short.yaml"
    file.write_text(json.dumps({"model": str(tiny_llama), "data": {"train": str(pairs_file), "eval": 0.5}}))
    result = forked_dpo("train", "--config", file, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "note: `checkpoints.every_steps` 100 is never reached: the run has 1 step" in result.stderr
    assert "note: `training.pairs_per_step` 32 is above the 20 training pairs" in result.stderr
    assert "warning" not in result.stderr


def test_training_and_held_out_pairs_may_come_from_sources_of_their_own(forked_dpo, write_config, tmp_path, demo_rows):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in demo_rows[40:46]), encoding="utf-8")
    result = forked_dpo("train", "--config", write_config(), f"data.eval={held}", "training.max_steps=2")
    assert result.returncode == 0, result.stderr
    assert "40 to train on, 6 held out" in result.stderr
    assert read_metrics(tmp_path / "runs" / "run", "eval")[0]["pairs"] == 6


def test_a_second_start_tokenizes_nothing(forked_dpo, write_config, monkeypatch):
    file = write_config()
    first = forked_dpo("prepare-data", "--config", file)
    second = forked_dpo("prepare-data", "--config", file, "training.learning_rate=1e-4", "training.seed=1")
    assert "prepared data written" in first.stderr
    assert "prepared data found" in second.stderr
    assert "preparing" not in second.stderr
    assert first.stdout == second.stdout


def test_prepare_data_shows_pairs_with_their_special_tokens(forked_dpo, write_config, demo_rows):
    result = forked_dpo("prepare-data", "--config", write_config(), "--show", 2)
    assert result.returncode == 0, result.stderr
    assert "data.train: 40 rows of the shape instruction, 40 pairs" in result.stdout
    shown = result.stdout.replace("|", "")
    for row in demo_rows[:2]:
        for text in (row["instruction"], row["chosen"], row["rejected"]):
            assert text in shown
    assert "<im_start>user⏎" in shown
    assert "<im_end>⏎" in shown


def test_colours_tell_the_parts_apart_on_a_terminal_and_no_color_is_obeyed(forked_dpo, write_config):
    file = write_config()
    coloured = forked_dpo("prepare-data", "--config", file, "--show", 1, env={"FORCE_COLOR": "1"})
    plain = forked_dpo("prepare-data", "--config", file, "--show", 1, env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert "\x1b[36m" in coloured.stdout
    assert "\x1b[32m" in coloured.stdout
    assert "\x1b[3" not in plain.stdout


def test_a_prepared_folder_is_a_source_and_is_refused_under_another_length_rule(forked_dpo, write_config, tmp_path):
    file, folder = write_config(), tmp_path / "prepared"
    assert forked_dpo("prepare-data", "--config", file, "--out", folder).returncode == 0
    trained = forked_dpo("train", "--config", file, f"data.train={folder}", "training.max_steps=1")
    assert trained.returncode == 0, trained.stderr
    assert "prepared data" not in trained.stderr
    refused = forked_dpo("train", "--config", file, "--overwrite", f"data.train={folder}", "data.max_length=300")
    assert refused.returncode == 2
    assert "another `data.max_length`" in refused.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"reference": {"type": "synced", "every_steps": 1, "alpha": 1.0}},
        {"loss": [{"type": "orpo"}, {"type": "simpo", "wpo": True}]},
        {"loss": ["bco", "aot"]},
    ],
    ids=["a reference that moves", "no reference", "losses that remember and compare"],
)
def test_dpo_eval_judges_as_the_run_did(forked_dpo, write_config, tmp_path, settings):
    """A synced reference that has become the policy would make every evaluation of the run a tie."""
    file = write_config(training={"max_steps": 3, "pairs_per_step": 4, "learning_rate": 1e-3}, **settings)
    trained = forked_dpo("train", "--config", file)
    assert trained.returncode == 0, trained.stderr
    result = forked_dpo("eval", "--config", file, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    found, row = (
        json.loads((tmp_path / "figures.json").read_text()),
        read_metrics(tmp_path / "runs" / "run", "eval")[-1],
    )
    assert abs(row["rewards/margins"]) > 1e-3
    for name in set(row) - {"split", "step", "epoch"}:
        assert found[name] == pytest.approx(row[name], abs=1e-5), name


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"reference": "frozen"}, []),
        ({"reference": {"type": "synced", "every_steps": 1}}, ["8"]),
        ({"loss": "simpo"}, []),
    ],
    ids=["frozen", "synced", "none"],
)
def test_only_pairs_that_a_reference_is_asked_about_before_step_1_are_counted(
    forked_dpo, write_config, settings, asked
):
    """A frozen one is asked batch by batch, one that moves about the held-out pairs, and none about nothing."""
    trained = forked_dpo("train", "--config", write_config(training={"max_steps": 1}, **settings))
    assert trained.returncode == 0, trained.stderr
    assert re.findall(r"reference log-probabilities: (\d+) pairs", trained.stderr) == asked


def test_reference_strategies_train_to_the_same_losses(forked_dpo, write_config, tmp_path):
    losses = {}
    for name in ("cached", "frozen"):
        file = write_config(name, reference=name, training={"max_steps": 4})
        assert forked_dpo("train", "--config", file).returncode == 0
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / "runs" / name)]
    assert losses["frozen"] == pytest.approx(losses["cached"], abs=1e-5)


def test_a_model_without_a_template_trains_on_plain_prompts_and_a_template_file_is_kept(
    forked_dpo, write_config, tmp_path
):
    plain = forked_dpo("train", "--config", write_config("plain"), "model.chat_template=plain", "training.max_steps=1")
    assert plain.returncode == 0, plain.stderr
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
                        "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    own = forked_dpo(
        "train", "--config", write_config("own"), f"model.chat_template={template}", "training.max_steps=1"
    )
    assert own.returncode == 0, own.stderr
    kept = tmp_path / "runs" / "own" / "final" / "chat_template.jinja"
    assert kept.read_text() == template.read_text()


def test_gradient_checkpointing_and_bfloat16_run(forked_dpo, write_config, tmp_path):
    file = write_config(training={"gradient_checkpointing": True, "max_steps": 2}, model={"dtype": "bfloat16"})
    result = forked_dpo("train", "--config", file)
    assert result.returncode == 0, result.stderr
    assert "bfloat16" in result.stderr
    assert read_metrics(tmp_path / "runs" / "run")[0]["loss"] == pytest.approx(math.log(2), abs=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_names_the_pairs_and_leaves_the_last_checkpoint(
    forked_dpo, write_config, tmp_path, pairs_file
):
    file = write_config(training={"schedule": "linear", "warmup_ratio": 0.99, "max_grad_norm": None})
    result = forked_dpo("train", "--config", file, "training.learning_rate=1e38", "checkpoints.every_steps=1")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    step = int(re.search(r"of step (\d+) is not finite", result.stderr).group(1))
    assert re.search(rf"pairs: {re.escape(str(pairs_file))}:\d+", result.stderr)
    run = tmp_path / "runs" / "run"
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, step))
    assert all(math.isfinite(row["loss"]) for row in rows)
    newest = run / "checkpoints" / f"step-{step - 1:06d}"
    assert verify(newest)["files"]
    assert not (run / "final").exists()


def test_a_held_out_loss_that_is_not_finite_is_an_error_that_names_pairs(
    forked_dpo, write_config, tmp_path, pairs_file
):
    result = forked_dpo("train", "--config", write_config(), "training.learning_rate=1e30", "training.max_steps=1")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(rf"held-out loss is not finite; its pairs: {re.escape(str(pairs_file))}:\d+", result.stderr)
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / "run")] == [1]


def test_a_damaged_model_is_not_scored(forked_dpo, finished, tmp_path):
    file, run, _ = finished
    model = shutil.copytree(run / "final", tmp_path / "final")
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    result = forked_dpo("eval", "--config", file, "--model", model)
    assert result.returncode == 2
    assert "the model is damaged" in result.stderr


def test_results_are_not_cut_on_a_pipe(forked_dpo, finished):
    file, run, _ = finished
    result = forked_dpo("eval", "--config", file, env={"COLUMNS": "40"})
    assert str(run / "final") in result.stdout
    assert "log-probability of rejected" in result.stdout
    assert "…" not in result.stdout


def test_a_run_that_diverged_says_what_got_worse_and_what_to_change(forked_dpo, write_config):
    """As finite as it is, the model has unlearned to speak; the run itself did what it was told."""
    result = forked_dpo("train", "--config", write_config(), "training.learning_rate=1")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if "both responses become less likely" in line)
    assert line.startswith("warning: step 8: ")
    assert re.search(r"chosen -[\d.]+ nats per token", line)
    assert "Try: lower `training.learning_rate` (1; " in line
    assert "found    both_fall, step 8: both responses become less likely" in result.stdout


def test_a_healthy_run_has_no_warning_at_its_end(forked_dpo, write_config, tmp_path):
    result = forked_dpo("train", "--config", write_config(training={"pairs_per_step": 4, "learning_rate": 1e-4}))
    assert result.returncode == 0, result.stderr
    before, after = read_metrics(tmp_path / "runs" / "run", "eval")
    assert after["loss"] < before["loss"]
    assert "worse" not in result.stderr
