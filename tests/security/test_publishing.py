"""What is published is seen by those who should see it, and says nothing of the token or of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.in_process import call
from tests.hub_server import SIGNATURE, User
from tests.publishing import PUSH, READ, files_of, published


def test_a_repository_that_is_public_is_not_taken_unasked(exported, hub, capfd):
    hub.create("me/model", private=False)
    for command in (PUSH, "export runs/run --to new --push me/model"):
        assert call(command) == 2
        said = capfd.readouterr().err
        assert "`me/model` is public" in said
        assert "add `--public`" in said
    assert not Path("new").exists()
    assert len(hub.repos["me/model"].commits) == 1
    assert call(f"{PUSH} --public --quiet") == 0
    assert published(hub) == files_of("out")


def test_a_repository_that_became_public_unasked_gets_nothing(exported, hub, capfd, monkeypatch):
    create = hub.create
    monkeypatch.setattr(hub, "create", lambda name, private: create(name, private=False))
    assert call(PUSH) == 2
    assert "`me/model` is public" in capfd.readouterr().err
    assert not hub.large
    assert set(hub.content("me/model")) == {".gitattributes"}


def test_the_token_may_be_in_the_librarys_file_and_is_masked_wherever_it_is_said(
    exported, hub, capfd, monkeypatch, tmp_path
):
    secret = "not-of-the-usual-form-but-secret"
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(secret)
    hub.users = {secret: User("me")}
    assert call(PUSH) == 0
    hub.users = {READ: User("me")}
    assert call(PUSH) == 1
    printed = capfd.readouterr()
    assert "Invalid credentials in Authorization header: Bearer [secret]" in printed.err
    assert secret not in printed.out + printed.err


@pytest.mark.parametrize("token", ["hf_with space", "hf_with\x7fcode", "hf_mit-Umläut"])
def test_a_token_that_none_can_be_is_an_error_without_it(exported, hub, capfd, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert call(PUSH) == 2
    printed = capfd.readouterr()
    assert "characters that no token has" in printed.err
    assert token not in printed.out + printed.err
    assert not hub.requests


@pytest.mark.parametrize("text", ["{folder}/pairs.jsonl", "{home}/anything", "{token}"])
def test_what_is_of_this_machine_alone_is_not_published(exported, hub, capfd, text):
    card = Path("out/README.md")
    said = text.format(folder=exported, home=Path.home(), token=hub.token)
    card.write_text(card.read_text(encoding="utf-8") + f"\ntrained on `{said}`\n", encoding="utf-8")
    assert call(PUSH) == 2
    printed = capfd.readouterr().err
    assert "README.md, line" in printed
    assert "names a path of this machine" in printed or "contains a secret" in printed
    assert hub.token not in printed
    assert not hub.repos


def test_what_signs_an_upload_is_not_printed(exported, hub, capfd):
    hub.cut(r"PUT /storage/", after_bytes=100)
    assert call(PUSH) == 0
    said = capfd.readouterr().err
    assert "thrown while requesting PUT" in said
    assert SIGNATURE not in said, "whoever has it may write"
