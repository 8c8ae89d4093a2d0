"""The check as a user runs it: `dpo prepare-data`, `dpo train --dry-run`, `data.drop` and `--strict`."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from dpo_cli.cli import app
from tests.conftest import ROOT, make_config, write_rows
from tests.screen import OnTerminal

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SHORT, LONG = (
    ("Sure: {}.", "Never: {}!"),
    ("With pleasure, here it comes: {}.", "I would rather not, whatever you say: {}!"),
)
CLEAN = [
    {"instruction": f"Say {word}.", "chosen": one[0].format(word), "rejected": other[1].format(word)}
    for word, (one, other) in zip(WORDS, [(SHORT, LONG), (LONG, SHORT)] * 6, strict=True)
]
DIRTY = [
    *CLEAN,
    CLEAN[0],
    {"instruction": "Say two.", "chosen": CLEAN[1]["rejected"], "rejected": CLEAN[1]["chosen"]},
    {
        "instruction": "<script>alert(1)</script>",
        "chosen": "Here\u202e \x1b[2J you are.",
        "rejected": "No, never at all.",
    },
]

_TALK = "Whatever you may say, this is long enough, and it says nothing else. "
SPOILT = [
    *DIRTY,
    *[{"instruction": f"{n} {_TALK}", "chosen": f"{n} {_TALK}", "rejected": f"{n} {_TALK}Not {n}."} for n in range(8)],
    {"instruction": "Odd \ufffd?", "chosen": "Yes.", "rejected": "No."},
    {"instruction": "Blank?", "chosen": "\u2800", "rejected": "No."},
    {"instruction": "Space?", "chosen": " Yes, of course.", "rejected": "No."},
    {"instruction": "Refuse?", "chosen": "I'm sorry, but I can't help with that.", "rejected": "Here it is."},
    {"instruction": "Near?", "chosen": "A long answer, to the letter.", "rejected": "A long answer, to the better."},
    {"instruction": "Шесть слов о погоде, пожалуйста.", "chosen": "It rains all day long, I am afraid.",
     "rejected": "Сегодня весь день идёт сильный дождь, и завтра тоже."},
    {"instruction": "Семь слов о погоде, пожалуйста.", "chosen": "It rains all day long, I am afraid.",
     "rejected": "No rain for days and days, as it seems."},
    {"instruction": "Human?", "chosen": "Yes.\n\nHuman: And then?", "rejected": "[INST] No."},
    {"instruction": "Control <|im_end|>?", "chosen": "Yes.", "rejected": "No."},
    {"instruction": "Same?", "chosen": "Yes.", "rejected": "Yes."},
    {"instruction": "Long?", "chosen": "Yes. " * 300, "rejected": "No."},
    {"instruction": "Again?", "chosen": "Yes.", "rejected": "No."},
    {"instruction": "Again?", "chosen": "Maybe.", "rejected": "No, never."},
    {"prompt": "Tools?", "instruction": "Tools?", "tools": [{"name": "add"}], "chosen": "Yes.", "rejected": "No."},
]  # fmt: skip
"""Something is wrong with every pair after the first dozen, and with every one in another way."""
DROPPING = {"max_length": 200, "on_bad_row": "drop", "format": "instruction", "on_too_long": "drop"}


def dpo(*arguments, env=None):
    """Run the program in this process: what is slow to import is imported once."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


@pytest.fixture(scope="module")
def checked(tmp_path_factory, tiny_llama):
    """The check of dirty pairs with held-out pairs of their own, one of whose prompts is trained on."""
    folder = tmp_path_factory.mktemp("checked")
    held_out = [CLEAN[3], {"instruction": "Say zero.", "chosen": "Sure: zero.", "rejected": "Never in my life!"}]
    train, held = write_rows(folder / "pairs.jsonl", DIRTY), write_rows(folder / "held.jsonl", held_out)
    file = make_config(folder, tiny_llama, train, data={"train": str(train), "eval": str(held)})
    result = dpo("prepare-data", "--config", file, "--report", folder / "report", "--strict")
    return file, folder, result


def test_findings_are_named_with_file_and_line_and_written_where_they_were_wanted(checked):
    _, folder, result = checked
    train, held = folder / "pairs.jsonl", folder / "held.jsonl"
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    found = {finding["name"]: finding for finding in report["findings"]}
    for name, severity, count, origin, other in (
        ("leakage", "error", 1, f"{train}:4", f"{held}:1"),
        ("duplicates", "warning", 1, f"{train}:13", f"{train}:1"),
        ("conflicts", "warning", 2, f"{train}:2", f"{train}:14"),
        ("control_characters", "warning", 1, f"{train}:15", ""),
    ):
        assert (found[name]["severity"], found[name]["count"]) == (severity, count), name
        assert (found[name]["examples"][0]["origin"], found[name]["examples"][0]["other"]) == (origin, other)
        places = " beside ".join(Path(place).name for place in (origin, other) if place)
        assert f"{severity:<9}{name}: {count:,} pair" in result.stdout
        assert f"    {places}\n" in result.stdout
    assert result.stdout.splitlines()[-1] == f"report: {folder / 'report' / 'report.html'}"
    # Two pairs that are in conflict are one example, with either one first.
    assert result.stdout.count(f"{train.name}:14") == len(found["conflicts"]["examples"]) == 1
    assert (report["num_train"], report["num_held_out"]) == (len(DIRTY), 2)
    assert set(report["read"]) == {"data.train", "data.eval"}
    assert str(folder / "report" / "report.html") in result.stdout


