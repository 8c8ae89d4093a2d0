"""What `dpo eval` tells beside the figures, of a model that was trained: by the pairs themselves, and as text."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.reporting.console import Console
from tests.builders import prepare_pairs
from tests.conftest import build_llama, make_config, write_rows

NUMBER = r"[-+]?[\d,]*\.?\d+"


@pytest.fixture(scope="module")
def rows(demo_rows):
    """Sixty demo pairs, of which every third has its longer response chosen."""
    return [
        {
            **row,
            **({"chosen": row["rejected"], "rejected": row["chosen"]} if number % 3 == 0 else {}),
            "category": "only" if number == 3 else "ab"[number % 2],
            "source": "demo",
        }
        for number, row in enumerate(demo_rows[:60])
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, rows):
    """The configuration of a run of six steps that has ended, and the file of its pairs."""
    folder = tmp_path_factory.mktemp("trained")
    file = write_rows(folder / "pairs.jsonl", rows)
    settings = {"training": {"max_steps": 6}, "evaluation": {"samples": 0}}
    config = make_config(folder, tiny_llama, file, **settings)
    list(dpo_cli.train(config))
    return config, file


@pytest.fixture(scope="module")
def found(trained):
    config, file = trained
    return dpo_cli.evaluate(config, data=str(file))


@pytest.fixture(scope="module")
def by_hand(trained, tiny_llama, tokenizer, tmp_path_factory):
    """The log-probabilities of every response's tokens under the trained model and its base, by their own logits."""
    config, file = trained
    pairs = prepare_pairs(file, tokenizer, tmp_path_factory.mktemp("prepared") / "pairs")
    final = f"{load_config(config).output_dir}/final"
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in (final, tiny_llama)]
    return [
        {side: [tokens_of(model, pair.prompt, getattr(pair, side)) for model in models] for side in SIDES}
        for pair in (pairs[index] for index in range(len(pairs)))
    ]


SIDES = ("chosen", "rejected")


@torch.no_grad()
def tokens_of(model, prompt, response):
    whole = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    logps = model(whole).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(-1, whole[0, 1:, None])[-len(response) :, 0]


def outcome(margin):
    return 0.5 if abs(margin) <= 1e-4 else float(margin > 0)


def mean(values):
    return sum(values) / len(values)


def test_baselines_are_those_of_the_base_s_own_logits(found, by_hand):
    sums = [[pair[side][1].sum() for side in SIDES] for pair in by_hand]
    means = [[pair[side][1].mean() for side in SIDES] for pair in by_hand]
    lengths = [[len(pair[side][1]) for side in SIDES] for pair in by_hand]
    for name, values in {"reference_sum": sums, "reference_mean": means, "longer": lengths}.items():
        expected = mean([outcome(float(chosen - rejected)) for chosen, rejected in values])
        assert found["baselines"][name]["accuracy"] == pytest.approx(expected)
        assert found["baselines"][name]["pairs"] == len(by_hand) == 60
    assert (found["baselines"]["longer"]["accuracy"], found["baselines"]["shorter"]["accuracy"]) == (1 / 3, 2 / 3)


def test_distances_are_those_of_both_models_own_logits(found, by_hand):
    for side in SIDES:
        d = torch.cat([pair[side][0] - pair[side][1] for pair in by_hand])
        expected = {
            "tokens": len(d),
            "log_ratio": float(d.mean()),
            "forward_k3": float((d.exp() - 1 - d).mean()),
            "reverse_k3": float(((-d).exp() - 1 + d).mean()),
        }
        assert found["from_reference"][side] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found["from_reference"]["rejected"]["forward_k3"] > 1e-3


def test_scores_are_those_of_sigma_of_beta_delta(found, by_hand):
    c, r = (torch.stack([pair[side][0].sum() - pair[side][1].sum() for pair in by_hand]) for side in SIDES)
    p = torch.sigmoid(0.1 * (c - r))
    assert found["calibration"]["log_score"] == pytest.approx(float(-p.log().mean()), abs=1e-4)
    assert found["calibration"]["brier_score"] == pytest.approx(float((1 - p).square().mean()), abs=1e-4)
    # The loss of plain DPO is its log score.
    assert found["calibration"]["log_score"] == pytest.approx(found["loss"], abs=1e-6)


def test_groups_have_it_all_and_what_one_pair_can_have(found):
    assert "by_source" not in found
    groups = found["by_category"]
    assert [groups[name]["pairs"] for name in ("a", "b", "only")] == [30, 29, 1]
    for name in ("baselines", "by_margin", "by_length", "calibration", "from_reference"):
        assert all(name in group for group in groups.values())
    assert groups["only"]["length_controlled"].keys() == {"missing"}
    tokens = sum(group["from_reference"]["chosen"]["tokens"] for group in groups.values())
    assert tokens == found["from_reference"]["chosen"]["tokens"]


def read_table(text):
    """Return the numbers of every row of the table of accuracies by its title."""
    table = text[text.index("on the same pairs") :].split("\n\n")[0].splitlines()[1:]
    return {re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in table}


def cells(one):
    bounds = "{:.1f} – {:.1f} %".format(*(100 * bound for bound in one["interval"]))
    return [str(one["pairs"]), f"{100 * one['accuracy']:.1f} %", bounds]


