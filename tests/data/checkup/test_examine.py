"""The check of prepared pairs: what it counts, what it names, and what `data.drop` leaves out."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from dpo_cli.data.checkup.comparisons import PAIR_CHECKS, Found
from dpo_cli.data.checkup.examine import CHECKS, examine
from dpo_cli.data.checkup.excerpts import Excerpts
from dpo_cli.data.checkup.report import Margins
from dpo_cli.data.checkup.selection import drops, without_copies
from dpo_cli.data.findings import FlaggedCheck
from dpo_cli.data.pairs.sources import Source
from dpo_cli.data.prepared.columns import SCHEMA
from dpo_cli.data.prepared.folder import PAIRS, PreparedPairs, Reading
from dpo_cli.data.prepared.tally import COUNTED, MEASURED, QUANTILES
from dpo_cli.data.prepared.writing import prepare
from dpo_cli.data.tokens.token_checks import TOKEN_CHECKS
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.system.storage import sealed_folder, text_digest
from tests.conftest import ROOT, write_rows

STATISTICS = {
    "sources": [{"source": "pairs.jsonl", "shape": "text", "rows": 0, "pairs": 0}],
    "dropped": {},
    "examples": {},
    **dict.fromkeys(COUNTED, 0),
    "tokens": {part: dict.fromkeys([*QUANTILES, "mean"], 0) for part in ("prompt", "chosen", "rejected")},
    "too_long": {part: [] for part in MEASURED},
}
BITS = {check.name: check.flag for check in PAIR_CHECKS if isinstance(check, FlaggedCheck)}


def pair(prompt, chosen, rejected, origin=None, *noticed):
    """A pair of texts or token ids, where it was read (by default: its own line), what was noticed of it."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "origin": origin, "noticed": noticed}