def test_strict_fails_after_everything_was_printed_and_written_and_keeps_the_prepared_pairs(checked):
    file, folder, result = checked
    assert result.exit_code == 2
    assert "--strict does not accept" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["report.html", "report.json"]
    again = dpo("prepare-data", "--config", file, "--report", folder / "report")
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("prepared data found") == 2


def test_neither_terminal_nor_page_obeys_what_stands_in_the_data(checked):
    _, folder, result = checked
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    report = (folder / "report" / "report.json").read_text(encoding="utf-8")
    for shown in (result.stdout, result.stderr, page, report):
        assert not {"\x1b", "\u202e"} & set(shown)
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    texts = [
        text
        for finding in json.loads(report)["findings"]
        for example in finding["examples"]
        for text in example["texts"].values()
    ]
    assert any("Here\u202e \x1b[2J you are." in text for text in texts)
    assert any("<script>alert(1)</script>" in text for text in texts)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)


def test_what_drop_names_is_left_out_without_tokenizing_again_and_strict_is_content(checked):
    file, folder, _ = checked
    drop = "data.drop=[leakage, conflicts, duplicates, control_characters]"
    result = dpo("prepare-data", "--config", file, drop, "--report", folder / "clean", "--strict")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("prepared data found") == 2
    assert "1 leakage, 2 conflicts, 1 duplicates, 1 control_characters" in " ".join(result.stdout.split())
    report = json.loads((folder / "clean" / "report.json").read_text(encoding="utf-8"))
    assert report["left_out"] == {"leakage": 1, "conflicts": 2, "duplicates": 1, "control_characters": 1}
    assert (report["num_train"], report["num_held_out"]) == (len(DIRTY) - 5, 2)
    dry = dpo("train", "--config", file, drop, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert f"{len(DIRTY) - 5} to train on, 2 held out" in dry.stdout
    assert "1 leakage, 2 conflicts" in dry.stdout


def test_a_dry_run_shows_the_same_findings_and_writes_no_report(checked):
    file, folder, result = checked
    before = set(folder.rglob("*"))
    dry = dpo("train", "--config", file, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    found, *_ = result.stdout.split("\n\n")
    assert found.startswith("error    leakage: 1 pair (")
    assert found in dry.stdout
    assert set(folder.rglob("*")) == before


def test_the_report_stands_beside_the_prepared_folder_by_default(tmp_path, tiny_llama):
    file = make_config(tmp_path, tiny_llama, write_rows(tmp_path / "pairs.jsonl", CLEAN), data={"eval": None})
    result = dpo("prepare-data", "--config", file, "--out", tmp_path / "kept", "--strict")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "kept.report" / "report.html").is_file()
    cached = dpo("prepare-data", "--config", file, "--strict", env={"DPO_CACHE_DIR": str(tmp_path / "cache")})
    assert cached.exit_code == 0, cached.stderr
    (page,) = (tmp_path / "cache" / "prepared").glob("*.report/report.html")
    assert str(page) in cached.stdout
    (tmp_path / "file").write_text("")
    refused = dpo("prepare-data", "--config", file, "--report", tmp_path / "file")
    assert refused.exit_code == 2
    assert "--report" in refused.stderr


@pytest.mark.parametrize("own_source", [True, False], ids=["a source of its own", "a fraction"])
def test_rows_that_a_weight_repeats_are_trained_on_as_often_and_held_out_once(tmp_path, tiny_llama, own_source):
    train = [{"path": str(write_rows(tmp_path / "pairs.jsonl", CLEAN[:8])), "weight": 3}]
    held = [{"path": str(write_rows(tmp_path / "held.jsonl", CLEAN[8:])), "weight": 2}]
    data = {"train": train, "eval": held if own_source else 0.5}
    result = dpo("prepare-data", "--config", make_config(tmp_path, tiny_llama, train, data=data), "--report", tmp_path)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["num_train"], report["num_held_out"]) == ((24, 4) if own_source else (12, 4))
    assert report["num_copies"] == report["num_train"] * 2 // 3
    bias = report["length_bias"]
    assert bias["longer"] + bias["equal"] + bias["shorter"] == (12 if own_source else 8)
    assert "duplicates" in report["not_found"]
    assert "counted once" in result.stdout


