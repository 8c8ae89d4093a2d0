"""`dpo export --push`: what was exported is published whole, privately, and without a word of the token."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.config.publishing import repo_problem
from dpo_cli.reporting import secrets
from dpo_cli.system.storage import verify
from tests.cli.in_process import call
from tests.conftest import dpo_command, make_config, write_rows
from tests.hub_server import SIGNATURE, Blob, HubServer, User, serving
from tests.waiting import PATIENCE, wait_until

PUSH = "export out --push me/model"
READ = "hf_" + "rEad0" * 7


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama, demo_rows) -> Path:
    """A folder with a finished run, and `out`, its model as it was exported: in several files, and with a card."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(tiny_llama, folder / "model")
    write_rows(folder / "pairs.jsonl", demo_rows[:20])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings: dict[str, Any] = {
            "training": {"max_steps": 1},
            "output_dir": "runs/run",
            "evaluation": {"samples": 0},
        }
        make_config(folder, Path("model"), Path("pairs.jsonl"), **settings)
        assert call("train run.yaml --quiet") == 0
        assert call("export runs/run --to out --max-shard-size 40kB --quiet") == 0
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, made) -> Path:
    """A copy of it, in which the test is."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path) -> HubServer:
    """A Hub that this process publishes on, where a token that may write is in the environment."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for name in list(os.environ):
        if "proxy" in name.lower():
            monkeypatch.delenv(name)
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(secrets, "_known", set())
    return server


def surroundings(server: HubServer, home: Path, **settings: str) -> dict[str, str]:
    """Return the environment of a program that publishes on a Hub; no proxy is asked for it."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    told = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **told, "HF_TOKEN": server.token, **settings}


def run(arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        dpo_command(*arguments.split()),
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def files_of(folder: Path | str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def published(hub: HubServer, repo: str = "me/model") -> dict[str, bytes]:
    """Return what a repository has, but for the file that the Hub makes itself."""
    return {name: content for name, content in hub.content(repo).items() if name != ".gitattributes"}


def weights_bytes(folder: Path | str = "out") -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def test_a_run_is_exported_published_and_loaded_again_by_its_name(project, server, tmp_path):
    environment = surroundings(server, tmp_path / "home")
    done = run("export runs/run --to new --push me/model", environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.index("asking the Hub") < done.stderr.index("loading")
    assert published(server) == files_of("new")
    assert server.repos["me/model"].private
    assert len(server.repos["me/model"].commits) == 2, "one of the Hub's own, one of ours"
    assert "me/model (private)" in done.stdout
    code = (
        "import torch, transformers; from transformers import AutoModelForCausalLM as Model, AutoTokenizer as Texts;"
        "found, own = Model.from_pretrained('me/model'), Model.from_pretrained('new');"
        "assert all(torch.equal(found.state_dict()[name], value) for name, value in own.state_dict().items());"
        "assert Texts.from_pretrained('me/model').chat_template == Texts.from_pretrained('new').chat_template"
    )
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    for text in (done.stdout, done.stderr, loaded.stderr):
        assert server.token not in text
    for folder in (project, tmp_path / "home"):
        assert not [name for name, content in files_of(folder).items() if server.token.encode() in content]


@pytest.mark.slow
def test_what_was_published_is_trained_on_by_its_name(project, server, tmp_path):
    environment = surroundings(server, tmp_path / "home")
    assert run(PUSH, environment).returncode == 0
    done = run("train run.yaml --dry-run model.name=me/model", environment)
    assert done.returncode == 0, done.stderr
    snapshots = next((tmp_path / "home/hub/models--me--model/snapshots").iterdir())
    for file in Path("out").glob("*.safetensors"):
        assert (snapshots / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_push_that_is_stopped_shows_nothing_and_goes_on(project, server, tmp_path, number):
    first, second, *_ = sorted(Path("out").glob("*.safetensors"))
    digest = hashlib.sha256(second.read_bytes()).hexdigest()
    held = server.hold(f"PUT /storage/{digest}", after_bytes=1)
    environment = surroundings(server, tmp_path / "home")
    with subprocess.Popen(
        dpo_command(*PUSH.split()), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        wait_until(held.reached.is_set, lambda: "the second file is not sent")
        program.send_signal(number)
        said = program.communicate(timeout=PATIENCE)[1]
    assert program.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    server.heal()
    assert set(server.content("me/model")) == {".gitattributes"}, "nothing of the model is seen"
    assert "Traceback" not in said
    if number != signal.SIGKILL:
        assert "`dpo export out --push me/model` sends what is missing" in said
    server.received = 0
    again = run(PUSH, environment)
    assert again.returncode == 0, again.stderr
    assert published(server) == files_of("out")
    assert server.received == weights_bytes() - first.stat().st_size, "what had arrived is not sent again"
    assert server.token not in said + again.stdout + again.stderr


def test_a_connection_that_breaks_is_tried_again(project, server, tmp_path):
    server.cut(r"PUT /storage/", after_bytes=100)
    done = run(PUSH, surroundings(server, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert published(server) == files_of("out")
    assert "warning" in done.stderr
    assert SIGNATURE not in done.stderr, "whoever has it may write"


def test_quiet_and_without_a_terminal_only_results_are_printed(project, server, tmp_path):
    server.fail(r"PUT /storage/", 503, times=1)
    done = run(f"{PUSH} --quiet", surroundings(server, tmp_path / "home", HF_HUB_VERBOSITY="debug"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "published " in done.stdout
    assert "\r" not in done.stdout


def test_storage_by_xet_that_refuses_is_an_error(project, server, tmp_path):
    """Xet is the library's usual way; how it fails is its own, and neither a traceback nor a token."""
    server.fail("xet-write-token", 403, json.dumps({"error": "xet is not for you"}))
    done = run(PUSH, surroundings(server, tmp_path / "home", HF_HUB_DISABLE_XET="0"))
    assert done.returncode == 1, done.stderr
    assert server.asked("xet-write-token")
    assert "error: sending model-00001" in done.stderr
    assert "Traceback" not in done.stderr
    assert server.token not in done.stdout + done.stderr
    assert set(server.content("me/model")) == {".gitattributes"}