def test_the_text_has_the_numbers_of_the_json_and_no_others(trained, capfd):
    config, _ = trained
    found = dpo_cli.evaluate(config, data=None, console=Console())
    text = capfd.readouterr().out
    table = read_table(text)
    expected = {
        "the shorter response": cells(found["baselines"]["shorter"]),
        "the likelier one for the reference (sum)": cells(found["baselines"]["reference_sum"]),
        "(mean per token)": cells(found["baselines"]["reference_mean"]),
        "chance": ["50.0 %"],
        **{f"its reward margin ±{one['from']:.3g} to ±{one['to']:.3g}": cells(one) for one in found["by_margin"]},
    }
    if "accuracy" in found["length_controlled"]:
        expected["the model, length-controlled"] = cells(found["length_controlled"])
    else:
        assert f"no length-controlled accuracy: {found['length_controlled']['missing']}" in " ".join(text.split())
    lengths = {title: table.pop(title) for title in list(table) if title.startswith("chosen ")}
    assert table == expected
    assert list(lengths.values()) == [cells(one) for one in found["by_length"]]
    for title, one in zip(lengths, found["by_length"], strict=True):
        bounds = [int(number) for number in re.findall(r"\d+", title)]
        assert set(bounds) == {abs(one["from"]), abs(one["to"])} or "as long" in title
        assert ("shorter" in title) is (one["to"] < 0)
    for side, numbers in found["from_reference"].items():
        (line,) = re.findall(rf"on {side} responses (.*)", text)
        shown = [f"{numbers[name]:.4f}" for name in ("log_ratio", "forward_k3", "reverse_k3")]
        assert line.split() == shown
    scores = found["calibration"]
    (sure,) = re.findall(r"σ\(βΔ\) is .*", text)
    assert re.findall(NUMBER, sure) == [f"{100 * scores[n]:.1f}" for n in ("confidence", "error", "error_by_chance")]
    (line,) = re.findall(r"Brier score .*", text)
    assert re.findall(NUMBER, line)[::2] == [f"{scores['brier_score']:.4f}", f"{scores['log_score']:.4f}"]


@pytest.mark.program
def test_the_program_tells_it_on_a_screen(trained, rows, tmp_path, forked_dpo):
    """Without groups it is 40 lines of 80 columns at most, and the JSON has the same keys as from Python."""
    config, _ = trained
    plain = write_rows(tmp_path / "plain.jsonl", [{k: row[k] for k in row if k != "category"} for row in rows])
    file = tmp_path / "figures.json"
    done = forked_dpo("eval", config, "--data", plain, "--json", file, env={"COLUMNS": "80"})
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 40, done.stdout
    found = json.loads(file.read_text())
    table = read_table(done.stdout)
    assert cells(found["baselines"]["shorter"]) == table["the shorter response"]
    assert cells(found["length_controlled"]) == table["the model, length-controlled"]
    assert "the longer response" not in table
    assert [name for name in found if name.startswith("by_")] == ["by_margin", "by_length"]


def test_the_base_is_named_where_it_is_neither_scored_nor_the_reference(
    trained, write_config, tiny_llama, tokenizer, tmp_path, capfd
):
    other = build_llama(tmp_path / "other", tokenizer, seed=5)
    file = write_config(reference={"type": "frozen", "model": str(other)})
    final = f"{load_config(trained[0]).output_dir}/final"
    found = dpo_cli.evaluate(file, model=final, console=Console())
    assert found["baselines"]["base"] == {"missing": f"`--model {tiny_llama}` scores it"}
    assert f"the base model: `--model {tiny_llama}` scores it" in " ".join(capfd.readouterr().out.split())
    assert "base" not in dpo_cli.evaluate(file, model=str(tiny_llama))["baselines"]
    simpo = dpo_cli.evaluate(write_config("free", loss="simpo"), model=final, console=Console())
    text = " ".join(capfd.readouterr().out.split())
    assert list(simpo["baselines"]) == ["longer", "shorter", "chance", "base"]
    assert ("nats a token" in text, "for the reference" in text) == (False, False)
    assert "no calibration: the loss `simpo`, as it is set, does not fit" in text


@pytest.mark.parametrize("loss", [{"type": "aot"}, {"type": "dpo", "wpo": True}], ids=["compares pairs", "wpo"])
def test_it_is_the_same_whatever_else_the_loss_asks_of_a_model(trained, found, write_config, loss):
    """Losses that see all pairs at once, or how sure the model is at each token."""
    config, file = trained
    other = write_config("other", loss=loss)
    again = dpo_cli.evaluate(other, model=f"{load_config(config).output_dir}/final", data=str(file))
    assert again["baselines"] == found["baselines"]
    for side in SIDES:
        assert again["from_reference"][side] == pytest.approx(found["from_reference"][side], abs=1e-5)
    assert ("missing" in again["calibration"]) is (loss["type"] == "aot")


@pytest.mark.parametrize("number", [1, 2])
def test_a_pair_or_two_without_any_margin_are_told_without_silly_numbers(
    trained, rows, tmp_path, tiny_llama, capfd, number
):
    few = write_rows(tmp_path / "few.jsonl", rows[:number])
    found = dpo_cli.evaluate(trained[0], model=str(tiny_llama), data=str(few), console=Console())
    assert (found["pairs"], found["ties"], found["calibration"]["error"]) == (number, number, 0.0)
    distances = [found["from_reference"]["chosen"][name] for name in ("log_ratio", "forward_k3", "reverse_k3")]
    assert distances == pytest.approx([0, 0, 0], abs=1e-6)
    assert "no length-controlled accuracy" in capfd.readouterr().out
    assert "nan" not in json.dumps(found).lower()