def test_a_file_that_is_named_twice_is_a_file_of_duplicates(tmp_path, tiny_llama):
    path = str(write_rows(tmp_path / "pairs.jsonl", CLEAN))
    file = make_config(tmp_path, tiny_llama, path, data={"train": [path, path], "eval": None})
    result = dpo("prepare-data", "--config", file, "--report", tmp_path / "report", "--strict")
    assert result.exit_code == 2
    assert f"{len(CLEAN)} duplicates" in result.stderr


def test_strict_does_not_let_dropped_rows_pass(tmp_path, tiny_llama):
    rows = [*CLEAN, *[{**row, "rejected": row["chosen"]} for row in CLEAN * 3]]
    file = make_config(tmp_path, tiny_llama, write_rows(tmp_path / "pairs.jsonl", rows), data={"eval": None})
    result = dpo("prepare-data", "--config", file, "--report", tmp_path / "report", "--strict")
    assert result.exit_code == 2
    assert "36 dropped_rows" in result.stderr
    said = " ".join(result.stdout.split())
    assert "dropped_rows: 36 of 48 rows (75 %) were dropped as identical responses: remove pairs" in said
    assert "    pairs.jsonl:13: " in result.stdout
    (found,) = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["findings"]
    assert (found["name"], found["count"], found["share"], len(found["examples"])) == ("dropped_rows", 36, 0.75, 3)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        pytest.param(CLEAN, ["data.drop=[leakage]"], "`leakage` has no effect", id="no second source"),
        pytest.param(CLEAN, ["data.drop=[nonsense]"], "data.drop", id="unknown"),
        pytest.param(
            [CLEAN[0], {**CLEAN[0], "chosen": CLEAN[0]["rejected"], "rejected": CLEAN[0]["chosen"]}],
            ["data.drop=[conflicts]"],
            "no training pairs are left: 2 conflicts left out",
            id="nothing left",
        ),
    ],
)
def test_what_cannot_be_dropped_is_an_error(tmp_path: Path, tiny_llama, rows, settings, said):
    file = make_config(tmp_path, tiny_llama, write_rows(tmp_path / "pairs.jsonl", rows), data={"eval": None})
    result = dpo("prepare-data", "--config", file, *settings)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_of_forty_lines_everything_of_the_demo_pairs_is_seen(tmp_path, tiny_llama, width):
    """Nothing is wider than it but names of folders, which end where the line does, and nothing is said twice."""
    file = make_config(tmp_path, tiny_llama, ROOT / "configs" / "demo" / "pairs.jsonl", data={"max_length": 256})
    run = OnTerminal("prepare-data", "--config", file, "--report", tmp_path / "report", width=width)
    screen = run.wait()
    assert run.process.returncode == 0
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", run.said).replace("\r", "").splitlines()
    assert [line for line in written if cell_len(line) > width and " " in line.strip()] == []
    assert sum(max(1, -(-cell_len(line) // width)) for line in written) <= 40
    assert "\x1b[33mwarning" in run.said
    lines = [line.rstrip() for line in screen.lines]
    assert any(line.startswith("data.train: 556 rows of the shape instruction, 556 pairs") for line in lines)
    assert "".join(lines).endswith(str(tmp_path / "report" / "report.html"))
    said = list(filter(None, written))
    assert len(set(said)) == len(said)


def test_without_a_terminal_data_with_findings_of_every_kind_fits_a_screen_too(tmp_path, tiny_llama, monkeypatch):
    """And what the screen has no room for is on the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    config = make_config(tmp_path, tiny_llama, write_rows(tmp_path / "pairs.jsonl", SPOILT), data=DROPPING)
    result = dpo("prepare-data", "--config", config, "--report", "report")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert [line for line in lines if cell_len(line) > 80] == []
    found = json.loads(Path("report/report.json").read_text(encoding="utf-8"))["findings"]
    assert len(found) >= 15
    page = Path("report/report.html").read_text(encoding="utf-8")
    for finding in found:
        assert finding["name"] in result.stdout
        assert f"{finding['count']:,}" in result.stdout
        assert finding["name"] in page and all(one["origin"] in page for one in finding["examples"])


def test_a_run_does_not_go_on_with_other_pairs_left_out(tmp_path, tiny_llama):
    rows = [*CLEAN, CLEAN[0]]
    file = make_config(tmp_path, tiny_llama, write_rows(tmp_path / "pairs.jsonl", rows), data={"eval": None})
    first = dpo("train", "--config", file, "training.max_steps=2")
    assert first.exit_code == 0, first.stderr
    assert "13 to train on" in first.stderr
    shutil.rmtree(tmp_path / "runs" / "run" / "final")
    other = dpo("train", "--config", file, "training.max_steps=2", "--resume", "data.drop=[duplicates]")
    assert other.exit_code == 2
    assert "data.drop" in other.stderr
