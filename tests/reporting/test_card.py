"""The model card: the Hub reads its fields, its commands run, and nothing in it is more than text."""

from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dpo_cli.config.loading import as_config
from dpo_cli.evaluation.statistics import Estimate
from dpo_cli.modeling.folders.provenance import Licence, Provenance, front_matter, provenance_of
from dpo_cli.reporting.card import ADAPTER, GGUF, MERGED, MODEL, Card, model_card
from dpo_cli.settings import PUBLISHED

FIGURES = {
    "pairs": 40, "loss": 0.61, "rewards/accuracies": 0.75, "accuracy_interval": [0.598, 0.858], "ties": 0,
    "rewards/margins": 0.2, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "logps/chosen": -20.0,
    "logps/rejected": -21.0, "logps/accuracies": 0.6, "logps/accuracies_mean": 0.6,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"model": {"name": "tiny"}, "data": {"train": "pairs.jsonl"}}
APACHE = Provenance(Licence("apache-2.0"), hub_id="org/base", revision="0123abc")


def card_of(form: str = MODEL, **others: Any) -> Card:
    kept: dict[str, Any] = {
        "settings": {**SETTINGS, "adapter": {"type": "lora"}} if form in (ADAPTER, MERGED) else SETTINGS,
        "base": "org/base",
        "provenance": APACHE,
        "facts": {"pairs": "300 to train on, 40 held out", "data": "pairs.jsonl"},
        "columns": {"before": {**FIGURES, "rewards/accuracies": 0.5}, "after": FIGURES},
        "gguf": "my-f16.gguf" if form == GGUF else "",
    }
    return Card("my-run", form, **{**kept, **others})


def fields_of(card: Card) -> dict[str, Any]:
    """Return the fields as the Hub's own library reads them."""
    found: dict[str, Any] = ModelCard(model_card(card)).data.to_dict()
    return found


@pytest.mark.parametrize(
    ("form", "library", "relation"),
    [
        (MODEL, "transformers", "finetune"),
        (MERGED, "transformers", "finetune"),
        (ADAPTER, "peft", "adapter"),
        (GGUF, "gguf", "finetune"),
    ],
)
def test_the_hub_reads_what_the_model_is(form, library, relation):
    found = fields_of(card_of(form, datasets=["org/pairs"]))
    assert found["library_name"] == library
    assert (found["base_model"], found["base_model_relation"]) == ("org/base", relation)
    assert (found["license"], found["datasets"]) == ("apache-2.0", ["org/pairs"])
    assert found["pipeline_tag"] == "text-generation"
    assert {"dpo", *(["lora"] if form in (ADAPTER, MERGED) else []), *(["gguf"] if form == GGUF else [])} <= {
        *found["tags"]
    }
    assert "language" not in found, "nothing is guessed"


def test_the_hub_reads_the_last_reward_accuracy_with_its_interval():
    (result,) = ModelCard(model_card(card_of())).data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-generation", "accuracy", 0.75)
    assert result.metric_args == {"interval_95": [0.598, 0.858]}
    assert "model-index" not in fields_of(card_of(columns={}))


def test_a_model_that_was_only_converted_is_not_called_trained():
    plain = {"settings": {}, "facts": {"weights": "q8_0"}, "columns": {}}
    found, text = fields_of(card_of(GGUF, **plain)), model_card(card_of(GGUF, **plain))
    assert found["base_model_relation"] == "quantized"
    assert "dpo" not in found["tags"]
    assert "Fine-tuned" not in text
    assert "preference pairs" not in text
    assert "base_model_relation" not in fields_of(card_of(MODEL, **plain)), "a copy is no kind of derivative"


def test_what_is_not_known_is_left_out_and_said():
    card = card_of(provenance=Provenance(), base="/home/somebody/models/base")
    found, text = fields_of(card), model_card(card)
    assert not {"license", "base_model", "base_model_relation", "datasets"} & found.keys()
    assert "licence of the base is not known" in text
    assert "Fine-tuned from `base` on" in text
    assert "somebody" not in text


def test_a_local_base_that_names_its_own_base_passes_it_on():
    card = card_of(provenance=Provenance(bases=("org/one", "org/two")), base="models/merged")
    assert fields_of(card)["base_model"] == ["org/one", "org/two"]
    assert "Fine-tuned from `merged` (made from `org/one`, `org/two`)" in model_card(card)


def test_figures_have_their_intervals_and_those_of_their_change():
    changes = {
        "rewards/accuracies": Estimate(0.25, (0.1, 0.4)),
        "rewards/margins": Estimate(0.2, (0.15, 0.25)),
        "loss": Estimate(-0.1, None),
    }
    text = model_card(card_of(changes=changes))
    assert "| 95 % interval | 59.8 – 85.8 % | 59.8 – 85.8 % |  |" in text
    assert "| reward accuracy | 50.0 % | 75.0 % | +0.2500 (+0.1000 to +0.4000) |" in text
    assert "| reward margin | +0.2000 | +0.2000 | +0.2000 (+0.1500 to +0.2500) |" in text
    assert "| loss | 0.6100 | 0.6100 | -0.1000 |" in text


def test_limits_say_what_is_known_and_leave_the_rest_open():
    text = model_card(card_of())
    for part in ("## Intended use", "## Limits", "trained on 300 preference pairs", "not evaluated for safety"):
        assert part in text
    assert text.count("*To be ") == 2


