"""`dpo eval --model A --model B`: several models on the same pairs."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest

import dpo_cli
from dpo_cli.config.outputs import json_file_errors
from dpo_cli.evaluation.comparison import compare
from dpo_cli.modeling import policy as policies
from dpo_cli.reporting.console import Console
from tests.builders import save_adapter
from tests.conftest import DEMO_PAIRS, build_llama, make_config, write_rows

# PEFT asks transformers in a way that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama, tokenizer):
    """A folder with a configuration and three models: what it begins with, another one, and an adapter."""
    folder = tmp_path_factory.mktemp("compare")
    rows = [json.loads(line) for line in DEMO_PAIRS.read_text(encoding="utf-8").splitlines()]
    pairs = write_rows(folder / "pairs.jsonl", rows[:40])
    make_config(folder, tiny_llama, pairs, "run", data={"train": str(pairs), "eval": 0.5})
    build_llama(folder / "other", tokenizer, seed=1)
    save_adapter(tiny_llama, folder / "adapter", rank=3)
    return folder


def evaluated(project, *models: Path, **asked):
    return dpo_cli.evaluate(project / "run.yaml", model=[str(model) for model in models], **asked)


def test_each_models_figures_are_those_that_it_has_alone(project, tiny_llama):
    models = (project / "adapter", project / "other", tiny_llama)
    found = evaluated(project, *models)
    alone = [evaluated(project, model) for model in models]
    assert found["models"] == alone
    assert [set(one["models"].items()) for one in found["comparisons"]] == [
        {("A", str(models[0])), ("B", str(models[1]))},
        {("A", str(models[0])), ("C", str(models[2]))},
    ]
    for comparison, other in zip(found["comparisons"], alone[1:], strict=True):
        for name, difference in comparison["differences"].items():
            assert difference["value"] == pytest.approx(other[name] - alone[0][name], abs=1e-9)
            low, high = difference["interval"] or (difference["value"], difference["value"])
            assert low <= difference["value"] <= high
        assert comparison["pairs"] == alone[0]["pairs"]


def test_the_reference_is_loaded_once_and_no_two_models_are_held_at_once(project, tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path))
    loads, alive, held, load = [], [], [], policies.load_policy

    def noted(name, *how):
        alive.append(sum(model() is not None for model in held))
        loads.append(str(name))
        model = load(name, *how)
        held.append(weakref.ref(model.lm_head.weight))
        return model

    monkeypatch.setattr(policies, "load_policy", noted)
    other, copy = project / "other", tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    evaluated(project, other, copy)
    assert loads == [str(tiny_llama), str(other), str(copy)]
    assert alive == [0, 0, 0]


def test_what_is_printed_names_the_models_by_letters_and_says_in_words_what_was_found(project, tiny_llama, capfd):
    found = evaluated(project, tiny_llama, project / "other", console=Console(), json_file=None)
    said = capfd.readouterr().out
    named = [line.split() for line in said.splitlines()[:2]]
    assert named == [["A", str(tiny_llama)], ["B", str(project / "other")]]
    (comparison,) = found["comparisons"]
    assert comparison["compared_by"] == "logps/accuracies", "the first is the reference, whose pairs all tie"
    assert comparison["statement"] in " ".join(said.split())
    assert "McNemar's exact test" in said
    named = [one["where"] for way in ("first_ahead", "second_ahead") for one in comparison[way]]
    assert named
    assert all(f"\n{where} " in said for where in named)


def test_rows_of_files_give_the_same_comparison(project):
    """As a report reads them: through JSON."""
    from dpo_cli.pipeline import comparing

    kept = []
    measured = comparing.compared

    def noted(models):
        kept.extend(models)
        return measured(models)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_cli.pipeline.evaluate.compared", noted)
        found = evaluated(project, project / "adapter", project / "other")
    first, second = (json.loads(json.dumps(one.rows)) for one in kept)
    again = compare(first, second)
    assert again is not None
    assert again.as_dict().items() <= found["comparisons"][0].items()


def test_one_pair_that_is_scored_is_compared_without_a_claim(project, tmp_path):
    pair = write_rows(tmp_path / "one.jsonl", [json.loads((project / "pairs.jsonl").read_text().splitlines()[0])])
    found = evaluated(project, project / "adapter", project / "other", data=str(pair))
    (comparison,) = found["comparisons"]
    assert (comparison["pairs"], comparison["better"]) == (1, None)
    assert comparison["statement"] == "these pairs cannot tell them apart: there is only one"


@pytest.mark.program
def test_the_program_writes_all_of_it_to_a_file(project, forked_dpo):
    models = ("--model", project / "adapter", "--model", project / "other")
    done = forked_dpo("eval", project / "run.yaml", *models, "--json", project / "figures.json")
    assert done.returncode == 0, done.stderr
    assert not list(json_file_errors(project / "figures.json")), "the next evaluation may not replace them"
    found = json.loads((project / "figures.json").read_text())
    assert found == evaluated(project, project / "adapter", project / "other")
    assert " − A" in done.stdout


@pytest.mark.program
@pytest.mark.parametrize(
    ("models", "said"),
    [
        ("other other", "the model `other` is named twice"),
        ("other ./other", "the model `./other` is named twice, also as `other`"),
        ("other ./no", "no model folder `./no`"),
        ("./no ./neither", "no model folder `./neither`"),
    ],
)
def test_models_that_cannot_be_compared_are_an_error_before_any_work(project, forked_dpo, models, said):
    options = [part for model in models.split() for part in ("--model", model)]
    done = forked_dpo("eval", "run.yaml", *options, cwd=project)
    assert (done.returncode, "loading" in done.stderr) == (2, False)
    assert said in done.stderr
    assert done.stderr.count("hint: ") == len(done.stderr.split("error: ")) - 1