def prepared(folder, rows, tokenizer=None, **statistics) -> PreparedPairs:
    """Write pairs as the program keeps them, in two record batches."""
    columns = {name: [] for name in SCHEMA.names}
    for line, row in enumerate(rows, 1):
        tokens = {name: ids(row[name], tokenizer) for name in ("prompt", "chosen", "rejected")}
        values = {
            **tokens,
            "origin": row["origin"] or f"pairs.jsonl:{line}",
            "weight": 1.0,
            "margin": row.get("margin", 0.0),
            "source": "",
            "category": "",
            "chosen_gaps": [],
            "rejected_gaps": [],
            "cut_from": row.get("cut_from", 0),
            "flags": sum(BITS[name] for name in row["noticed"]),
            "key": digest(*tokens.values()),
            "prompt_key": digest(tokens["prompt"]),
            "either_key": digest(tokens["prompt"], *sorted((tokens["chosen"], tokens["rejected"]))),
        }
        for name, value in values.items():
            columns[name].append(value)
    table = pa.table(columns, schema=SCHEMA)
    kept = {"rows_read": len(rows), "pairs_kept": len(rows)}
    facts = {"fingerprint": "f", "settings": {}, "statistics": {**STATISTICS, **kept, **statistics}}
    with (
        sealed_folder(folder, facts) as temporary,
        pa.OSFile(str(temporary / PAIRS), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        writer.write_table(table, max_chunksize=max(1, len(rows) // 2))
    return PreparedPairs.open(folder)


def ids(text, tokenizer):
    return list(text) if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]


def digest(*tokens):
    return bytes.fromhex(text_digest(*map(repr, tokens)))[:16]


def examined(pairs, held_out=(), **settings):
    held = np.array(held_out, np.int64)
    train = np.setdiff1d(np.arange(len(pairs)), held)
    return examine(pairs, train, held, **{"max_length": 1024, **settings})


def findings(pairs, held_out=(), **settings):
    return {finding.name: finding for finding in examined(pairs, held_out, **settings).findings}


def origins(finding):
    return [(example.origin, example.other) for example in finding.examples]


def dropped(pairs, names, held_out=()):
    held = np.array(held_out, np.int64)
    left_out = drops(pairs, np.setdiff1d(np.arange(len(pairs)), held), held, names)
    return {name: indices.tolist() for name, indices in left_out.items()}


def test_a_repeated_pair_is_named_beside_the_first_of_its_kind(tmp_path):
    rows = [pair([1], [2, 0], [3, 0]), pair([1], [2, 0], [4, 0]), pair([1], [2, 0], [3, 0]), pair([1], [2, 0], [3, 0])]
    pairs = prepared(tmp_path / "p", rows)
    found = findings(pairs)["duplicates"]
    assert (found.count, found.share, found.severity) == (2, 0.5, "warning")
    assert origins(found) == [("pairs.jsonl:3", "pairs.jsonl:1"), ("pairs.jsonl:4", "pairs.jsonl:1")]
    assert dropped(pairs, ["duplicates"]) == {"duplicates": [2, 3]}


def test_rows_that_a_source_repeats_on_purpose_are_no_duplicates(tmp_path):
    rows = [pair([1], [2, 0], [3, 0], "a:1"), pair([1], [2, 0], [3, 0], "a:1"), pair([1], [2, 0], [3, 0], "a:7")]
    pairs = prepared(tmp_path / "p", rows)
    assert origins(findings(pairs)["duplicates"]) == [("a:7", "a:1")]
    assert "duplicates" not in findings(prepared(tmp_path / "q", rows[:2]))
    ranked = [pair([1], [2, 0], [other, 0], "a:1") for other in (3, 4, 3, 4)]
    assert "duplicates" not in findings(prepared(tmp_path / "r", ranked))


def test_a_file_that_is_named_twice_holds_duplicates(tmp_path):
    rows = [pair([1], [2, 0], [3, 0], "a:1"), pair([4], [2, 0], [3, 0], "a:2")]
    pairs = prepared(tmp_path / "p", rows * 2)
    assert origins(findings(pairs)["duplicates"]) == [("a:1", "a:1"), ("a:2", "a:2")]
    assert dropped(pairs, ["duplicates"]) == {"duplicates": [2, 3]}


def test_rows_that_a_source_repeats_on_purpose_count_once(tmp_path):
    rows = [
        *[pair([1], [2, 2, 0], [3, 0], "a:1", "near_identical", "truncated") | {"cut_from": 1025}] * 3,
        pair([1], [2, 2, 0], [4, 0], "a:2"),
        *[pair([1], [2, 2, 0], [3, 0], "a:7", "near_identical")] * 2,
        pair([9], [2, 0], [2, 3, 0], "a:8"),
    ]
    pairs = prepared(tmp_path / "p", rows)
    report = examined(pairs, max_length=1024)
    found = {finding.name: finding for finding in report.findings}
    counts = {name: (finding.count, finding.share) for name, finding in found.items()}
    assert counts == {
        "duplicates": (1, 0.25), "near_identical": (2, 0.5), "truncated": (1, 0.25), "shared_prompts": (3, 0.75),
    }  # fmt: skip
    assert origins(found["near_identical"]) == [("a:1", ""), ("a:7", "")]
    assert (report.num_train, report.num_copies) == (7, 3)
    assert (report.length_bias.longer, report.length_bias.shorter) == (3, 1)
    assert sum(report.lengths.histograms["chosen"]) == 4
    assert [cut.num_longer for cut in report.lengths.cuts if cut.max_length == 1024] == [1]
    assert dropped(pairs, ["duplicates"]) == {"duplicates": [4, 5]}


def test_without_copies_every_row_that_a_source_repeats_stands_once(tmp_path):
    rows = [pair([1], [2, 0], [3, 0], origin) for origin in ("a:1", "a:1", "b:1", "a:1", "a:1", "a:1")]
    pairs = prepared(tmp_path / "p", rows)
    assert without_copies(pairs, np.arange(6)).tolist() == [0, 2, 3]
    assert without_copies(pairs, np.array([1, 2, 4, 5])).tolist() == [1, 2, 4]
    assert without_copies(pairs, np.empty(0, np.int64)).tolist() == []


def test_pairs_that_prefer_opposite_responses_are_found_on_both_sides(tmp_path):
    rows = [pair([1], [2, 0], [3, 0]), pair([9], [2, 0], [3, 0]), pair([1], [3, 0], [2, 0]), pair([1], [2, 0], [3, 0])]
    pairs = prepared(tmp_path / "p", rows)
    found = findings(pairs)["conflicts"]
    assert found.count == 3
    # 3 beside 1 is named with 1.
    assert origins(found) == [("pairs.jsonl:1", "pairs.jsonl:3"), ("pairs.jsonl:4", "pairs.jsonl:3")]
    assert dropped(pairs, ["conflicts"]) == {"conflicts": [0, 2, 3]}


def test_a_prompt_with_several_pairs_is_worth_knowing_and_no_warning(tmp_path):
    pairs = prepared(tmp_path / "p", [pair([1], [2, 0], [3, 0]), pair([1], [2, 0], [4, 0]), pair([5], [2, 0], [3, 0])])
    report = examined(pairs)
    assert [(finding.name, finding.severity, finding.count) for finding in report.findings] == [
        ("shared_prompts", "info", 2)
    ]
    assert report.grave == []
    for number, other in enumerate((pair([1], [2, 0], [3, 0]), pair([1], [3, 0], [2, 0]))):
        again = examined(prepared(tmp_path / str(number), [pair([1], [2, 0], [3, 0]), other]))
        assert "shared_prompts" in again.not_found, "the same responses, whichever is the better one"


def test_a_prompt_on_both_sides_of_the_split_is_an_error_and_dropping_it_keeps_the_held_out_pair(tmp_path):
    rows = [pair([1], [2, 0], [3, 0]), pair([4], [2, 0], [3, 0]), pair([1], [5, 0], [6, 0]), pair([1], [7, 0], [8, 0])]
    pairs = prepared(tmp_path / "p", rows)
    found = findings(pairs, held_out=[2])["leakage"]
    assert (found.count, found.severity) == (2, "error")
    assert origins(found) == [("pairs.jsonl:1", "pairs.jsonl:3"), ("pairs.jsonl:4", "pairs.jsonl:3")]
    assert dropped(pairs, ["leakage"], held_out=[2]) == {"leakage": [0, 3]}
    assert "leakage" not in findings(pairs)
    assert "leakage" not in findings(pairs, held_out=[0, 2, 3])


def test_the_same_pair_on_both_sides_is_leakage_and_no_duplicate(tmp_path):
    pairs = prepared(tmp_path / "p", [pair([1], [2, 0], [3, 0]), pair([1], [2, 0], [3, 0])])
    assert set(findings(pairs, held_out=[1])) == {"leakage"}


def test_what_was_noticed_of_texts_is_counted_and_left_out_by_name(tmp_path):
    rows = [
        pair([1], [2, 0], [3, 0], None, "near_identical", "refusal_chosen"),
        pair([4], [2, 0], [3, 0], None),
        pair([5], [2, 0], [3, 0], None, "near_identical"),
    ]
    pairs = prepared(tmp_path / "p", rows)
    found = findings(pairs, held_out=[2])
    assert {name: finding.count for name, finding in found.items()} == {"near_identical": 2, "refusal_chosen": 1}
    assert found["refusal_chosen"].heuristic
    assert origins(found["near_identical"]) == [("pairs.jsonl:1", ""), ("pairs.jsonl:3", "")]
    assert dropped(pairs, ["refusal_chosen", "near_identical"]) == {"refusal_chosen": [0], "near_identical": [2]}
    assert dropped(pairs, ["near_identical", "refusal_chosen"]) == {"near_identical": [0, 2], "refusal_chosen": []}


def test_every_finding_counts_what_dropping_it_leaves_out(tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        pair(generator.integers(0, 4, 1).tolist(), [10 + a], [10 + b])
        for a, b in generator.integers(0, 3, (200, 2)).tolist()
        if a != b
    ]
    pairs = prepared(tmp_path / "p", rows)
    held_out = np.flatnonzero(generator.random(len(rows)) < 0.2)
    found = findings(pairs, held_out)
    for name in ("duplicates", "conflicts", "leakage"):
        (indices,) = dropped(pairs, [name], held_out).values()
        assert len(indices) == found[name].count > 0, name
    gone = np.concatenate([*map(np.array, dropped(pairs, ["leakage", "conflicts", "duplicates"], held_out).values())])
    assert len(set(gone.tolist())) == len(gone)
    rest = np.setdiff1d(np.arange(len(pairs)), gone)
    left = examine(pairs, np.setdiff1d(rest, held_out), np.intersect1d(rest, held_out), max_length=99)
    assert not {"leakage", "conflicts", "duplicates"} & {finding.name for finding in left.findings}


def test_the_page_of_the_check_names_every_finding_with_its_severity():
    page = (ROOT / "docs" / "data-check.md").read_text(encoding="utf-8")
    for check in CHECKS:
        assert f"| `{check.name}` | {check.severity} |" in page, check.name
    assert len(re.findall(r"^\| `\w+` \| (?:error|warning|info) \|", page, re.M)) == len(CHECKS)


@pytest.mark.parametrize(("longer", "shorter", "found"), [(40, 0, 40), (0, 40, 40), (22, 18, None), (3, 1, None)])
def test_lengths_are_a_finding_where_they_tell_the_better_response_beyond_chance(tmp_path, longer, shorter, found):
    rows = [pair([i], [1, 1, 0], [2, 0]) for i in range(longer)] + [
        pair([99, i], [1, 0], [2, 2, 0]) for i in range(shorter)
    ]
    pairs = prepared(tmp_path / "p", rows)
    report = examined(pairs)
    assert (report.length_bias.longer, report.length_bias.shorter) == (longer, shorter)
    assert report.length_bias.accuracy == longer / len(rows)
    counts = {finding.name: finding.count for finding in report.findings}
    assert counts.get("length_bias") == found


def test_equal_lengths_count_half_for_the_judge(tmp_path):
    bias = examined(prepared(tmp_path / "p", [pair([1], [2, 2, 0], [3, 0]), pair([2], [2, 0], [3, 0])])).length_bias
    assert (bias.longer, bias.equal, bias.shorter, bias.accuracy) == (1, 1, 0, 0.75)
    assert bias.interval[0] < 0.75 < bias.interval[1]


def test_histograms_count_every_pair_in_the_bin_of_its_length(tmp_path):
    rows = [pair([7] * n, [1] * (3 * n), [2] * n) for n in range(1, 60)]
    lengths = examined(prepared(tmp_path / "p", rows)).lengths
    for name, factor in (("prompt", 1), ("chosen", 3), ("rejected", 1), ("longest", 4)):
        counts = lengths.histograms[name]
        assert sum(counts) == 59
        for place, count in enumerate(counts):
            assert count == sum(factor * n // lengths.bin_tokens == place for n in range(1, 60)), name
    assert sum(count for *_, count in lengths.plane) == 59
    for chosen, rejected, count in lengths.plane:
        width = lengths.plane_tokens
        assert count == sum(3 * n // width == chosen and n // width == rejected for n in range(1, 60))


def test_another_length_rule_would_cut_what_is_longer_and_what_was_dropped(tmp_path):
    rows = [pair([1] * 500, [2] * n, [3]) for n in (1, 13, 300, 600)]
    rows[2]["cut_from"], rows[3]["cut_from"] = 3000, 1500
    too_long = STATISTICS["too_long"] | {"longest": [[1101, 4], [2048, 1], [9000, 1]]}
    report = examined(prepared(tmp_path / "p", rows, too_long=too_long), max_length=1100)
    cuts = {cut.max_length: cut.num_longer for cut in report.lengths.cuts}
    assert cuts == {512: 3 + 6, 1024: 2 + 6, 1100: 2 + 6, 2048: 1 + 1}


@pytest.mark.parametrize("rule", [{}, {"on_too_long": "truncate"}, {"on_too_long": "truncate", "min_response": 20}])
@pytest.mark.parametrize("weight", [1, 3])
def test_what_other_lengths_would_cut_does_not_depend_on_the_length_that_is_set(tmp_path, tokenizer, weight, rule):
    texts = ["and on " * (40 * n % 1100) for n in range(24)]
    rows = [
        {"instruction": "Go on. " * (60 * (n % 5) + 1), "chosen": f"{text}!", "rejected": f"{text}at last."}
        for n, text in enumerate(texts)
    ]
    source = Source(path=str(write_rows(tmp_path / "pairs.jsonl", rows)), weight=weight)
    reports = []
    for length, settings in ((700, {"on_too_long": "drop", **rule}), (100_000, {"on_too_long": "drop"})):
        tokenize = PairTokenizer(tokenizer, template=None, max_length=length, **settings)
        reports.append(examined(prepare([source], Reading(), tokenize, tmp_path / f"p{length}"), max_length=length))
    short, whole = ({cut.max_length: cut.num_longer for cut in report.lengths.cuts} for report in reports)
    assert {tried: short[tried] for tried in (512, 1024, 2048)} == {tried: whole[tried] for tried in (512, 1024, 2048)}
    assert whole[1024] > 0
    if not rule:
        assert sum(short_and_gone(reports[0])) == sum(reports[1].lengths.histograms["longest"]) == 24


def short_and_gone(report):
    return [sum(counts["longest"]) for counts in (report.lengths.histograms, report.lengths.too_long)]


def test_pairs_that_were_dropped_as_too_long_are_in_the_histograms(tmp_path):
    """With bins of 5 tokens 150 is in bin 30, the last; a pair that is far longer than 99 % of them is there too."""
    rows = [pair([1] * n, [2] * n, [3]) for n in range(1, 51)]
    too_long = {"prompt": [[60, 50], [10_000, 1]], "chosen": [[90, 50], [10_000, 1]], "rejected": [[7, 51]]}
    statistics = {"too_long": too_long | {"longest": [[150, 50], [20_000, 1]]}}
    lengths = examined(prepared(tmp_path / "p", rows, **statistics), max_length=100).lengths
    assert (lengths.bin_tokens, lengths.open_ended) == (5, True)
    for name, places in (
        ("prompt", {12: 50, 30: 1}),
        ("chosen", {18: 50, 30: 1}),
        ("rejected", {1: 51}),
        ("longest", {30: 51}),
    ):
        assert {place: count for place, count in enumerate(lengths.too_long[name]) if count} == places
        assert len(lengths.too_long[name]) == len(lengths.histograms[name]) == 31
        assert sum(lengths.histograms[name]) == 50


def test_where_nothing_was_dropped_as_too_long_every_bin_has_an_end(tmp_path):
    lengths = examined(prepared(tmp_path / "p", [pair([1], [2, 0], [3, 0])])).lengths
    assert (lengths.too_long, lengths.open_ended) == ({}, False)


def test_margins_are_measured_over_the_pairs_that_have_one(tmp_path):
    rows = [pair([1], [2, n], [3, 0]) | {"margin": margin} for n, margin in enumerate([7.0, 0.0, -1.5, 2.0, 0.0])]
    pairs = prepared(tmp_path / "p", rows)
    assert examined(pairs).margins == Margins(False, 3, -1.5, 2.0, 7.0)
    assert examined(pairs, uses_margins=True).margins.used
    assert examined(prepared(tmp_path / "q", [pair([1], [2, 0], [3, 0])]), uses_margins=True).margins is None


@pytest.mark.parametrize("fact", [check.name for check in TOKEN_CHECKS])
def test_what_tokenizing_brought_to_light_is_counted_of_the_run_s_pairs_and_has_examples(tmp_path, tokenizer, fact):
    rows = [pair("Where? ", "Paris", f"Lyon {number}", None, *[fact] * (number != 1)) for number in range(6)]
    pairs = prepared(tmp_path / "p", rows, tokenizer)
    report = examine(pairs, np.array([0, 1, 2]), np.array([4]), max_length=99, tokenizer=tokenizer)
    (found,) = (finding for finding in report.findings if finding.name == fact)
    assert (found.count, found.share) == (3, 0.75)
    assert origins(found) == [("pairs.jsonl:1", ""), ("pairs.jsonl:3", ""), ("pairs.jsonl:5", "")]
    assert found.examples[0].texts["chosen"] == "Paris"


def test_dropped_rows_of_both_parts_are_a_warning_with_reasons_and_examples(tmp_path):
    pairs = prepared(tmp_path / "p", [pair([1], [2, 0], [3, 0])])
    parts = {
        "data.train": {"rows_read": 30, "dropped": {"too long": 4, "wrong type": 1}},
        "data.eval": {"rows_read": 10, "dropped": {"too long": 5}},
    }
    examples = {"too long": ["a:1: 9 tokens", "a:2: 8 tokens"], "wrong type": ["a:3: no text"]}
    read = {name: STATISTICS | part | {"examples": examples} for name, part in parts.items()}
    report = examined(pairs, read=read)
    (found,) = report.grave
    assert (found.name, found.severity, found.count, found.share) == ("dropped_rows", "warning", 10, 0.25)
    assert "9 too long, 1 wrong type" in found.meaning
    assert "max_length" in found.advice
    assert origins(found) == [("a:1", ""), ("a:3", ""), ("a:2", "")]
    assert "9 tokens" in found.examples[0].texts["dropped"]
    assert "dropped_rows" in examined(pairs).not_found


def test_responses_that_end_with_different_tokens_are_a_warning(tmp_path):
    pairs = prepared(tmp_path / "p", [pair([1], [2, 9], [3, 9]), pair([4], [2, 9], [3, 8])])
    found = findings(pairs)["unlike_ends"]
    assert (found.count, origins(found)) == (1, [("pairs.jsonl:2", "")])


def test_the_template_s_tokens_at_the_ends_are_counted(tmp_path, tokenizer):
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    rows = [
        pair(f"{bos}Hello, how are you today?<|im_start|>", f"Yes{eos}", f"No{eos}"),
        pair(f"{bos}{bos}Why, and to what end, is it so?<|im_start|>", f"So{eos}", "Because"),
        pair("What is it that they say?\n", f"This{eos}", f"That{eos}"),
    ]
    boundary = examined(prepared(tmp_path / "p", rows, tokenizer), tokenizer=tokenizer).boundary
    assert (boundary.bos, boundary.starting_with_bos, boundary.starting_with_two) == (bos, 2, 1)
    assert (boundary.eos, boundary.without_eos) == (eos, {"chosen": 0, "rejected": 1})
    assert boundary.endings["prompt"] == (("<|im_start|>", 2), ("\n", 1))
    assert boundary.endings["chosen"] == ((eos, 3),)
    assert boundary.endings["rejected"][0] == (eos, 2)


def test_excerpts_show_where_the_responses_part_and_what_was_noticed(tmp_path, tokenizer):
    same = "It is as everybody knows and has always known since the very first days of the world, which are long ago "
    rows = [
        pair("<|im_start|>Where? ", f"{same}Paris", f"{same}Lyon", None, "near_identical"),
        pair("<|im_start|>Is it he? ", f"{same * 3}I\x1b[2J am{same * 3}", "Me", None, "control_characters"),
    ]
    pairs = prepared(tmp_path / "p", rows, tokenizer)
    found = findings(pairs, tokenizer=tokenizer)
    (near,) = found["near_identical"].examples
    assert near.texts["prompt"] == "…Where? "
    assert near.texts["chosen"].startswith("…")
    assert near.texts["chosen"].endswith("Paris")
    assert near.texts["rejected"].endswith("Lyon")
    (control,) = found["control_characters"].examples
    assert "I\x1b[2J am" in control.texts["chosen"]
    assert len(control.texts["chosen"]) < 150
    assert findings(pairs)["near_identical"].examples[0].texts == {}


def test_the_gravest_comes_first_and_nothing_is_both_found_and_not_found(tmp_path):
    rows = [pair([1], [2, 0], [3, 0]), pair([1], [2, 0], [3, 0]), pair([1], [2, 0], [4, 0]), pair([1], [9, 0], [8, 0])]
    report = examined(prepared(tmp_path / "p", rows), held_out=[3])
    assert [finding.name for finding in report.findings] == ["leakage", "duplicates", "shared_prompts"]
    assert [finding.name for finding in report.grave] == ["leakage", "duplicates"]
    assert not {finding.name for finding in report.findings} & set(report.not_found)


def test_the_report_is_plain_json(tmp_path, tokenizer):
    rows = [pair("Where?", "Paris.", "Lyon."), pair("Where?", "Lyon.", "Paris.")]
    report = examined(prepared(tmp_path / "p", rows, tokenizer), tokenizer=tokenizer, left_out={"duplicates": 2})
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert (found["num_train"], found["num_held_out"], found["left_out"]) == (2, 0, {"duplicates": 2})
    assert found["findings"][0]["examples"][0]["texts"]["chosen"] == "Paris."
    assert found["read"]["data.train"]["rows_read"] == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_an_excerpt_shows_the_prompt_that_all_pairs_have(tmp_path, tokenizer, rows):
    """What all prompts begin with is left out of it, but not where nothing else is left."""
    pairs = prepared(tmp_path, [pair("Add 1 and 2.", "3", "4")] * rows, tokenizer)
    texts = Excerpts(pairs, tokenizer).examples(Found(np.array([0]), None))[0].texts
    assert "Add 1 and 2." in texts["prompt"]
