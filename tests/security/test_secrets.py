"""Nothing that a run writes or says holds a secret of its surroundings."""

from __future__ import annotations

import pytest

from dpo_cli.reporting.card import Card, model_card
from dpo_cli.reporting.secrets import covered, covered_command
from tests.cli.test_bad_inputs import PREPARE, TRAIN

PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted1",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefplanted1",
    "AWS_SECRET_ACCESS_KEY": "planted/AwsSecret+Value",
    "DATABASE_PASSWORD": "planted pass phrase",
}


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def test_no_file_of_a_run_holds_a_secret_of_the_environment(project, dpo, planted):
    said = [dpo(PREPARE + " --report report"), dpo(TRAIN), dpo("eval --config run.yaml --json figures.json")]
    assert [one.status for one in said] == [0, 0, 0], said
    written = [path for path in project.folder.rglob("*") if path.is_file()]
    assert {"environment.json", "README.md", "config.yaml", "metrics.jsonl", "report.html", "figures.json"} <= {
        path.name for path in written
    }
    for value in PLANTED.values():
        assert not [one for one in said if value in one.said]
        assert not [path for path in written if value.encode() in path.read_bytes()]


def test_secrets_of_the_command_line_are_covered_in_what_is_kept_of_it():
    command = ["dpo", "train", "--hf-token", "abc123", "--api-key=abc123", "model.token=abc123", "training.epochs=2"]
    kept = covered_command([*command, "data.train=https://me:abc123@host/pairs.jsonl", f"hf_{'abc123' * 6}"])
    assert "abc123" not in " ".join(kept)
    assert kept[:3] == command[:3]
    assert kept[6] == "training.epochs=2"


def test_secrets_are_covered_in_errors(project, dpo, planted):
    result = dpo(
        f"{TRAIN} training.api_key=abc123 output_dir=https://me:abc123@host/run model.name={PLANTED['HF_TOKEN']}"
    )
    assert result.status == 2
    assert "[secret]" in result.said
    assert "abc123" not in result.said
    assert PLANTED["HF_TOKEN"] not in result.said


def test_of_secrets_that_begin_alike_nothing_is_left(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "planted-secret")
    monkeypatch.setenv("B_TOKEN", "planted-secret-and-more")
    assert covered("of planted-secret-and-more, planted-secret") == "of [secret], [secret]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://me:p@ss@host/db", "postgres://[secret]@host/db"),
        ('password="two words, and more" rest', 'password="[secret]" rest'),
        ("{'api_key': 'it\\'s one', 'a': 1}", "{'api_key': '[secret]', 'a': 1}"),
        ("token=one two", "token=[secret] two"),
    ],
)
def test_a_secret_is_covered_to_its_end(text, shown):
    assert covered(text) == shown


def test_no_form_of_yaml_hides_a_secret_in_the_card(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "it's-a-planted-value")
    monkeypatch.setenv("X_TOKEN", "a planted pass phrase")
    folder = f"/{'long/' * 12}a planted pass phrase/it's-a-planted-value"
    card = model_card(Card("run", settings={"model": {"name": "m"}, "output_dir": folder, "tracking": [folder]}))
    assert "planted" not in card
    assert card.count("[secret]") == 4


@pytest.mark.parametrize(
    "text",
    [
        "set `training.micro_batch_tokens: 512`",
        "the tokenizer cannot be loaded: no such file",
        "eos_token: <|im_end|>, pad_token=<pad>",
        "micro_batch_tokens=512 tokens per second: 12",
        "tokens  mean  median",
        "runs/key/monkey=1 the key of the cache: 3f",
        "user@host and https://host/path@version",
    ],
)
def test_what_is_no_secret_is_shown(text):
    assert covered(text) == text
