"""The recipes for rows of other forms make pairs that are read, and the right way round."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dpo_cli.data.pairs.sources import Source, read_rows
from tests.conftest import ROOT, write_rows

pytestmark = pytest.mark.program

RECIPES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "sources.md").read_text(encoding="utf-8"), re.M | re.S)
SCORED = [{"response": text, "overall_score": score} for text, score in (("fair", 5.0), ("bad", 2.5), ("good", 9.0))]
TALK = [{"role": "user", "content": "Add 1 and 2."}]


@pytest.mark.parametrize(
    ("recipe", "file", "rows", "prompt"),
    [
        (0, "completions.jsonl", [{"instruction": "Add.", "completions": SCORED}], "Add."),
        (
            1,
            "preferences.jsonl",
            [
                {"context": TALK, "response1": "good", "response2": "bad", "overall_preference": -2},
                {"context": TALK, "response1": "bad", "response2": "good", "overall_preference": 1},
                {"context": TALK, "response1": "one", "response2": "other", "overall_preference": 0},
            ],
            TALK,
        ),
    ],
)
def test_a_recipe_makes_pairs(tmp_path, recipe, file, rows, prompt):
    write_rows(tmp_path / file, rows)
    subprocess.run([sys.executable, "-c", RECIPES[recipe]], cwd=tmp_path, check=True)
    pairs = [row.values for row in read_rows(Source(path=str(tmp_path / "pairs.jsonl")))]
    assert pairs
    assert pairs == [{"prompt": prompt, "chosen": "good", "rejected": "bad"}] * len(pairs)
