"""Control codes, HTML and Markdown in what others wrote are text: on the screen, on the page, in the card."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from dpo_cli.reporting.card import ADAPTER, MODEL, Card, model_card
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.safe_text import as_text
from tests.cli.test_bad_inputs import PREPARE, TRAIN
from tests.conftest import dpo_command, write_rows

TITLE, CLEAR, C1, TURNED = "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202e"
EVIL = f"a{TITLE}b{CLEAR}c{C1}d{TURNED}e"
HTML = '<script>alert(1)</script><img src=x onerror="alert(1)">'
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys, the end of a line aside."""


def test_whatever_the_console_prints_is_text(capfd):
    console = Console()
    table = Table(EVIL)
    table.add_row(EVIL)
    for say in (console.notice, console.warning, console.result):
        say(EVIL)
    console.result(table)
    console.facts({"name": EVIL})
    printed, said = capfd.readouterr()
    assert not _OBEYED.search(printed + said)
    assert "\\x1b[2J" in printed and "\\x9b" in said and "\\u202e" in said


def test_names_are_not_read_as_markup(capfd):
    console, name = Console(), "runs/[lr-5e-7]/:cat:/[/b]"
    table = Table(name)
    table.add_row(name)
    for shown in (table, name):
        console.result(shown)
    console.notice(name)
    printed, said = capfd.readouterr()
    assert (printed.count(name), said.count(name)) == (3, 1)


def test_what_people_write_is_shown_as_it_is():
    said = "你好　é — “ok” 🙂 naïve\u00a0text\n"
    assert as_text(said) == said


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", f"no{EVIL}.yaml"],
        ["train", "--config", "evil.yaml"],
        ["train", "--config", "run.yaml", f"training.x{EVIL}=1"],
        ["train", "--config", "run.yaml", f"model.name=./{EVIL}"],
        ["train", "--config", "run.yaml", f"data.train={EVIL}.jsonl"],
        ["prepare-data", "--config", "run.yaml", f"model.chat_template={EVIL}"],
    ],
    ids=["file", "key and value", "override", "model", "data", "template"],
)
def test_names_in_errors_are_text(project, capfd, arguments):
    import shlex

    from tests.cli.test_bad_inputs import call

    Path("evil.yaml").write_text(json.dumps({"model": EVIL, f"x{EVIL}": {EVIL: EVIL}}, ensure_ascii=True))
    assert call(shlex.join(arguments)) == 2
    printed, said = capfd.readouterr()
    assert "error: " in said
    assert not _OBEYED.search(printed + said)


@pytest.mark.program
def test_a_terminal_sees_no_codes_but_the_programs_own(project):
    Path("evil.yaml").write_text(json.dumps({"model": "m", f"x{EVIL}": 1}, ensure_ascii=True))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    command = dpo_command("train", "--config", "evil.yaml")
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:
        # The other end is closed.
        pass
    assert process.wait() == 2
    shown = seen.decode()
    assert "\\x1b[2J" in shown
    colours = re.compile(r"\x1b\[[0-9;]*m")
    assert colours.search(shown)
    assert not _OBEYED.search(colours.sub("", shown).replace("\r\n", "\n"))


@pytest.fixture
def hostile(project, demo_rows):
    """A project whose data, file name and categories are what nobody wants to see obeyed."""
    name = f"pairs{CLEAR}<b>.jsonl"
    rows = [
        {
            **row,
            "chosen": row["chosen"] + EVIL + HTML,
            "category": ("a", EVIL + HTML, "](x)<b>|")[n % 3],
            "source": HTML,
        }
        for n, row in enumerate(demo_rows[:24])
    ]
    write_rows(Path(name), [*rows, *rows[:2]])
    project.configure(data={"train": name})
    return project


def test_hostile_data_is_text_on_the_screen_on_the_page_and_in_the_card(hostile, dpo):
    said = [dpo(f"{PREPARE} --show 1 --report report"), dpo(TRAIN), dpo("eval --config run.yaml --json figures.json")]
    assert [one.status for one in said] == [0, 0, 0], said
    for one in said:
        assert not _OBEYED.search(one.said.replace("\t", ""))
    page = Path("report/report.html").read_text(encoding="utf-8")
    card = Path("runs/run/final/README.md").read_text(encoding="utf-8")
    for text in (page, card):
        assert not _OBEYED.search(text)
    for tag in ("<script", "<img", "<b>"):
        assert tag not in page
        assert tag not in re.sub(r"^(`{3,}).*?^\1$|(`+).*?\2", "", card, flags=re.MULTILINE | re.DOTALL)
    assert not _OBEYED.search(Path("runs/run/metrics.jsonl").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["figures.json", "runs/run/environment.json"])
def test_hostile_names_are_escaped_in_json(hostile, dpo, name):
    Path("run.yaml").rename(f"run{C1}.yaml")
    assert dpo(f"train --config run{C1}.yaml").status == 0
    assert dpo(f"eval --config run{C1}.yaml --json figures.json").status == 0
    assert not _OBEYED.search(Path(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", ["a`<b>x</b>", "x```\n<script>", "a|b", "![x](https://host/x.png)", "[x](y) <img src=z>"]
)
@pytest.mark.parametrize("adapted", [False, True], ids=["model", "adapter"])
def test_a_name_in_the_model_card_is_neither_markdown_nor_html(name, adapted):
    settings: dict[str, Any] = {"model": {"name": name}, "note": f"\n```\n{name}\n"}
    settings["adapter"] = {"start": name} if adapted else None
    card = model_card(Card(name, ADAPTER if adapted else MODEL, settings, base=name, facts={"data": name}))
    front, body = card.split("---\n", 2)[1:]
    assert "dpo" in front
    # What a reader of Markdown sees as code is text; nothing else of the name is left in a form that means something.
    prose = re.sub(r"^(`{3,})(?:yaml|python)$.*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert not re.search(r"[<>\[\]!`]", prose)
    assert prose.count("\n| ") == body.count("\n| ")
