"""`dpo report`: what it writes, and what it says of what it cannot read."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_cli.training.recorded_settings import RESOLVED
from tests.cli.in_process import call
from tests.reporting.runs import SETTINGS, healthy, write_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run, in the folder in which commands are given."""
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "runs/my", healthy(steps=40, every=20))


def test_a_run_gets_its_page_and_the_command_names_it(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert call("report runs/my") == 0
    assert capsys.readouterr().out == "report  runs/my/report.html\n"
    assert "Better on the held-out pairs" in (run / "report.html").read_text(encoding="utf-8")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.pop(run / "report.html")
    assert after == before


def test_several_runs_get_one_page(run, capsys):
    write_run(run.parent / "other", healthy(steps=10, every=5), settings=SETTINGS.replace("1.0e-5", "3.0e-5"))
    assert call("report runs/my runs/other --out both.html") == 0
    text = (run.parent.parent / "both.html").read_text(encoding="utf-8")
    assert "3.0e-05" in text
    assert not (run / "report.html").exists()


def test_a_page_that_a_link_names_is_written_where_the_link_leads(run):
    (run.parent / "page.html").symlink_to(run.parent / "elsewhere.html")
    (run.parent / "link").symlink_to(run)
    assert call("report runs/link --out runs/page.html") == 0
    assert (run.parent / "page.html").is_symlink()
    assert "Run link" in (run.parent / "elsewhere.html").read_text(encoding="utf-8")


def _no_metrics(run):
    (run / "metrics.jsonl").unlink()


def _no_rows(run):
    (run / "metrics.jsonl").write_text("")


def _damaged(run):
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe nonsense\n" * 3)


def _metrics_are_a_folder(run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


def _not_a_run(run):
    (run / "config.yaml").write_text("model: a/b\n")


def _within(run):
    (run / "checkpoints").mkdir()


def _nothing(run):
    pass


def _a_link_to_nothing(run):
    (run.parent / "gone").symlink_to(run.parent / "nowhere")


def _a_second_name(run):
    (run.parent / "same").symlink_to(run)


def _page_is_a_folder(run):
    (run / "report.html").mkdir()


@pytest.mark.parametrize(
    ("breaks", "arguments", "status", "what", "hint"),
    [
        (_nothing, "", 2, "no run is given", "dpo report runs/my"),
        (_nothing, "runs/mmy", 2, "there is no run", "did you mean `runs/my`?"),
        (_nothing, "runs/my/config.yaml", 2, "is a file, not a run", "output_dir"),
        (_nothing, "runs", 2, "is not a run's folder", "output_dir"),
        (_within, "runs/my/checkpoints", 2, "is not a run's folder", "did you mean"),
        (_not_a_run, "runs/my", 2, "is not a run's folder", "output_dir"),
        (_a_link_to_nothing, "runs/gone", 2, "there is no run", "output_dir"),
        (_no_metrics, "runs/my", 2, "the run has recorded nothing yet", "wait"),
        (_no_rows, "runs/my", 2, "the run has recorded nothing yet", "wait"),
        (_damaged, "runs/my", 2, "none of the 3 lines of metrics.jsonl can be read", "back in place"),
        (_metrics_are_a_folder, "runs/my", 1, "reading the run failed: is a directory", "a file was expected"),
        (_nothing, "runs/my runs/my --out a.html", 2, "the run `runs/my` is given twice", "once"),
        (_a_second_name, "runs/my runs/same --out a.html", 2, "as `runs/my` and as `runs/same`", "once"),
        (_a_second_name, "runs/my runs", 2, "several runs have no folder of their own", "--out comparison.html"),
        (_nothing, "runs/my --out nowhere/a.html", 2, "there is no folder `nowhere`", "create it"),
        (_nothing, "runs/my --out runs", 2, "the page is a folder", "name a file"),
        (_nothing, "runs/my --out runs/my/metrics.jsonl", 2, "exists already, and is no page", "another file"),
        (_nothing, "runs/my --out runs/my/config.yaml", 2, "exists already, and is no page", "another file"),
        (_nothing, "runs/my --out -", 2, "a page is not written to standard output", "name a file"),
        (_page_is_a_folder, "runs/my", 1, "writing the report failed: is a directory", "a file was expected"),
        (_nothing, "runs/my --out", 2, "requires an argument", "--help"),
        (_nothing, "runs/my --outt a.html", 2, "is not an option", "`--out`"),
    ],
)
def test_a_bad_input_gives_one_plain_error(run, capsys, breaks, arguments, status, what, hint):
    breaks(run)
    assert call(f"report {arguments}") == status
    errors = capsys.readouterr().err
    assert what in " ".join(errors.split())
    assert hint in " ".join(errors.split("hint:")[-1].split())
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (b"", "are damaged: the first line is not that of a run"),
        (b"\xff\xfe\x00 nonsense", "are damaged: the first line is not that of a run"),
        (None, "are missing"),
    ],
)
@pytest.mark.parametrize("command", ["report runs/my", "export runs/my --to out", "train own.yaml --resume"])
def test_a_run_without_its_settings_is_told_from_a_folder_that_is_no_run(run, capsys, settings, what, command):
    (run / "environment.json").write_text("{}")
    Path("own.yaml").write_text("{model: nowhere, data: {train: nothing.jsonl}, output_dir: runs/my}")
    (run / "config.yaml").unlink() if settings is None else (run / "config.yaml").write_bytes(settings)
    assert call(command) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert f"the settings of the run {what} in " in errors
    assert "runs/my/config.yaml" in errors
    assert "put the file back from a copy" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("config.yaml", f"{RESOLVED}training: [\n", "line 3: not valid YAML"),
        ("config.yaml", f"{RESOLVED}- a list\n", "there are no settings in it"),
        ("environment.json", "[1, 2", "it is not a JSON object"),
        ("facts.json", "{}", "it is not what this version of the program writes"),
    ],
)
def test_a_file_of_a_run_that_cannot_be_read_is_named_by_command_and_page(run, capsys, file, text, why):
    (run / file).write_text(text)
    assert call("report runs/my") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: `runs/my/{file}` cannot be read: {why}" in said
    assert "put it back from a copy" in said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"<code>{file}</code> cannot be read: {why}" in page
    assert call("report runs/my --out other.html") == 0


