"""What is published names no path of the machine, and what only looks like one is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.pipeline import published_texts
from dpo_cli.pipeline.published_texts import local_texts

HERE = {"/data", "/mnt", "/think", "/tmp", "/home", "/data/my model", "/data/Zürich", "/data/model", "/usr/bin"}
"""What there is on this machine."""


def found(line: str, monkeypatch: pytest.MonkeyPatch, name: str = "README.md") -> list[str]:
    """Return the paths that are found in a line of a file."""
    monkeypatch.setattr(published_texts, "_exists", HERE.__contains__)
    return [error.what.split("`")[1] for error in local_texts(Path("out"), {name: line.encode()})]


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ('{"base_model_name_or_path": "/data"}', "/data"),
        ('{"base_model_name_or_path": "/data/Z\\u00fcrich"}', "/data/Zürich"),
        ('{"_name_or_path": "/data/my model"}', "/data/my model"),
        ("trained on `/mnt`", "/mnt"),
        ("trained on /data.", "/data"),
        ("trained on what is in /data/ and /tmp", "/data"),
        ("(see /data)", "/data"),
        ("DATA=/data dpo train", "/data"),
        ("/data/*.jsonl", "/data"),
        ("It is in /data/model.", "/data/model"),
    ],
)
def test_a_path_of_this_machine_is_found(monkeypatch: pytest.MonkeyPatch, line: str, path: str) -> None:
    for name in ("README.md", "config.json"):
        assert found(line, monkeypatch, name) == [path]


@pytest.mark.parametrize(
    "line",
    [
        "and/or, 24/7, w/ data, / , /., /.., ./data, ../data, ~/data, https://data/model, a:/data, km/data",
        "<think></think> <data></data> [INST] [/INST] [data][/data] <</data>>",
        "write to /tmp or below /home, run `/usr/bin`",
        "{% if '</data>' in content %}{{ content.split('</think>')[-1] }}{% endif %}",
        "say /no_think, `/elsewhere/model` or '/data/gone'",
        "C:/data and gs://data/model",
    ],
)
def test_what_only_looks_like_a_path_is_not(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    for name in ("README.md", "tokenizer_config.json"):
        assert found(line, monkeypatch, name) == []