def test_publishing_imports_no_torch(project, server, tmp_path):
    code = (
        "import sys; from dpo_cli.cli import main; sys.argv = ['dpo', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *PUSH.split()]
    done = subprocess.run(command, env=surroundings(server, tmp_path / "home"), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_would_be_sent_is_listed_and_a_dry_run_stops_there(project, hub, capfd):
    capfd.readouterr()
    assert call(f"{PUSH} --dry-run") == 0
    printed = capfd.readouterr()
    assert not hub.repos
    assert not hub.asked("^(POST|PUT|DELETE)")
    assert "me/model (private, new)" in printed.out
    for file in Path("out").iterdir():
        assert re.search(rf"sent +{re.escape(file.name)} +[\d.]+ k?B", printed.out)
    assert call(PUSH) == 0
    assert capfd.readouterr().out.startswith(printed.out.rpartition("nothing was sent")[0]), "as it was announced"
    assert call(f"{PUSH} --dry-run") == 0
    assert "0 files to send" in capfd.readouterr().out


@pytest.mark.parametrize("why", ["offline", "down", "no token"])
def test_a_dry_run_lists_files_where_the_hub_cannot_be_asked(project, hub, capfd, monkeypatch, why):
    unreachable(hub, monkeypatch, why)
    capfd.readouterr()
    assert call(f"{PUSH} --dry-run") == 0
    printed = capfd.readouterr()
    assert "model.safetensors.index.json" in printed.out
    assert "was not looked at" in printed.err


@pytest.mark.parametrize("why", ["offline", "down", "no token"])
def test_a_hub_that_cannot_be_asked_is_an_error_before_anything_is_exported(project, hub, capfd, monkeypatch, why):
    unreachable(hub, monkeypatch, why)
    assert call("export runs/run --to new --push me/model") == (1 if why == "down" else 2)
    said = capfd.readouterr().err
    assert said.count("error: ") == 1
    assert "loading" not in said
    assert not Path("new").exists()


def unreachable(hub: HubServer, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    from huggingface_hub import constants

    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif why == "down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.delenv("HF_TOKEN")


WRITES = [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read", "repo.write"]}]
READS = [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}]


@pytest.mark.parametrize(
    ("user", "repo", "said"),
    [
        (None, "me/model", "status 401"),
        (User("me", "read"), "me/model", "may only read"),
        (User("me", "fineGrained", scopes=READS), "me/model", "may not write `me/model`"),
        (User("me", "fineGrained", scopes=WRITES, orgs={"lab": "write"}), "lab/model", "may not write `lab/model`"),
        (User("me"), "you/model", "neither the owner of the token nor an organization"),
        (User("me", orgs={"readers": "read"}), "readers/model", "may only read in the organization `readers`"),
    ],
)
def test_a_token_that_may_not_write_is_an_error_before_anything_is_exported(project, hub, capfd, user, repo, said):
    hub.users = {hub.token: user} if user else {READ: User("other")}
    assert call(f"export runs/run --to new --push {repo}") == (1 if user is None else 2)
    printed = capfd.readouterr()
    assert said in printed.err
    assert printed.err.count("error: ") == 1
    assert "loading" not in printed.err
    assert not Path("new").exists()
    assert not hub.repos


@pytest.mark.parametrize("repo", ["me/model", "lab/model"])
def test_a_token_that_may_write_publishes(project, hub, repo):
    hub.users[hub.token].orgs = {"lab": "write"}
    assert call(f"export out --push {repo} --quiet") == 0
    assert published(hub, repo) == files_of("out")


def test_a_token_for_certain_purposes_publishes_where_it_may(project, hub):
    hub.users = {hub.token: User("me", "fineGrained", scopes=WRITES)}
    assert call(f"{PUSH} --quiet") == 0
    assert published(hub) == files_of("out")


def test_a_repository_that_others_alone_may_write_is_an_error(project, hub, capfd):
    hub.create("lab/model")
    hub.users[hub.token].orgs = {"lab": "contributor"}
    assert call("export out --push lab/model") == 1
    assert "you don't have write access" in capfd.readouterr().err
    assert len(hub.repos["lab/model"].commits) == 1


def test_the_token_may_be_in_the_librarys_file_and_is_masked_wherever_it_is_said(
    project, hub, capfd, monkeypatch, tmp_path
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
def test_a_token_that_none_can_be_is_an_error_without_it(project, hub, capfd, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert call(PUSH) == 2
    printed = capfd.readouterr()
    assert "characters that no token has" in printed.err
    assert token not in printed.out + printed.err
    assert not hub.requests


@pytest.mark.parametrize(
    "repo",
    [
        "model",
        "me/",
        "/model",
        "models/me/model",
        "me/model/tree/main",
        "https://huggingface.co/me/model",
        "me/my model",
        "me/módel",
        "me/-model",
        "me/model.",
        "me/mo--del",
        "me/mo..del",
        "me/model.git",
        "me/" + "m" * 97,
        "m@e/model",
        "",
    ],
)
def test_a_name_that_no_repository_has_is_an_error_with_a_hint(repo):
    problem = repo_problem(repo)
    assert problem is not None
    assert problem.hint


@pytest.mark.parametrize("repo", ["me/model", "my-lab/Llama-3.2_1B.dpo", "0/1", "_/a_"])
def test_a_name_that_the_library_takes_is_right(repo):
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    assert repo_problem(repo) is None


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        ("export out --push model", ["`model` names no owner"]),
        ("export out --public --dry-run", ["`--public` is about publishing", "`--dry-run` is about publishing"]),
        ("export out --push me/model --merge --dtype float32", ["`--merge` has no effect", "`--dtype` has no effect"]),
        ("export out --push me/model model.name=x", ["`model.name=x` has no effect"]),
        ("export runs/run --push me/model", ["`runs/run` was not written by `dpo export`"]),
        ("export runs/run/final --push me/model", ["`runs/run/final` was not written by `dpo export`"]),
        ("export model --push me/model", ["`model` was not written by `dpo export`"]),
        ("export missing --push me/m--l", ["no repository on the Hub can be called", "there is no folder `missing`"]),
        ("export run.yaml --push me/model", ["`run.yaml` is a file"]),
        ("export runs/run --to new --push me/model --dry-run", ["a dry run lists the files of an export"]),
        ("export runs/run --to out --push me", ["exists already", "`me` names no owner"]),
        ("export out", ["no folder to write is given"]),
    ],
)
def test_a_wrong_command_line_is_told_at_once_and_the_hub_is_not_asked(project, hub, capfd, arguments, errors):
    assert call(arguments) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == len(errors)
    for error in errors:
        assert error in said
    assert not hub.requests


def test_a_new_repository_is_public_if_that_is_asked_for(project, hub, capfd):
    assert call(f"{PUSH} --public") == 0
    assert not hub.repos["me/model"].private
    assert "me/model (public, new)" in capfd.readouterr().out


def test_a_repository_that_is_public_is_not_taken_unasked(project, hub, capfd):
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


def test_a_repository_that_is_private_stays_so(project, hub, capfd):
    hub.create("me/model")
    assert call(f"{PUSH} --public") == 0
    printed = capfd.readouterr()
    assert "me/model (private, exists already)" in printed.out
    assert "stays private" in printed.err
    assert hub.repos["me/model"].private


def test_a_repository_that_became_public_unasked_gets_nothing(project, hub, capfd, monkeypatch):
    create = hub.create
    monkeypatch.setattr(hub, "create", lambda name, private: create(name, private=False))
    assert call(PUSH) == 2
    assert "`me/model` is public" in capfd.readouterr().err
    assert not hub.large
    assert set(hub.content("me/model")) == {".gitattributes"}


def test_of_an_earlier_export_nothing_stays_and_of_its_owner_all(project, hub, capfd):
    hub.page = 3
    hub.create("me/model", {"picture.png": b"of mine", "notes/data.json": b"{}", "LICENSE": b"mine"})
    assert call(f"{PUSH} --quiet") == 0
    assert call("export runs/run --to whole --quiet") == 0
    before = len(hub.repos["me/model"].commits)
    capfd.readouterr()
    assert call("export whole --push me/model") == 0
    printed = capfd.readouterr().out
    assert len(hub.repos["me/model"].commits) == before + 1
    own = {"picture.png": b"of mine", "notes/data.json": b"{}", "LICENSE": b"mine"}
    assert published(hub) == {**files_of("whole"), **own}
    assert re.search(r"removed +model-00001-of-", printed)
    assert re.search(r"removed +model.safetensors.index.json", printed)
    for name in own:
        assert re.search(rf"left alone +{name}", printed)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "adapter_config.json", "pytorch_model.bin", "a.py"]
)
def test_a_repository_with_another_model_is_not_mixed_with_ours(project, hub, capfd, name):
    hub.create("me/model", {name: b"of another program", "README.md": b"theirs"})
    for command in (PUSH, "export runs/run --to new --push me/model"):
        assert call(command) == 2
        assert f"has files of a model that was not published by `dpo export`: `{name}`" in capfd.readouterr().err
    assert len(hub.repos["me/model"].commits) == 2
    assert not Path("new").exists()


@pytest.mark.parametrize("manifest", [b"{}", b"[]", b'{"files": 3}', b'{"files": {"a": 3}}', b"\xff", b"[" * 10**5])
def test_a_manifest_of_another_program_is_replaced(project, hub, manifest):
    hub.create("me/model", {"manifest.json": manifest, "a": b"b"})
    assert call(f"{PUSH} --quiet") == 0
    assert published(hub) == {**files_of("out"), "a": b"b"}


def test_a_card_may_be_completed_here_and_what_arrives_verifies(project, hub, tmp_path):
    card = Path("out/README.md")
    card.write_text(card.read_text(encoding="utf-8") + "\nNot for medical advice.\n", encoding="utf-8")
    assert call(f"{PUSH} --quiet") == 0
    for name, content in published(hub).items():
        (tmp_path / "arrived").mkdir(exist_ok=True)
        (tmp_path / "arrived" / name).write_bytes(content)
    verify(tmp_path / "arrived")
    assert b"medical" in published(hub)["README.md"]
    assert call(f"{PUSH} --quiet") == 0
    assert len(hub.repos["me/model"].commits) == 2, "nothing was left to send"


def test_a_card_that_was_completed_on_the_hub_stays_until_there_is_a_new_one(project, hub, capfd):
    assert call(f"{PUSH} --quiet") == 0
    repo = hub.repos["me/model"]
    edited = Blob(repo.files["README.md"].content + b"\nedited there\n", large=False)
    repo.commit({**repo.files, "README.md": edited})
    capfd.readouterr()
    assert call(PUSH) == 0
    assert re.search(r"left alone +README.md", capfd.readouterr().out)
    assert published(hub)["README.md"] == edited.content
    card = Path("out/README.md")
    card.write_text(card.read_text(encoding="utf-8") + "\nedited here\n", encoding="utf-8")
    assert call(PUSH) == 0
    assert "README.md was edited on the Hub" in capfd.readouterr().err
    assert published(hub)["README.md"] == card.read_bytes()


def test_metadata_that_the_hub_refuses_are_an_error_before_anything_is_sent(project, hub, capfd):
    card = Path("out/README.md")
    card.write_text("---\nlicense: [\n---\n", encoding="utf-8")
    assert call(PUSH) == 1
    assert "checking the metadata of README.md failed" in capfd.readouterr().err
    assert not hub.repos


def test_files_that_the_export_did_not_write_are_not_sent(project, hub, capfd):
    Path("out/notes.txt").write_text("private")
    assert call(PUSH) == 0
    assert "not sent, since the export did not write them: notes.txt" in capfd.readouterr().err
    assert "notes.txt" not in published(hub)


@pytest.mark.parametrize("damage", ["other", "shorter", "gone"])
def test_a_folder_that_is_not_as_it_was_exported_is_not_published(project, hub, capfd, damage):
    file = sorted(Path("out").glob("*.safetensors"))[0]
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + (b"" if damage == "shorter" else bytes([content[-1] ^ 1])))
    assert call(PUSH) == 2
    said = capfd.readouterr().err
    assert "`out` is damaged" in said
    assert file.name in said
    assert not hub.repos


