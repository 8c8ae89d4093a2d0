"""Files, globs, folders and mixtures become rows; what a source names and is not there is explained."""

from __future__ import annotations

import collections
import gzip
import json
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.pairs.sources import (
    Source,
    as_sources,
    check_source,
    describe,
    paths_of,
    read_rows,
    source_digest,
    weighted,
)
from dpo_cli.errors import UserError
from dpo_cli.system.storage import sealed_folder
from tests.conftest import write_rows


def numbered(count, start=0):
    return [{"n": number} for number in range(start, start + count)]


def read(path, **settings):
    source = Source(path=str(path), **settings)
    return list(weighted(read_rows(source), source.weight))


def numbers(rows):
    return [row.values["n"] for row in rows]


def problem_of(path, **settings):
    problem = check_source(Source(path=str(path), **settings), "`data.train`")
    assert problem is not None
    assert problem.where == "`data.train`"
    assert problem.hint
    with pytest.raises(UserError, match=re.escape(problem.what)):
        read(path, **settings)
    return problem


@pytest.mark.program
def test_naming_sources_imports_nothing_that_is_slow_to_import():
    code = "import sys, dpo_cli.data.pairs.sources; print({'datasets', 'numpy', 'pyarrow'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Files, globs, folders


def test_rows_of_a_file_know_their_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", numbered(2))
    assert [(row.origin, row.values) for row in read(path)] == [(f"{path}:1", {"n": 0}), (f"{path}:2", {"n": 1})]


@pytest.fixture
def many(tmp_path):
    """Files of several kinds in folders, in the order of their names, among company."""
    (tmp_path / "data/more").mkdir(parents=True)
    (tmp_path / "data/.git").mkdir()
    write_rows(tmp_path / "data/b.jsonl", numbered(2, 2))
    (tmp_path / "data/a.json").write_text(json.dumps(numbered(2)), encoding="utf-8")
    (tmp_path / "data/more/c.jsonl.gz").write_bytes(gzip.compress(b'{"n": 4}\n'))
    (tmp_path / "data/more/d.csv").write_text("n\n5\n", encoding="utf-8")
    for name in ("README.md", "LICENSE", ".gitattributes", ".hidden.jsonl", ".git/x.jsonl", "dataset_infos.json"):
        (tmp_path / "data" / name).write_text("neither rows nor JSON", encoding="utf-8")
    return tmp_path / "data"


def test_a_folder_is_read_in_the_order_of_its_names_and_what_is_no_data_is_left_alone(many):
    rows = read(many)
    assert numbers(rows) == [0, 1, 2, 3, 4, "5"]
    places = ["a.json:1", "a.json:1, row 2", "b.jsonl:1", "b.jsonl:2", "more/c.jsonl.gz:1", "more/d.csv:2"]
    assert [row.origin for row in rows] == [f"{many}/{place}" for place in places]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("*", [0, 1, 2, 3]), ("**", [0, 1, 2, 3, 4, "5"]), ("**/*.jsonl*", [2, 3, 4]), ("[ab].json", [0, 1]),
     ("more/?.csv", ["5"])],
)  # fmt: skip
def test_a_glob_is_read_in_the_order_of_its_names(many, pattern, found, monkeypatch):
    assert numbers(read(many / pattern)) == found
    monkeypatch.chdir(many.parent)
    rows = read(f"data/{pattern}")
    assert numbers(rows) == found
    assert all(row.origin.startswith("data/") for row in rows)


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    write_rows(tmp_path / "a.jsonl", numbered(1))
    assert numbers(read(write_rows(tmp_path / "[a].jsonl", numbered(1, 7)))) == [7]


@pytest.mark.parametrize(
    ("path", "what", "hint"),
    [
        ("pairs.jsnl", "no file or folder", r"did you mean `.*pairs\.jsonl`\?"),
        ("pairs.xlsx", "not a data file of a known type", r"ends in one of \.json, .*\.parquet.* \.zst"),
        ("pears*.jsonl", "no data file matches", r"did you mean `.*pairs\.jsonl`\?"),
        ("mixed", r"`.*mixed/b\.xlsx` is not a data file of a known type", "ends in one of"),
        ("mixed/*", r"`.*mixed/b\.xlsx` is not a data file of a known type", "ends in one of"),
        ("company", "there is no data file in it", r"which end in \.json"),
        ("company/*", "no data file matches", "name a data file"),
        ("splits", "training data and held-out data", r"splits/\*\*/\*train\*"),
        (" ", "is empty", "name a data file"),
        ("x" * 5000 + ".jsonl", "name too long", "shorter"),
    ],
)
def test_a_source_that_is_not_there_or_no_data_is_explained(tmp_path, monkeypatch, path, what, hint):
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "pairs.xlsx", "mixed/a.jsonl", "mixed/b.xlsx", "company/README.md",
                 "splits/train.jsonl", "splits/validation-0001.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, numbered(1))
    problem = check_source(Source(path=path), "`data.train`")
    assert problem is not None
    assert re.search(what, problem.what)
    assert re.search(hint, problem.hint)


