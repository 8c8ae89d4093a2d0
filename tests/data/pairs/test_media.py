"""A row about pictures is refused; it is not trained as if its text were all of it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.data.pairs.pairing import gather
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import BadRow, Row
from tests.conftest import ROW_OF
from tests.data.data_files import read

STORED = {"bytes": b"\x89PNG", "path": None}
ASKED = {"prompt": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog."}


def refusal(shape, row):
    with pytest.raises(BadRow) as caught:
        read_pairs(FORMATS[shape], Row("f:1", row))
    return caught.value


@pytest.mark.parametrize("shape", [name for name, shape in FORMATS.items() if not shape.gather])
@pytest.mark.parametrize(
    "held", [{"image": STORED}, {"images": [STORED]}, {"photo": {"path": "a.png"}}, {"x": STORED}, {"audio": STORED}]
)
def test_a_column_of_images_is_refused_in_every_shape(shape, held):
    bad = refusal(shape, ROW_OF[shape] | held)
    assert (bad.reason, bad.structural) == ("not text", True)
    assert f"`{next(iter(held))}`" in bad.detail


@pytest.mark.parametrize("name", ["image", "images", "image_path", "video", "img"])
@pytest.mark.parametrize("held", ["a.png", ["a.png"], {"url": "b"}])
@pytest.mark.parametrize("place", ["<image>", "<|image_pad|>", "<image_1>", "<video>"])
def test_a_place_in_the_text_and_a_column_for_it_are_refused(name, held, place):
    assert refusal("text", ASKED | {"prompt": f"{place}\nWhat is it?", name: held}).reason == "not text"
    turns = {"prompt": [{"role": "user", "content": f"{place} What?"}], "chosen": "A cat.", "rejected": "A dog."}
    assert refusal("messages", turns | {name: held}).reason == "not text"


@pytest.mark.parametrize(
    "row",
    [
        ASKED,
        ASKED | {"image": None, "images": [], "video": ""},
        ASKED | {"source": "a.png"},
        ROW_OF["text"] | {"image": "a.png", "meta": {"path": "a", "line": 1}, "tags": ["a"]},
        ROW_OF["text"] | {"prompt": "Is <b> or <images> HTML?", "image": "a.png"},
    ],
)
def test_a_text_that_needs_no_image_is_trained(row):
    assert read_pairs(FORMATS["text"], Row("f:1", row))


def test_images_as_datasets_stores_them_are_refused_where_answers_are_paired(tmp_path):
    rows = [ROW_OF["unpaired"] | {"image": STORED, "label": label, "completion": str(label)} for label in (True, False)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = list(gather(read(tmp_path / "rows.parquet"), tmp_path))
    assert [(row.values, row.reason) for row in found] == [(None, "not text")] * 2