@pytest.mark.parametrize("text", ["{folder}/pairs.jsonl", "{home}/anything", "{token}"])
def test_what_is_of_this_machine_alone_is_not_published(project, hub, capfd, text):
    card = Path("out/README.md")
    said = text.format(folder=project, home=Path.home(), token=hub.token)
    card.write_text(card.read_text(encoding="utf-8") + f"\ntrained on `{said}`\n", encoding="utf-8")
    assert call(PUSH) == 2
    printed = capfd.readouterr().err
    assert "README.md, line" in printed
    assert "names a path of this machine" in printed or "contains a secret" in printed
    assert hub.token not in printed
    assert not hub.repos


def test_large_files_in_parts_are_sent_as_they_are(project, hub):
    hub.part_bytes = 10_000
    assert call(f"{PUSH} --quiet") == 0
    assert published(hub) == files_of("out")


@pytest.mark.parametrize(
    ("pattern", "status", "body", "said"),
    [
        ("repos/create", 403, '{"error": "You have no rights here"}', "You have no rights here"),
        ("preupload", 401, "", "status 401"),
        ("objects/batch", 403, '{"error": "Private repository storage limit reached"}', "storage limit reached"),
        ("PUT /storage", 403, "<Error>expired</Error>", "status 403"),
        ("/commit/", 412, '{"error": "A commit has happened since"}', "was changed meanwhile"),
        ("/commit/", 413, "", "more than the Hub takes"),
        ("/commit/", 500, "<html>", "status 500"),
        ("whoami", 500, "", "status 500"),
        ("whoami", 200, "<html>a gateway</html>", "asking the Hub whose the token is failed"),
        ("tree", 404, '{"error": "gone"}', "gone"),
    ],
)
def test_a_refusal_is_an_error_in_the_hubs_words_and_shows_nothing(project, hub, capfd, pattern, status, body, said):
    fault = hub.fail(pattern, status, body)
    if pattern == "tree":
        hub.create("me/model")
    assert call(PUSH) == 1
    printed = capfd.readouterr()
    assert said in printed.err
    assert printed.err.count("error: ") == 1
    assert SIGNATURE not in printed.err
    assert hub.token not in printed.out + printed.err
    assert "me/model" not in hub.repos or set(hub.content("me/model")) == {".gitattributes"}
    if pattern not in ("whoami", "tree", "repos/create"):
        assert "`dpo export out --push me/model` sends what is missing" in printed.err
    assert fault.times < 10**6
    hub.heal()
    assert call(f"{PUSH} --quiet") == 0
    assert published(hub) == files_of("out")


