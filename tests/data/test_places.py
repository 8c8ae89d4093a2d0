"""What a folder says of itself is shown so that it controls no terminal."""

from __future__ import annotations

import json

import pytest

from dpo_cli.data.places import files_at
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
