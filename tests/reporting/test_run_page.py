"""The page of a run: its figures are those of the run's files, its text is text, and it stays small."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.evaluation.findings.watch import found, gravest_first
from dpo_cli.pipeline.report import write_report
from dpo_cli.reporting import run_record
from dpo_cli.reporting.pages.run.charts import PLAIN, chart
from dpo_cli.reporting.pages.run.curves import CHARTS, charts_of
from dpo_cli.reporting.pages.run.page import findings_of, marks_of
from dpo_cli.reporting.pages.run.series import Series
from dpo_cli.reporting.run_record import read_run
from dpo_cli.reporting.samples import before_and_after
from dpo_cli.training.run_folder import RunFolder
from tests.evaluation.test_comparison import row as pair
from tests.reporting.runs import SETTINGS, eval_row, healthy, step_row, write_run
from tests.reporting.test_data_page import HOSTILE, report

MOST_BYTES = 1_500_000


class Page(HTMLParser):
    """What is on a page: its text, its tables, and what its scripts are given."""

    VOID = ("meta", "br", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text, self.charts, self.tables = "", [], []
        self._open: list[str] = []
        self._data = False
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)
        self._data = tag == "script" and ("type", "application/json") in attrs
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._data = False

    def handle_data(self, data):
        if self._data:
            self.charts.append(json.loads(data))
        elif self._open and self._open[-1] not in ("script", "style"):
            self.text += data
            if {"td", "th"} & set(self._open):
                self.tables[-1][-1][-1] += data


def page_of(run, out=None):
    file = write_report([RunFolder(run)], out)
    return Page(file.read_text(encoding="utf-8"))


def drawn(page):
    """The series of all charts of a page, by their order and name: a value for each step."""
    return [
        {one["name"]: dict(zip(one["x"], one["y"], strict=True)) for one in chart["series"]} for chart in page.charts
    ]


def test_every_value_of_the_curves_is_that_of_metrics_jsonl(tmp_path):
    rows = healthy(steps=20, every=5)
    charts = drawn(page_of(write_run(tmp_path / "run", rows)))
    known = [subject for subject in CHARTS if subject.metrics[0][0] in rows[1]]
    assert len(charts) == len(known) == 8
    for subject, curves in zip(known, charts, strict=True):
        for name, _, called in subject.metrics:
            for split, title in (("train", "training" if subject.held_out else "each step"), ("eval", "held out")):
                if split == "eval" and not subject.held_out:
                    continue
                expected = {row["step"]: row[name] for row in rows if row["split"] == split}
                assert curves[f"{called}, {title}" if called else title] == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_a_mean_of_steps_is_their_mean(tmp_path):
    rows = healthy(steps=120)
    loss = drawn(page_of(write_run(tmp_path / "run", rows)))[0]
    (name,) = [name for name in loss if "mean of" in name]
    half = (int(re.search(r"mean of (\d+) steps", name)[1]) - 1) // 2
    known = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    assert half > 1
    for step, value in loss[name].items():
        around = [known[other] for other in range(max(1, step - half), min(120, step + half) + 1)]
        assert value == pytest.approx(sum(around) / len(around), rel=1e-5)


def test_the_table_of_figures_is_that_of_dpo_eval_before_and_after(tmp_path):
    rows = healthy()
    (table,) = [
        table
        for table in page_of(write_run(tmp_path / "run", rows)).tables
        if table[0][0] == "" and "pairs" in table[1]
    ]
    before, after = rows[0], rows[-1]
    assert table[0][1:] == ["before training", "after step 120"]
    assert [cells[1:] for cells in table[1:]] == [[figure.cell(before), figure.cell(after)] for figure in FIGURES]


@given(st.sampled_from([0.6931, -123.4, 0.0, 5e-6, 40_000.0]), st.sampled_from([1e-7, 3e-6, 2e-4, 0.04, 7.0, 900.0]))
def test_no_two_values_of_an_axis_are_written_alike(low, spread):
    """As where the loss of a run stays at ln 2."""
    series = [Series("loss", "held", [(0, low), (1, low + spread)])]
    labels = [tick.label for tick in chart("Loss", "", series, PLAIN).y_ticks]
    assert len(labels) > 2
    assert len(set(labels)) == len(labels)
    values = [float(label.replace(",", "")) for label in labels]
    assert values[0] <= low + spread / 1000
    assert values[-1] >= low + spread - spread / 1000


def test_values_of_five_digits_are_written_without_an_exponent():
    assert [PLAIN.write(value) for value in (-12345.6, 1234.56, 0.693147, 0.0)] == ["-12350", "1235", "0.6931", "0"]


@pytest.mark.slow
def test_a_hundred_thousand_steps_make_a_small_page_in_seconds_with_every_extreme_on_it(tmp_path):
    rows = [step_row(step) for step in range(1, 100_001)]
    rows[77_776]["loss"] = 9.5
    rows[33_332]["grad_norm"] = 0.001
    rows += [eval_row(step) for step in range(0, 100_001, 100)]
    run = write_run(tmp_path / "run", rows)
    begun = time.process_time()
    page = page_of(run)
    assert time.process_time() - begun < 30
    assert (run / "report.html").stat().st_size < MOST_BYTES
    loss, norm = drawn(page)[0], drawn(page)[5]
    assert loss["training"][77_777] == 9.5
    assert norm["each step"][33_333] == 0.001


@pytest.mark.parametrize("text", HOSTILE)
def test_what_comes_from_data_settings_and_answers_is_text(tmp_path, text):
    sample = {
        "step": 0,
        "where": text,
        "prompt": text,
        "answer": text,
        "tokens": 3,
        "ended": True,
        "chosen": text,
        "chosen_tokens": 4,
    }
    pair = {"step": 120, "pair": 1, "where": text, "chosen_tokens": 5, "rewards/margins": -1.5}
    hostile = write_run(
        tmp_path / "run",
        healthy(),
        settings=SETTINGS.replace("some/model", json.dumps(text)).replace("pairs.jsonl", json.dumps(text)),
        samples=[sample, {**sample, "step": 120, "answer": f"{text} more"}],
        pairs=[{**pair, "text": dict.fromkeys(("prompt", "chosen", "rejected"), text)}],
    )
    plain = write_run(
        tmp_path / "plain",
        healthy(),
        samples=[{**sample, "prompt": "a", "answer": "b"}, {**sample, "step": 120, "prompt": "a", "answer": "b c"}],
        pairs=[{**pair, "text": dict.fromkeys(("prompt", "chosen", "rejected"), "a")}],
    )
    found, usual = page_of(hostile), page_of(plain)
    assert set(found.tags) - {"mark"} == set(usual.tags) - {"mark"}
    assert found.tags.count("script") == usual.tags.count("script")
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    shown = (hostile / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", shown)


def test_prompts_are_shown_without_their_template_as_everywhere(tmp_path):
    rest = {"answer": "A.", "tokens": 2, "ended": True, "chosen": "C.", "chosen_tokens": 2}
    asked = "Name the capital.", "Count to three."
    samples = [
        {"step": step, "where": f"a:{n}", "prompt": f"<|user|>\n{text}<|end|>\n<|assistant|>\n", **rest}
        for step in (0, 120)
        for n, text in enumerate(asked)
    ]
    text = page_of(write_run(tmp_path / "run", healthy(), samples=samples)).text
    assert all(one in text for one in asked)
    assert "<|" not in text


def test_a_text_of_a_megabyte_is_shortened(tmp_path):
    long = "word " * 200_000
    sample = {
        "step": 0,
        "where": "a:1",
        "prompt": long,
        "answer": long,
        "tokens": 3,
        "ended": False,
        "chosen": long,
        "chosen_tokens": 4,
    }
    run = write_run(tmp_path / "run", healthy(), samples=[sample, {**sample, "step": 120}])
    page = page_of(run)
    assert (run / "report.html").stat().st_size < MOST_BYTES
    assert "more characters" in page.text


def test_an_answer_that_ends_at_once_is_shown_as_nothing(tmp_path):
    sample = {"where": "a:1", "prompt": "Why?", "ended": True, "chosen": "So.", "chosen_tokens": 2}
    samples = [{**sample, "step": 0, "answer": "So", "tokens": 2}, {**sample, "step": 120, "answer": "", "tokens": 1}]
    text = " ".join(page_of(write_run(tmp_path / "run", healthy(), samples=samples)).text.split())
    assert "after step 120, 1 token (nothing)" in text
    assert before_and_after(samples, 120)[1:3] == ["before  So", "after   (nothing)"]


def test_the_best_step_has_one_mark(tmp_path):
    settings = SETTINGS + "evaluation: {best_by: loss}\n"
    run = read_run(RunFolder(write_run(tmp_path / "run", healthy(), settings=settings)))
    marks = marks_of(replace(run, checkpoints=[100, 120]))
    assert [(mark.kind, mark.step) for mark in marks] == [("checkpoint", 120), ("best", 100)]
    assert not any("`" in mark.text for mark in marks)


def test_the_page_of_a_run_at_work_takes_the_whole_lines_alone(tmp_path):
    run = write_run(tmp_path / "run", healthy(steps=10, every=5))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(step_row(11, loss=0.1))[:-20])
    page = page_of(run)
    assert max(drawn(page)[0]["training"]) == 10
    assert "lines of" not in page.text
    assert "line of" not in page.text
    assert "Not finished: 10 steps so far." in page.text


def test_damaged_lines_are_counted_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "run", healthy(steps=10, every=5))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    broken = [
        "{",
        "[]",
        '{"step": "x"}',
        '{"step": -1}',
        '{"step": 1e400}',
        "\x00",
        "[" * 100_000,
        '{"split": "train"}',
    ]
    broken += ['{"split": "eval", "step": 12, "accuracy_interval": 3}', '{"split": "train", "step": 3, "loss": 1e308}']
    broken += ['{"split": "train", "step": 11, "loss": 1' + "0" * 400 + "}"]
    strange = '{"split": "train", "step": 11, "loss": "<b>"}'
    (run / "metrics.jsonl").write_text("\n".join([*lines, *broken, strange]) + "\n", encoding="utf-8")
    page = page_of(run)
    assert f"{len(broken)} lines of metrics.jsonl cannot be read" in page.text
    assert sorted(drawn(page)[0]["training"]) == list(range(1, 11))


def test_only_the_pages_own_script_may_run(tmp_path):
    text = (write_report([RunFolder(write_run(tmp_path / "run", healthy()))])).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:", text)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({}, "Better on the held-out pairs"),
        ({"rewards/accuracies": 0.55, "accuracy_interval": [0.45, 0.64]}, "Cannot be told from these held-out pairs"),
        ({"loss": 0.9}, "Worse, although the held-out reward accuracy rose"),
        ({"rewards/accuracies": 0.3, "accuracy_interval": [0.22, 0.39]}, "Worse on the held-out pairs"),
    ],
)
def test_the_verdict_is_in_words(tmp_path, after, words):
    rows = [*healthy()[:-1], eval_row(120, **after)]
    page = page_of(write_run(tmp_path / "run", rows))
    assert words in page.text
    low, high = rows[-1]["accuracy_interval"]
    assert (
        f"{100 * rows[-1]['rewards/accuracies']:.1f} % after (95 % interval {100 * low:.1f} – {100 * high:.1f} %"
        in page.text
    )


FACTS = {
    "losses": [{"type": "dpo"}], "trained": "all weights", "learning_rate": 1e-5, "warmup_steps": 0, "num_steps": 120,
    "steps_per_epoch": 120, "pairs_per_step": 16, "from_reference": True, "chosen_tokens": 20.0,
    "rejected_tokens": 40.0,
}  # fmt: skip


@pytest.mark.parametrize(("shorter", "words"), [(20, "The shorter response is right on 100.0 %"), (12, "")])
def test_better_figures_are_doubted_where_length_alone_is_right_as_often(tmp_path, shorter, words):
    """All rewards are right; of the pairs, the chosen response is the shorter one in all or in some."""
    pairs = [
        {**pair(n, now), "step": step, "chosen_tokens": 10, "rejected_tokens": 20 if n < shorter else 5}
        for step, now in ((0, 0.0), (120, 1.0))
        for n in range(20)
    ]
    text = page_of(write_run(tmp_path / "run", healthy(), pairs=pairs)).text
    assert words in text
    assert ("Better by the figures, which may not mean a better model" in text) is bool(words)
    assert ("Better on the held-out pairs" in text) is not bool(words)


def test_better_figures_are_doubted_where_the_diagnosis_warned(tmp_path):
    samples = [
        {"step": step, "where": "a:1", "prompt": f"{n}?", "answer": "word " * tokens, "tokens": tokens, "ended": True,
         "chosen": "word", "chosen_tokens": 20}
        for step, tokens in ((0, 20), (120, 1))
        for n in range(4)
    ]  # fmt: skip
    run = write_run(tmp_path / "run", healthy(), samples=samples)
    (run / "facts.json").write_text(json.dumps(FACTS))
    text = page_of(run).text
    assert "Better by the figures, which may not mean a better model" in text
    assert "At step 120: answers drift away from the length of the chosen responses (1 token on average" in text


NOTHING = {"where": "a:1", "answer": "", "tokens": 1, "ended": True, "chosen": "So.", "chosen_tokens": 2}


@pytest.mark.parametrize(
    ("after", "headline"),
    [
        ({}, "Better by the figures, which may not mean a better model"),
        ({"rewards/accuracies": 0.55, "accuracy_interval": [0.45, 0.64]}, "Cannot be told from these held-out pairs"),
        ({"loss": 0.9}, "Worse, although the held-out reward accuracy rose"),
    ],
)
def test_a_page_says_first_that_the_model_wrote_nonsense_before_training(tmp_path, after, headline):
    samples = [{**NOTHING, "step": step, "prompt": f"{n}?"} for step in (0, 120) for n in range(2)]
    run = write_run(tmp_path / "run", [*healthy()[:-1], eval_row(120, **after)], samples=samples)
    (run / "facts.json").write_text(json.dumps(FACTS))
    page = page_of(run)
    first = "Before step 1: the model writes nonsense before training (of 2 answers, 2 empty)."
    said = page.text.split(headline, 1)[1]
    assert said.split()[: len(first.split())] == first.split()
    assert page.text.count(first) == 1
    assert "these answers say nothing about the training" in page.text


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        # Of 20 pairs the chosen response is shorter in 12; in all; as long in all.
        ([(10, 20)] * 12 + [(10, 5)] * 8, "Baseline: 60.0 %, what length alone (always the shorter response) gets on"),
        ([(20, 10)] * 20, "Baseline: 100.0 %, what length alone (always the longer response) gets on these pairs."),
        (
            [(10, 10)] * 20,
            "Baseline: 50.0 %, the accuracy before training; length alone (always the longer response) gets",
        ),
        ([], "Baseline: 50.0 %, the accuracy before training; the lengths of these pairs are not recorded."),
    ],
)
def test_the_verdict_says_which_baseline_it_used(tmp_path, lengths, words):
    pairs = [
        {**pair(n, now), "step": step, "chosen_tokens": chosen, "rejected_tokens": rejected}
        for step, now in ((0, 0.0), (120, 1.0))
        for n, (chosen, rejected) in enumerate(lengths)
    ]
    page = page_of(write_run(tmp_path / "run", healthy(), pairs=pairs))
    assert words in page.text
    lines = [line for chart in drawn(page) for line in chart if line.startswith("length alone")]
    assert len(lines) == bool(lengths)


@pytest.mark.parametrize(("low", "is_doubted"), [(0.61, False), (0.60, True), (0.55, True)])
def test_better_figures_are_doubted_where_length_alone_is_within_their_interval(tmp_path, low, is_doubted):
    """Twelve of 20 chosen responses are the shorter ones: 60 %."""
    pairs = [
        {**pair(n, now), "step": step, "chosen_tokens": 10, "rejected_tokens": 20 if n < 12 else 5}
        for step, now in ((0, 0.0), (120, 1.0))
        for n in range(20)
    ]
    last = eval_row(120, **{"rewards/accuracies": 0.7, "accuracy_interval": [low, 0.8]})
    text = page_of(write_run(tmp_path / "run", [*healthy()[:-1], last], pairs=pairs)).text
    assert ("The shorter response is right on 60.0 % of these pairs, within the interval" in text) is is_doubted
    assert ("Better on the held-out pairs" in text) is not is_doubted


def turning(**changed):
    """Rows of a run whose held-out loss is the lowest at step 60."""
    rows = healthy()
    for row in rows:
        if row["split"] == "eval":
            row |= {"loss": 0.5 if row["step"] == 60 else 0.6, **changed}
    return rows


@pytest.mark.parametrize("adapter", ["", "adapter: {type: lora}\n"])
def test_what_to_do_next_names_a_checkpoint_that_is_better_and_the_command_for_it(tmp_path, monkeypatch, adapter):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs/my", turning(), settings=SETTINGS + adapter)
    (run / "checkpoints/step-000060").mkdir(parents=True)
    text = Page(write_report([RunFolder(run.relative_to(tmp_path))]).read_text(encoding="utf-8")).text
    checkpoint = "runs/my/checkpoints/step-000060"
    assert f"he held-out loss was lowest, 0.5000, at step 60, in {checkpoint}:" in text
    assert f"dpo export {checkpoint} --to my-step-000060{' --merge' if adapter else ''} makes" in text


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (turning(), "", "at step 60, of which there is no checkpoint; evaluation.best_by: loss keeps it"),
        (turning(), "evaluation: {best_by: loss}\n", ""),
        ([*healthy()[:-1], eval_row(120, loss=0.3)], "", ""),
    ],
    ids=["gone", "it is the trained model", "the last"],
)
def test_no_checkpoint_is_named_that_is_not_there_or_no_better(tmp_path, rows, settings, words):
    text = page_of(write_run(tmp_path / "run", rows, settings=SETTINGS + settings)).text
    assert words in text
    assert ("held-out loss was lowest, 0.5000, at" in text) is bool(words)


@pytest.mark.parametrize(
    ("name", "heading"),
    [("run", "Report of run"), ("Run-2", "Report of Run-2"), ("my", "Run my"), ("trunk", "Run trunk")],
)
def test_a_heading_does_not_say_run_twice(tmp_path, name, heading):
    text = page_of(write_run(tmp_path / name, healthy(steps=4, every=2))).text
    assert text.split("\n\n")[0].strip() == heading or f"\n{heading}\n" in text
    assert "run run" not in text.casefold()


def test_charts_that_matter_most_are_first_and_others_are_small(tmp_path):
    """Rewards that never move are flat; the loss, the accuracy and the margin are large whatever they do."""
    still = {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2, "rewards/accuracies": 0.5}
    rows = [{**row, **still} for row in healthy(steps=20, every=5)]
    for made, small in (
        (healthy(steps=20, every=5), ["Gradient norm", "Learning rate", "Tokens per second"]),
        (rows, ["Rewards", "Gradient norm", "Learning rate", "Tokens per second"]),
    ):
        run = read_run(RunFolder(write_run(tmp_path / "run", made)))
        charts = charts_of(run, [])
        assert [chart.title for chart in charts][:3] == ["Loss", "Reward accuracy", "Reward margin"]
        assert [chart.title for chart in charts if chart.small] == small
        text = (write_report([run.folder])).read_text(encoding="utf-8")
        large, _, others = text.partition('<div class="charts small">')
        assert large.count("<figure") == len(charts) - len(small)
        assert others.count("<figure") == len(small)
        assert text.count(">optimizer step<") == len(charts)


@pytest.mark.parametrize(("best", "words"), [("loss", "Better on"), (None, "Worse, although")])
def test_what_happened_after_the_best_step_says_nothing_of_its_model(tmp_path, best, words):
    """Both responses fall after step 60, the model of which is in `final/`."""
    rows = healthy()
    fallen = {"loss": 0.6, "logps/chosen": -200.0, "logps/rejected": -300.0}
    for row in rows:
        if row["split"] == "eval" and row["step"] > 60:
            row |= fallen
    settings = SETTINGS + (f"evaluation: {{best_by: {best}}}\n" if best else "")
    run = write_run(tmp_path / "run", rows, settings=settings)
    (run / "facts.json").write_text(json.dumps(FACTS))
    text = page_of(run).text
    assert "both responses become less likely" in text, "it is a finding of the run all the same"
    assert words in text


def test_findings_are_those_of_the_rows_in_the_order_of_the_file(tmp_path):
    """The step of an evaluation comes before it, and belongs to the training loss that it is compared with."""
    rows = healthy()
    for row in rows:
        if row["split"] == "train" and row["step"] in (20, 40, 60):
            row["loss"] -= 0.2
        elif row["split"] == "eval" and row["step"] > 60:
            row["loss"] += 0.1
    folder = RunFolder(write_run(tmp_path / "run", rows))
    folder.facts.write_text(json.dumps(FACTS))
    told = found(read_run(folder).facts, rows)
    assert "overfitting" in [one.name for one in told]
    assert findings_of(read_run(folder)) == gravest_first(told)


def test_before_step_1_no_pair_is_the_hardest(tmp_path):
    text = {"prompt": "p", "chosen": "c", "rejected": "r"}
    pairs = [{"step": step, "pair": 1, "where": "a:1", "rewards/margins": 0.0, "text": text} for step in (0, 20)]
    for steps, shown in ((0, False), (20, True)):
        run = write_run(tmp_path / f"{steps}", healthy(steps), pairs=[row for row in pairs if row["step"] <= steps])
        assert ("The hardest held-out pairs" in page_of(run).text) is shown


def test_losses_and_margins_of_runs_with_other_losses_are_not_compared(tmp_path):
    margins = [(-1.0) ** (number % 3) for number in range(40)]
    pairs = [{**pair(n, margin), "step": 120} for n, margin in enumerate(margins)]
    other = [{**pair(n, 5.0), "step": 120} for n in range(40)]
    first = write_run(tmp_path / "one", healthy(), settings=SETTINGS + "loss: {type: dpo, beta: 0.1}\n", pairs=pairs)
    for beta, comparable in ((0.1, True), (0.5, False)):
        settings = SETTINGS + f"loss: {{type: dpo, beta: {beta}}}\n"
        second = write_run(tmp_path / f"two{beta}", healthy(), settings=settings, pairs=other)
        page = page_of_both(first, second, tmp_path / "both.html")
        (table,) = [table for table in page.tables if table[0][0] == f"two{beta} − one"]
        assert ({"loss", "reward margin"} <= {cells[0] for cells in table}) is comparable
        assert ("The losses differ" in page.text) is not comparable
        assert "is better on these pairs: +32.5 points" in page.text
        assert ("the reward margin of" in page.text) is comparable


def page_of_both(first, second, out):
    return Page(write_report([RunFolder(first), RunFolder(second)], out).read_text(encoding="utf-8"))


def test_runs_over_each_other_name_what_differs(tmp_path):
    first = write_run(tmp_path / "a/run", healthy())
    second = write_run(tmp_path / "b/run", healthy(steps=60), settings=SETTINGS.replace("1.0e-5", "2.0e-5"))
    file = write_report([RunFolder(first), RunFolder(second)], tmp_path / "both.html")
    page = Page(file.read_text(encoding="utf-8"))
    assert ["training.learning_rate", "1.0e-05", "2.0e-05"] in page.tables[1]
    names = [str(first), str(second)]
    assert list(drawn(page)[0]) == names
    assert max(drawn(page)[0][names[1]]) == 60


def test_what_the_check_of_the_data_found_is_in_short_on_the_page(tmp_path):
    run = write_run(tmp_path / "run", healthy())
    (tmp_path / "p.report").mkdir()
    (run / "environment.json").write_text(json.dumps({"data_check": str(tmp_path / "p.report")}))
    assert "The check of the data" not in page_of(run).text
    found = report("plain").as_json()
    (tmp_path / "p.report/report.json").write_text(json.dumps(found))
    page = page_of(run)
    assert ["error", "leakage", "3", "0.1 %"] in [cells for table in page.tables for cells in table]
    assert "The longer response is the chosen one in 70.0 % of the pairs." in page.text


def test_settings_that_are_not_the_defaults_are_named_with_them(tmp_path):
    settings = SETTINGS + "loss: {type: ipo, beta: 0.2}\nadapter: {type: lora, rank: 4}\n"
    tables = page_of(write_run(tmp_path / "run", healthy(), settings=settings)).tables
    (table,) = [table for table in tables if table[0] == ["setting", "value", "default"]]
    assert {cells[0]: cells[1:] for cells in table[1:]} == {
        "model.name": ["some/model", ""],
        "adapter": ["lora", "null"],
        "adapter.rank": ["4", "16"],
        "data.train": ["pairs.jsonl", "null"],
        "loss": ["ipo", "dpo"],
        "loss.beta": ["0.2", "0.1"],
        "training.learning_rate": ["1.0e-05", "1.0e-06"],
    }


def test_answers_and_pairs_of_other_types_are_counted_and_left_out(tmp_path):
    sample = {"step": 0, "where": "a:1", "prompt": "p", "answer": "a", "tokens": 1, "ended": True, "chosen": "c"}
    sample |= {"chosen_tokens": 1}
    wrong = {"where": 1, "answer": None, "tokens": -1, "ended": "yes", "chosen_tokens": 0}
    run = write_run(
        tmp_path / "run",
        healthy(),
        samples=[sample, *({**sample, name: value} for name, value in wrong.items())],
        pairs=[{"step": 120, "pair": [1], "where": "a:1"}, {"step": 120, "pair": 1, "where": "a:1", "category": 3}],
    )
    text = page_of(run).text
    assert "5 lines of samples.jsonl cannot be read" in text
    assert "2 lines of held_out.jsonl cannot be read" in text


@pytest.mark.parametrize("margin", [0.0, -0.5])
def test_a_page_says_why_before_and_after_are_compared_by_likelihood(tmp_path, margin):
    """The headline, which is about rewards, may be another one."""
    pairs = [{**pair(n, now), "step": step} for step, now in ((0, margin), (120, 1.0)) for n in range(30)]
    text = page_of(write_run(tmp_path / "run", healthy(), pairs=pairs)).text
    assert "Before and after, pair by pair" in text
    assert ("All rewards were ties before training" in text) is (margin == 0)


def test_accuracies_that_are_no_shares_are_counted_and_left_out(tmp_path):
    """A digit of a file was damaged: the interval of such an accuracy is no number."""
    rows = [*healthy(), eval_row(130, **{"rewards/accuracies": 9.0}), step_row(131, **{"logps/accuracies": -1})]
    pairs = [{**pair(n, (-1.0) ** n), "step": 120} for n in range(30)]
    pairs = [{**one, "logps/accuracies_mean": 0.5 if n else 5} for n, one in enumerate(pairs)]
    run = write_run(tmp_path / "run", rows, pairs=pairs)
    (run / "facts.json").write_text(json.dumps(FACTS))
    text = page_of(run).text
    assert "2 lines of metrics.jsonl cannot be read" in text
    assert "1 line of held_out.jsonl cannot be read" in text
    assert "after step 120" in text


@pytest.mark.parametrize("name", ["pairs_per_step", "steps_per_epoch", "num_steps", "chosen_tokens"])
def test_facts_that_cannot_be_are_as_good_as_none(tmp_path, name):
    run = write_run(tmp_path / "run", healthy())
    (run / "facts.json").write_text(json.dumps({**FACTS, name: 0}))
    assert "Better on the held-out pairs" in page_of(run).text


def test_of_very_many_held_out_pairs_those_are_read_that_the_page_shows(tmp_path, monkeypatch):
    pairs = [{"step": step, "pair": 1, "where": "a:1", "rewards/margins": 0.1} for step in range(0, 121, 20)]
    folder = RunFolder(write_run(tmp_path / "run", healthy(), pairs=pairs))
    assert [row["step"] for row in read_run(folder).pairs] == list(range(0, 121, 20))
    monkeypatch.setattr(run_record, "_MOST_PAIRS_BYTES", 100)
    lowest = min((row for row in healthy() if row["split"] == "eval" and row["step"]), key=lambda row: row["loss"])
    assert {row["step"] for row in read_run(folder).pairs} == {0, lowest["step"], 120}