def test_a_page_replaces_an_older_one_under_the_name_that_was_given(run, capsys):
    Path("new.html").write_text("")
    for _ in range(2):
        assert call("report runs/my --out new.html") == 0
        assert capsys.readouterr().out.split() == ["report", "new.html"]


def test_a_page_is_written_into_a_pipe_and_not_in_place_of_it(run):
    os.mkfifo("pipe")
    with ThreadPoolExecutor(1) as readers:
        read = readers.submit(Path("pipe").read_text, encoding="utf-8")
        assert call("report runs/my --out pipe") == 0
        assert "</html>" in read.result()
    assert Path("pipe").is_fifo()


def test_a_run_that_may_not_be_read_is_named(run, capsys):
    (run / "metrics.jsonl").chmod(0)
    if os.access(run / "metrics.jsonl", os.R_OK):
        pytest.skip("this user may read everything")
    assert call("report runs/my") == 1
    assert "permission denied" in capsys.readouterr().err


def test_a_configuration_of_another_version_is_no_obstacle(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "made_up: {setting: 1}\n")
    assert call("report runs/my") == 0
    assert "which settings are the defaults is not known" in (run / "report.html").read_text(encoding="utf-8")


def test_files_that_older_runs_do_not_have_are_no_obstacle(run):
    for name in ("environment.json", "facts.json", "samples.jsonl", "held_out.jsonl"):
        assert not (run / name).exists()
    shutil.copytree(run, run.parent / "copy")
    assert call("report runs/copy") == 0