HOSTILE = "a`b|c](http://x)<script>alert(1)</script> **d**\n# e\u202e --- \x1b[31m"


def test_nothing_that_a_user_names_is_more_than_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret-value")
    card = card_of(
        base=f"{HOSTILE}planted-secret-value",
        provenance=Provenance(bases=("org/base",)),
        facts={"data": HOSTILE, "pairs": HOSTILE},
        settings={"model": {"name": HOSTILE}, "note": "planted-secret-value"},
        checked={"difference": HOSTILE},
        gguf="it's `my` $(rm -r x) model.gguf",
        form=GGUF,
    )
    text = model_card(Card(f"{HOSTILE}planted-secret-value", **{k: v for k, v in vars(card).items() if k != "name"}))
    assert "planted-secret-value" not in text
    assert not re.search("[\u202e\x1b]", text.partition("## Settings")[0])
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text.partition("\n---\n")[2], flags=re.M | re.S)
    bare = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert not re.search(r"<script>|\]\(|\*\*d|^# e", bare, re.M)
    assert "'it'\\''s `my` $(rm -r x) model.gguf'" in text
    assert ModelCard(text).data.to_dict()["model-index"][0]["name"].startswith("a`b|c")


def test_settings_name_paths_by_their_last_part_alone():
    config = as_config(
        {
            "model": {"name": "/home/somebody/base", "chat_template": "/home/somebody/chat.jinja"},
            "data": {"train": ["/home/somebody/a.jsonl", {"path": "/home/somebody/b.jsonl", "weight": 2.0}]},
            "reference": {"type": "cached", "model": "org/reference"},
            "adapter": {"type": "lora", "start": "/home/somebody/adapter"},
            "output_dir": "/home/somebody/runs/my",
        }
    )
    found = config.model_dump(mode="json", context=PUBLISHED)
    assert "somebody" not in str(found)
    assert found["model"]["name"] == "base"
    assert found["data"]["train"] == ["a.jsonl", {**found["data"]["train"][1], "path": "b.jsonl"}]
    assert found["reference"]["model"] == "org/reference"
    assert "somebody" in str(config.model_dump(mode="json"))


MIT = (
    "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy of this software, to "
    "deal in it.\n\nThe above copyright notice and this permission notice shall be included in all copies.\n"
)
FOLDERS = {
    "its card": ({"README.md": "---\nlicense: apache-2.0\n---\n"}, {"license": "apache-2.0"}),
    "a licence of its own": (
        {"README.md": "---\nlicense: other\nlicense_name: my-terms\nlicense_link: LICENSE\n---\n", "LICENSE": MIT},
        {"license": "other", "license_name": "my-terms", "license_link": "LICENSE"},
    ),
    "Apache's text": ({"LICENSE.txt": "  Apache License\n  Version 2.0, January 2004\n"}, {"license": "apache-2.0"}),
    "MIT's text": ({"LICENSE": MIT}, {"license": "mit"}),
    "Llama's text": ({"LICENSE": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2…"}, {"license": "llama3.2"}),
    "the older Llama's": ({"LICENSE": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n…"}, {"license": "llama3"}),
    "the card before the text": (
        {"README.md": "---\nlicense: gemma\n---\n", "LICENSE": MIT}, {"license": "gemma"},
    ),
    "its settings": ({"config.json": '{"license": "Apache-2.0"}'}, {"license": "apache-2.0"}),
    "settings that are broken": ({"config.json": "{", "LICENSE": MIT}, {"license": "mit"}),
    "MIT with a word more": ({"LICENSE": MIT.replace("MIT", "Modified MIT")}, None),
    "Apache with terms more": ({"LICENSE": "Apache License\nVersion 2.0, January 2004\n" + "More. " * 2500}, None),
    "two of them": ({"LICENSE": MIT, "LICENSE-2": "Apache License\nVersion 2.0, January 2004\n"}, None),
    "no licence": ({"README.md": "# My model\n", "NOTICE": MIT}, None),
    "fields that are not text": ({"README.md": "---\nlicense: {a: 1}\nbase_model: 3\n---\n"}, None),
    "a licence that is markup": ({"README.md": "---\nlicense: '<b>x</b>'\n---\n"}, None),
    "fields that do not end": ({"README.md": "---\nlicense: mit\n"}, None),
    "fields that are not YAML": ({"README.md": "---\nlicense: [mit\n---\n"}, None),
    "unknown": ({"README.md": "---\nlicense: unknown\n---\n"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_licence_is_known_by_the_card_or_by_its_unchanged_text(tmp_path, name):
    files, expected = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    licence = provenance_of(tmp_path).licence
    assert (licence.fields if licence else None) == expected


def test_a_model_in_the_hubs_cache_is_known_by_its_id_and_commit(tmp_path):
    folder = tmp_path / "models--org--my-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nbase_model: org/older\n---\n", encoding="utf-8")
    found = provenance_of(folder)
    assert (found.hub_id, found.revision, found.nearest) == ("org/my-model", "0123abcd", ("org/my-model",))


def test_a_card_that_was_written_here_passes_licence_and_base_on(tmp_path):
    (tmp_path / "README.md").write_text(model_card(card_of(ADAPTER)), encoding="utf-8")
    found = provenance_of(tmp_path)
    assert found.licence is not None
    assert (found.licence.id, found.nearest) == ("apache-2.0", ("org/base",))
    assert front_matter(model_card(card_of()))["library_name"] == "transformers"