def test_a_folder_of_training_files_in_parts_is_no_mixture(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl", "latest.jsonl"):
        write_rows(tmp_path / name, numbered(1))
    assert len(read(tmp_path)) == 3


# Folders that `datasets` wrote


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    parts = {"train": numbered(5), "test": numbered(3, 10)}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    whole.save_to_disk(folder / "dict", num_shards={"train": 2, "test": 1})
    whole["train"].shuffle(seed=0).save_to_disk(folder / "one")
    mixed = [{"n": 1, "tools": [{"a": 1}, {"b": "x"}]}, {"n": 2, "tools": []}]
    datasets.Dataset.from_list(mixed, on_mixed_types="use_json").save_to_disk(folder / "json")
    return folder


def test_a_folder_that_datasets_wrote_is_read_as_datasets_reads_it(saved):
    import datasets

    for name in ("one", "json"):
        assert [row.values for row in read(saved / name)] == datasets.load_from_disk(saved / name).to_list()
    rows = read(saved / "dict")
    assert numbers(rows) == [0, 1, 2, 3, 4]
    assert rows[4].origin == f"{saved}/dict/train/data-00001-of-00002.arrow:row 2"
    assert numbers(read(saved / "dict", split="test")) == [10, 11, 12]


def test_a_folder_that_datasets_wrote_and_that_is_not_whole_is_explained(saved, tmp_path):
    assert problem_of(saved / "dict", split="tset").hint == "set `split` to one of `train`, `test`"
    shutil.copytree(saved / "one", tmp_path / "one")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "is missing" in problem_of(tmp_path / "one").what
    for text in ("{", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": 5}', "[" * 5000):
        (tmp_path / "one/state.json").write_text(text, encoding="utf-8")
        assert "not a file that `datasets` writes" in problem_of(tmp_path / "one").what


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """A dataset that was loaded from the Hub before, in two configurations, as the library keeps it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for config, start in (("default", 0), ("other", 50)):
        parts = {"train": numbered(5, start), "test_prefs": numbered(3, start + 10)}
        files = {part: str(write_rows(tmp_path / f"{config}-{part}.jsonl", rows)) for part, rows in parts.items()}
        datasets.load_dataset("json", config, data_files=files)
        (made,) = (tmp_path / "cache/json").glob("*/*/*/")
        kept = tmp_path / "cache/some___pairs" / config / "0.0.0/0"
        kept.parent.mkdir(parents=True)
        shutil.move(made, kept)
        shutil.rmtree(tmp_path / "cache/json")
        for part in parts:
            (kept / f"json-{part}.arrow").rename(kept / f"pairs-{part}.arrow")
        info = json.loads((kept / "dataset_info.json").read_text(encoding="utf-8"))
        (kept / "dataset_info.json").write_text(json.dumps({**info, "config_name": config}), encoding="utf-8")
    return "some/pairs"


def test_a_dataset_of_the_hub_has_configurations_and_splits(on_the_hub):
    rows = read(on_the_hub, config="default")
    assert numbers(rows) == [0, 1, 2, 3, 4]
    assert rows[4].origin == "some/pairs/default/train:row 5"
    assert numbers(read(on_the_hub, config="other", split="test_prefs", limit=2)) == [60, 61]
    said = [{"config": "default"}, {"config": "other"}, {"config": "other", "split": "test_prefs"}]
    assert len({source_digest(Source(path=on_the_hub, **one)) for one in said}) == 3
    for wrong in ({"config": "nothing"}, {"config": "other", "split": "test"}):
        with pytest.raises(UserError, match="`some/pairs` cannot be loaded") as caught:
            read(on_the_hub, **wrong)
        assert "configuration and split" in caught.value.hint


# Settings of a source


@pytest.mark.parametrize(
    ("path", "settings", "name"),
    [
        ("a.jsonl", {"split": "test"}, "split"),
        ("a.jsonl", {"config": "default"}, "config"),
        ("*.jsonl", {"split": "test"}, "split"),
        ("dict", {"config": "default"}, "config"),
        ("one", {"split": "test"}, "split"),
        ("prepared", {"weight": 2.0}, "weight"),
        ("prepared", {"limit": 5}, "limit"),
    ],
)
def test_a_setting_that_a_source_has_no_use_for_is_an_error(tmp_path, saved, monkeypatch, path, settings, name):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", numbered(1))
    for folder in ("dict", "one"):
        (tmp_path / folder).symlink_to(saved / folder)
    with sealed_folder(tmp_path / "prepared", {}):
        pass
    assert check_source(Source(path=path)) is None
    assert problem_of(path, **settings).what == f"`{name}` has no effect on `{path}`"


def test_a_hub_id_may_have_a_configuration_and_a_split():
    assert check_source(Source(path="some/name", config="default", split="test_prefs")) is None


def test_the_limit_is_on_the_first_rows_of_all_files_together(many):
    assert numbers(read(many, limit=3)) == [0, 1, 2]
    assert numbers(read(many, limit=100)) == [0, 1, 2, 3, 4, "5"]
    assert collections.Counter(numbers(read(many, limit=2, weight=2.0))) == {0: 2, 1: 2}


@pytest.mark.parametrize(("weight", "times"), [(1.0, {1}), (2.0, {2}), (0.5, {0, 1}), (2.25, {2, 3}), (0.01, {0, 1})])
def test_a_row_is_used_as_often_as_its_weight_says(tmp_path, weight, times):
    num_rows = 4000
    path = write_rows(tmp_path / "a.jsonl", numbered(num_rows))
    found = numbers(read(path, weight=weight))
    counted = collections.Counter(found)
    assert {counted[number] for number in range(num_rows)} == times
    assert found == sorted(found)
    share = weight % 1
    # Five standard deviations of a binomial count.
    assert abs(len(found) - weight * num_rows) <= 5 * (num_rows * share * (1 - share)) ** 0.5
    assert numbers(read(path, weight=weight)) == found


@given(st.lists(st.floats(0.01, 4), min_size=2, max_size=2).map(sorted))
def test_what_a_weight_draws_a_larger_one_draws_too(tmp_path_factory, weights):
    path = write_rows(tmp_path_factory.getbasetemp() / "weights.jsonl", numbered(30))
    fewer, more = (collections.Counter(numbers(read(path, weight=weight))) for weight in weights)
    assert fewer <= more


def test_every_second_row_is_not_every_row_of_one_kind(tmp_path):
    """Where two languages take turns, half of the rows are half of each."""
    path = write_rows(tmp_path / "a.jsonl", numbered(2000))
    odd = sum(number % 2 for number in numbers(read(path, weight=0.5)))
    assert abs(odd - 500) < 5 * (1000 * 0.5 * 0.5) ** 0.5


def test_a_broken_row_is_told_of_once_whatever_the_weight(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 20, encoding="utf-8")
    for weight in (0.01, 1.0, 3.5):
        assert [row.origin for row in read(path, weight=weight)] == [f"{path}:{line}" for line in range(1, 21)]


def test_sources_are_named_with_what_was_said_of_them():
    sources = as_sources(["a.jsonl", Source(path="some/name", split="test", weight=2)])
    assert sources[0] == Source(path="a.jsonl")
    assert describe(sources) == "a.jsonl, some/name (split test, weight 2.0)"
    assert as_sources("a.jsonl") == as_sources(Source(path="a.jsonl")) == sources[:1]
    assert as_sources(None) == []


def test_all_files_of_a_source_are_told(many):
    assert set(paths_of(Source(path=f"{many}/*.json*"))) == {f"{many}/*.json*", f"{many}/a.json", f"{many}/b.jsonl"}
    assert paths_of(Source(path="nobody/nothing")) == ["nobody/nothing"]
    assert paths_of(Source(path="nothing.jsonl")) == ["nothing.jsonl"]


# The digest


def test_the_digest_changes_with_a_byte_and_not_with_the_name(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"n": 1}\n')
    second.write_text('{"n": 1}\n')
    assert source_digest(Source(path=str(first))) == source_digest(Source(path=str(second)))
    second.write_text('{"n": 2}\n')
    assert source_digest(Source(path=str(first))) != source_digest(Source(path=str(second)))


def test_the_digest_of_a_folder_changes_with_any_of_its_data_files_and_with_nothing_else(many):
    source = Source(path=str(many))
    before = source_digest(source)
    (many / "README.md").write_text("other", encoding="utf-8")
    assert source_digest(source) == before
    (many / "more/d.csv").write_text("n\n6\n", encoding="utf-8")
    changed = source_digest(source)
    assert changed != before
    (many / "more/d.csv").rename(many / "more/e.csv")
    assert len({source_digest(source), changed, before}) == 3


def test_the_digest_changes_with_every_setting_that_decides_on_rows(saved):
    settings = [{}, {"split": "test"}, {"weight": 0.5}, {"weight": 2.0}, {"limit": 1}, {"format": "instruction"}]
    digests = {source_digest(Source(path=f"{saved}/dict", **said)) for said in settings}
    assert len(digests) == len(settings)
    whole = source_digest(Source(path=f"{saved}/dict"))
    assert source_digest(Source(path=f"{saved}/dict", weight=1.0, limit=None, split="train")) == whole
