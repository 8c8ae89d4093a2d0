"""What a folder says of itself is no more than it holds, and is shown so that it controls no terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dpo_cli.data.rows.paths import files_at
from dpo_cli.errors import UserError

RED = "\x1b[31mred"


@pytest.mark.parametrize(
    ("file", "listing"),
    [
        ("dataset_dict.json", {"splits": [RED, "test"]}),
        ("state.json", {"_data_files": [{"filename": f"{RED}.arrow"}]}),
    ],
)
def test_the_names_that_a_folder_lists_control_no_terminal(tmp_path, file, listing):
    (tmp_path / file).write_text(json.dumps(listing), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        files_at(str(tmp_path), "train")
    said = f"{caught.value.what} {caught.value.hint}"
    assert "\\x1b[31mred" in said
    assert said.isprintable()


def test_a_folder_that_lists_what_is_not_in_it_is_refused(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "secret.jsonl").write_text("{}", encoding="utf-8")
    for name in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "x/../../secret.jsonl"):
        state = {"_data_files": [{"filename": name}]}
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        with pytest.raises(UserError, match="outside of it"):
            files_at(str(tmp_path / "saved"), "train")


def test_a_file_whose_name_is_no_text_is_refused_by_a_name_that_can_be_shown(tmp_path):
    """Its rows could not be told apart by where they stand: a place is text."""
    place = os.fsdecode(bytes(tmp_path / "pairs-") + b"\xff.jsonl")
    Path(place).write_text("{}", encoding="utf-8")
    for name in (place, str(tmp_path), str(tmp_path / "*.jsonl")):
        with pytest.raises(UserError, match=r"pairs-\\udcff.jsonl.* not UTF-8") as caught:
            files_at(name, "train")
        assert caught.value.what.encode()