def test_where_publishing_fails_the_export_stays(project, hub, capfd):
    hub.fail("/commit/", 403, '{"error": "no room"}')
    assert call("export runs/run --to new --push me/model") == 1
    said = capfd.readouterr().err
    assert "the model is in `new`, and `dpo export new --push me/model` sends what is missing" in said
    verify(Path("new"))
    hub.heal()
    hub.received = 0
    assert call("export new --push me/model --quiet") == 0
    assert hub.received == 0, "all large files had arrived"


def test_somebody_who_changes_the_repository_meanwhile_is_not_overwritten(project, hub, capfd, monkeypatch):
    repo = hub.create("me/model")
    held = hub.hold("PUT /storage/", after_bytes=1)

    def change() -> None:
        held.reached.wait()
        repo.commit({**repo.files})
        held.released.set()

    threading.Thread(target=change, daemon=True).start()
    assert call(PUSH) == 1
    assert "the repository was changed meanwhile" in capfd.readouterr().err
    assert set(hub.content("me/model")) == {".gitattributes"}
    assert call(f"{PUSH} --quiet") == 0


def test_a_hub_that_is_silent_is_not_waited_for_for_ever(project, hub, capfd, monkeypatch):
    from dpo_cli.system import hub_repository

    monkeypatch.setattr(hub_repository, "ASKING_SECONDS", 0.2)
    hub.hold("whoami")
    assert call(PUSH) == 1
    assert "asking the Hub whose the token is failed" in capfd.readouterr().err
