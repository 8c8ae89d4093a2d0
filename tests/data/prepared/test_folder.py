"""The prepared folder: whole, found again, keyed by everything that decides its content."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.pairs.sources import Source
from dpo_cli.data.prepared import folder as prepared
from dpo_cli.data.prepared import writing as preparing
from dpo_cli.data.prepared.folder import PreparedPairs, Reading
from dpo_cli.data.records import Row
from dpo_cli.data.tokens.token_checks import TOKEN_CHECKS
from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized
from dpo_cli.errors import UserError
from dpo_cli.system import workers
from dpo_cli.system.storage import MANIFEST, sealed_folder
from dpo_cli.system.text import several

SHAPE = FORMATS["instruction"]
NAMED = Reading(columns={"margin": "gap"}), Reading(columns={"weight": "gap"}), Reading(system="Be brief.")


def tokenizing(tokenizer, **settings):
    return PairTokenizer(tokenizer, **{"template": None, "max_length": 1000, "on_too_long": "drop", **settings})


def prepare(source, tokenizer, folder, on_bad_row="error", **settings) -> PreparedPairs:
    reading = Reading(on_bad_row=on_bad_row)
    return preparing.prepare([Source(path=str(source))], reading, tokenizing(tokenizer, **settings), folder)


def write(path, rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def row(instruction="Add.", chosen="3", rejected="4", **numbers):
    return {"instruction": instruction, "chosen": chosen, "rejected": rejected, **numbers}


def test_a_round_trip_loses_nothing(tmp_path, pairs_file, demo_rows, tokenizer):
    pairs = prepare(pairs_file, tokenizer, tmp_path / "prepared")
    direct = tokenizing(tokenizer)(
        [pair for r in demo_rows[:40] for pair in read_pairs(SHAPE, Row("x", r), "extremes")]
    )
    assert len(pairs) == 40
    for number, (found, expected) in enumerate(zip(pairs, direct, strict=True), 1):
        assert isinstance(expected, Tokenized)
        for name in ("prompt", "chosen", "rejected"):
            assert np.array_equal(getattr(found, name), getattr(expected.pair, name))
        assert found.origin == f"{pairs_file}:{number}"


def test_weights_and_margins_come_back_whether_or_not_the_prompt_is_cut(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(preparing, "_PORTION_ROWS", 2)
    numbers = [{}, {"weight": 0.1, "margin": -2}, {"weight": None}, {"weight": 0}, {"margin": 1e-3}]
    source = write(tmp_path / "a.jsonl", [row("word " * 60 * (i % 2) + "Add.", **n) for i, n in enumerate(numbers)])
    pairs = prepare(source, tokenizer, tmp_path / "p", max_length=50, on_too_long="truncate")
    statistics = pairs.manifest["statistics"]
    assert (statistics["truncated"], statistics["weighted"], statistics["with_margin"]) == (2, 2, 2)
    for found, one_by_one, expected in (
        (pairs.weights, [pair.weight for pair in pairs], np.float32([1, 0.1, 1, 0, 1])),
        (pairs.margins, [pair.margin for pair in pairs], np.float32([0, -2, 0, 0, 1e-3])),
    ):
        assert found.dtype == np.float32
        assert found.tolist() == one_by_one == expected.tolist()
    twice = pairs.followed_by(pairs)
    assert twice.weights.tolist() == [*pairs.weights, *pairs.weights]


def test_rows_that_differ_in_weight_or_margin_alone_are_different_rows_with_one_reference(tmp_path, tokenizer):
    rows = [row(), row(weight=2), row(margin=0.5)]
    pairs = prepare(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "p")
    assert len(pairs) == 3
    assert len(set(pairs.keys())) == 1
    digests = {
        prepare(write(tmp_path / "b.jsonl", [one]), tokenizer, tmp_path / "q").manifest["fingerprint"] for one in rows
    }
    assert len(digests) == 3


def test_a_bad_weight_or_margin_is_named_with_its_line(tmp_path, tokenizer):
    rows = [row(), row(weight=-1), row("x", margin=float("nan")), row("y", weight="2")]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ExceptionGroup) as caught:
        prepare(source, tokenizer, tmp_path / "p")
    *named, _ = caught.value.exceptions
    expected = ["`weight` is negative", "`margin` is not finite as a 32-bit number", "`weight` is text"]
    for line, (error, what) in enumerate(zip(named, expected, strict=True), 2):
        assert error.where == f"{source}:{line}"
        assert error.what.startswith(what)
    statistics = prepare(source, tokenizer, tmp_path / "p", "drop").manifest["statistics"]
    assert statistics["dropped"] == {"number out of range": 2, "wrong type": 1}
    assert statistics["examples"]["number out of range"][0] == f"{source}:2: `weight` is negative"


def test_the_source_of_a_pair_is_its_label_or_else_its_file(tmp_path, tokenizer):
    files = [tmp_path / "a: first.jsonl", tmp_path / "b.jsonl"]
    write(files[0], [row(), row("Add 2.", source="forum")])
    write(files[1], [row("Add 3.", source="forum"), row("Add 4.")])
    sources = [Source(path=str(file)) for file in files]
    pairs = preparing.prepare(sources, Reading(), tokenizing(tokenizer), tmp_path / "prepared")
    codes, names = pairs.sources()
    assert [names[code] for code in codes] == [str(files[0]), "forum", "forum", str(files[1])]


def test_a_folder_of_an_older_version_is_prepared_again_or_refused(tmp_path, pairs_file, tokenizer):
    folder = tmp_path / "p"
    pairs = prepare(pairs_file, tokenizer, folder)
    table = pa.ipc.open_stream((folder / prepared.PAIRS).read_bytes()).read_all().drop_columns(["weight", "margin"])
    facts = {name: pairs.manifest[name] for name in ("fingerprint", "statistics", "settings")}
    with sealed_folder(folder, facts) as older, pa.ipc.new_stream(older / prepared.PAIRS, table.schema) as writer:
        writer.write_table(table)
    found, reason = prepared.find(folder, pairs.manifest["fingerprint"])
    assert found is None
    assert "written by another version" in reason
    with pytest.raises(UserError, match="written by another version"):
        prepared.open_for(folder, Reading(), tokenizing(tokenizer))


def test_the_statistics_count_every_row_once(tmp_path, tokenizer):
    rows = [row(f"Add {i}.", "short", "a longer answer") for i in range(10)]
    rows += [row(chosen=" "), row(chosen="4"), row(rejected="word " * 500), {"instruction": "x"}, "{broken\n"]
    source = write(tmp_path / "a.jsonl", rows)
    statistics = prepare(source, tokenizer, tmp_path / "p", "drop", max_length=200).manifest["statistics"]
    assert statistics["rows_read"] == 15
    assert statistics["pairs_kept"] == 10
    assert statistics["dropped"] == {
        "empty response": 1, "identical responses": 1, "too long": 1, "missing field": 1, "undecodable row": 1,
    }  # fmt: skip
    assert statistics["examples"]["missing field"][0].startswith(f"{source}:14: `chosen` is missing")
    prompts = [len(pair.prompt) for pair in PreparedPairs.open(tmp_path / "p")]
    found = statistics["tokens"]["prompt"]
    assert (found["min"], found["max"], found["mean"]) == (min(prompts), max(prompts), np.mean(prompts).round(1))


def test_the_lengths_are_those_of_all_pairs_whatever_their_number(tmp_path, tokenizer):
    rows = [row("word " * (i % 7 + i % 11 + 1), "yes " * (i % 13 + 1), "no") for i in range(300)]
    pairs = prepare(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "p")
    for name, found in pairs.manifest["statistics"]["tokens"].items():
        lengths = [len(getattr(pair, name)) for pair in pairs]
        quantiles = {"min": 0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
        expected = {key: np.quantile(lengths, q, method="nearest") for key, q in quantiles.items()}
        assert found == {**expected, "mean": round(float(np.mean(lengths)), 1)}


def test_worker_processes_change_no_byte(tmp_path, tokenizer, demo_rows, monkeypatch, patient_workers):
    monkeypatch.setattr(preparing, "_PORTION_ROWS", 50)
    monkeypatch.setattr(preparing, "_SECONDS_ALONE", 0)
    rows = [*demo_rows, row(chosen=" "), {"instruction": "x"}, "{broken\n", row(rejected="word " * 2000)]
    source = write(tmp_path / "a.jsonl", rows)
    found, by_workers = [], []
    for num_workers in (1, 2):
        monkeypatch.setattr(preparing, "num_cores", lambda num_workers=num_workers: num_workers)
        received = note_received(monkeypatch)
        prepare(source, tokenizer, tmp_path / "p", "drop")
        by_workers.append(len(received))
        found.append({file.name: file.read_bytes() for file in (tmp_path / "p").iterdir()})
    assert found[0] == found[1]
    assert by_workers[0] == 0 < by_workers[1]


def note_received(monkeypatch) -> list[bytes]:
    """Note what comes back from worker processes."""
    received, real = [], workers._result
    monkeypatch.setattr(workers, "_result", lambda future: received.append(b"") or real(future))
    return received


def test_broken_rows_are_named_the_same_whoever_found_them(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(preparing, "_PORTION_ROWS", 10)
    rows = [row("x " * (i % 30), "yes", "no") if i % 30 else {"instruction": i} for i in range(1, 100)]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ExceptionGroup) as caught:
        prepare(source, tokenizer, tmp_path / "p", max_length=20)
    *named, summary = caught.value.exceptions
    assert [error.where for error in named] == [f"{source}:{line}" for line in (30, 60, 90)]
    assert "3 of 99 rows" in summary.what


def test_structural_errors_stop_and_name_their_rows_and_leave_nothing_behind(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [row(), {"instruction": 5}, row("x"), "{broken\n"])
    with pytest.raises(ExceptionGroup) as caught:
        prepare(source, tokenizer, tmp_path / "p")
    assert [e.where for e in caught.value.exceptions] == [f"{source}:2", f"{source}:4", str(source)]
    assert "2 of 4 rows" in caught.value.exceptions[-1].what
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("rows", [[], [row(chosen="")], [row(chosen="4")]])
def test_nothing_left_to_train_on_is_an_error(tmp_path, tokenizer, rows):
    with pytest.raises(UserError):
        prepare(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "p")


def test_the_fingerprint_changes_with_every_ingredient_and_with_nothing_else(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [row()])

    def digest(**settings):
        return prepared.fingerprint([Source(path=str(source))], Reading(), tokenizing(tokenizer, **settings))

    first = digest()
    assert digest() == first
    changed = [
        digest(max_length=999),
        digest(on_too_long="truncate"),
        digest(template="plain"),
        digest(template=tokenizer.chat_template + " "),
        digest(turns="last"),
        digest(on_too_long="truncate", min_response=5),
        *(
            prepared.fingerprint([Source(path=str(source))], reading, tokenizing(tokenizer))
            for reading in (Reading(on_bad_row="drop"), Reading("instruction"), Reading(ranked="all"), *NAMED)
        ),
    ]
    write(source, [row(chosen="3!")])
    changed.append(digest())
    assert len({first, *changed}) == 1 + len(changed)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "manifest"])
def test_a_damaged_folder_is_noticed_and_never_read(tmp_path, pairs_file, tokenizer, damage):
    folder = tmp_path / "p"
    digest = prepare(pairs_file, tokenizer, folder).manifest["fingerprint"]
    assert prepared.find(folder, digest)[0] is not None
    file = folder / "pairs.arrow"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes(data[: {"truncate": -1, "empty": 0}.get(damage, len(data))])
    if damage == "remove":
        file.unlink()
    if damage == "manifest":
        (folder / MANIFEST).write_text("{")
    found, reason = prepared.find(folder, digest)
    assert found is None
    assert "damaged" in reason


def test_held_out_pairs_share_no_prompt_with_the_others_and_depend_on_the_seed(tmp_path, tokenizer):
    rows = [row(f"Question {i // 3}?", f"yes {i}", f"no {i}") for i in range(90)]
    pairs = prepare(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "p")
    train, held = pairs.hold_out(0.2, seed=1)
    assert sorted([*train, *held]) == list(range(90))
    assert len(held) == 18
    prompts = [{pairs[i].prompt.tobytes() for i in side} for side in (train, held)]
    assert not prompts[0] & prompts[1]
    assert np.array_equal(held, pairs.hold_out(0.2, seed=1)[1])
    assert not np.array_equal(held, pairs.hold_out(0.2, seed=2)[1])


def test_a_prompt_that_is_cut_differently_in_its_pairs_still_falls_on_one_side(tmp_path, tokenizer):
    rows = [row(f"Question {i // 3}? " + "word " * 60, "yes " * (i % 3 + 1), "no") for i in range(60)]
    pairs = prepare(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "p", max_length=60, on_too_long="truncate")
    assert pairs.manifest["statistics"]["truncated"] == 60
    _, held = pairs.hold_out(0.2, seed=0)
    questions = {int(i) // 3 for i in held}
    assert sorted(held) == [3 * q + k for q in sorted(questions) for k in range(3)]


def test_which_prompts_are_held_out_does_not_depend_on_the_order_of_the_rows(tmp_path, tokenizer):
    rows = [row(f"Question {i}?") for i in range(40)]
    sides = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        pairs = prepare(write(tmp_path / f"{name}.jsonl", order), tokenizer, tmp_path / name)
        sides.append({pairs[i].prompt.tobytes() for i in pairs.hold_out(0.25, seed=3)[1]})
    assert sides[0] == sides[1]


def test_windows_of_tokens_are_those_of_the_pairs(tmp_path, pairs_file, tokenizer, monkeypatch):
    monkeypatch.setattr(preparing, "_PORTION_ROWS", 15)
    pairs = prepare(pairs_file, tokenizer, tmp_path / "p")
    heads, tails = pairs.heads("prompt", 3), pairs.tails("chosen", 50)
    for place, pair in enumerate(pairs):
        assert heads[place].tolist() == pair.prompt[:3].tolist()
        short = [-1] * (50 - len(pair.chosen))
        assert tails[place].tolist() == short + pair.chosen.tolist()[-50:]
    for name in ("prompt", "chosen", "rejected"):
        wanted = {1, 5, 300}
        assert pairs.counts(name, wanted).tolist() == [sum(t in wanted for t in getattr(p, name)) for p in pairs]
    assert pairs.sizes.prompts.tolist() == [len(p.prompt) for p in pairs]
    assert pairs.sizes.longest.tolist() == [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]
    opening = pairs.sizes.opening
    assert len({pair.prompt[:opening].tobytes() for pair in pairs}) == 1
    assert len({pair.prompt[: opening + 1].tobytes() for pair in pairs}) > 1
    ids = pairs.sizes.prompt_ids.tolist()
    assert len(set(zip(ids, (p.prompt.tobytes() for p in pairs), strict=True))) == len(set(ids))
    assert pairs.largest_token() == max(max(p.prompt.max(), p.chosen.max(), p.rejected.max()) for p in pairs)


OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_pairs_of_one_prompt_stand_on_one_side_whatever_the_boundary(tmp_path, tokenizer):
    """Where inference opens a thought, the boundary depends on whether the answers begin with one."""
    answers = [("<think>\nyes", "<think>\nno"), ("Yes.", "No.")]
    rows = [row(f"Is {n} even?", *texts) for texts in answers for n in range(30)]
    source = write(tmp_path / "a.jsonl", rows)
    pairs = prepare(source, tokenizer, tmp_path / "p", template=OPENING)
    assert pairs.manifest["statistics"]["prompt_differs"] > 0
    assert len({len(pairs[i].prompt) - len(pairs[i + 30].prompt) for i in range(30)} - {0}) > 0
    for seed in range(5):
        train, held_out = pairs.hold_out(0.3, seed)
        assert not {i % 30 for i in train} & {i % 30 for i in held_out}
    assert len(set(pairs.sizes.prompt_ids.tolist())) == 30


def test_the_same_prompts_are_held_out_under_every_template(tmp_path, pairs_file, tokenizer):
    splits = [
        prepare(pairs_file, tokenizer, tmp_path / str(i), template=template).hold_out(0.3, 1)[1].tolist()
        for i, template in enumerate((None, "plain", OPENING))
    ]
    assert splits[0] == splits[1] == splits[2]


def test_each_source_says_what_it_gave(tmp_path, tokenizer):
    pairs = [row(f"Add {i}.") for i in range(4)]
    unpaired = [
        {"prompt": f"Q{i}", "completion": f"{c} answer", "label": c == "good"}
        for i in range(20)
        for c in ("good", "bad")
    ]
    one, two = write(tmp_path / "a.jsonl", [*pairs, row(chosen="")]), write(tmp_path / "b.jsonl", unpaired)
    sources = [Source(path=str(one), weight=2.0), Source(path=str(two), weight=0.5), Source(path=str(one), limit=1)]
    found = preparing.prepare(sources, Reading(on_bad_row="drop"), tokenizing(tokenizer), tmp_path / "p")
    statistics = found.manifest["statistics"]
    first, second, third = statistics["sources"]
    assert (first["shape"], first["rows"], first["pairs"]) == ("instruction", 10, 8)
    assert (third["shape"], third["rows"], third["pairs"]) == ("instruction", 1, 1)
    # Good and bad answers are put together before any are left out: none loses its counterpart.
    assert (second["shape"], second["rows"]) == ("unpaired", 2 * second["pairs"])
    assert 4 <= second["pairs"] <= 16
    assert statistics["dropped"] == {"empty response": 2}
    assert statistics["pairs_kept"] == len(found) == sum(one["pairs"] for one in statistics["sources"])


def test_a_source_without_rows_is_an_error_among_others(tmp_path, pairs_file, tokenizer):
    empty = write(tmp_path / "empty.jsonl", [])
    sources = [Source(path=str(pairs_file)), Source(path=str(empty))]
    with pytest.raises(UserError, match="there are no rows") as caught:
        preparing.prepare(sources, Reading(), tokenizing(tokenizer), tmp_path / "p")
    assert caught.value.where == str(empty)


@pytest.mark.parametrize("reading", [Reading("instruction"), Reading(on_bad_row="drop"), Reading(ranked="all"), *NAMED])
def test_a_prepared_folder_is_refused_where_rows_would_be_read_otherwise(tmp_path, pairs_file, tokenizer, reading):
    prepare(pairs_file, tokenizer, tmp_path / "p")
    assert prepared.open_for(tmp_path / "p", Reading(), tokenizing(tokenizer))
    with pytest.raises(UserError, match=r"made with another `data\."):
        prepared.open_for(tmp_path / "p", reading, tokenizing(tokenizer))


def test_what_was_done_to_a_pair_is_kept_with_it(tmp_path, tokenizer):
    rows = [row(), row("Why? " * 60), row("What is <|im_end|>?"), row(chosen="3 " * 120)]
    source = write(tmp_path / "a.jsonl", rows)
    rule = {"max_length": 100, "on_too_long": "truncate", "min_response": 10}
    pairs = prepare(source, tokenizer, tmp_path / "p", **rule)
    flags = {check.name: check.flag for check in TOKEN_CHECKS}
    for name, expected in (
        ("truncated", [False, True, False, True]),
        ("responses_cut", [False, False, False, True]),
        ("control_tokens_as_text", [False, False, True, False]),
    ):
        assert (pairs.flags & flags[name] > 0).tolist() == expected, name
        assert pairs.manifest["statistics"][name] == sum(expected)


@pytest.mark.parametrize(
    ("rows", "settings", "hint"),
    [
        (
            [row("Why? " * 60)] * 2 + [row(chosen="")],
            {"max_length": 50},
            "raise `data.max_length`, .*truncate`; the first",
        ),
        ([row(chosen="3 " * 90)], {"max_length": 50, "on_too_long": "truncate"}, "`data.min_response`"),
        ([row(chosen="")] * 2 + [row("Why? " * 60)], {"max_length": 50}, "`data.columns`.*`chosen` is empty"),
        ([row(chosen="4")], {}, "`data.columns`"),
    ],
)
def test_where_no_row_is_left_the_commonest_reason_says_what_to_set(tmp_path, tokenizer, rows, settings, hint):
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=f"none of {several(len(rows), 'row')} is left") as caught:
        prepare(source, tokenizer, tmp_path / "p", **settings)
    assert re.search(hint, caught.value.hint), caught.value.hint
