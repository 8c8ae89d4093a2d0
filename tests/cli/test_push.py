"""`dpo export --push`: what was exported is published whole and once, and resumed where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpo_cli.config.publishing import repo_problem
from dpo_cli.system.storage import verify
from tests.cli.in_process import call
from tests.conftest import dpo_command
from tests.hub_server import SIGNATURE, Blob, HubServer, User
from tests.publishing import PUSH, READ, files_of, published, run_on, surroundings
from tests.waiting import PATIENCE, wait_until


def weights_bytes(folder: Path | str = "out") -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def test_a_run_is_exported_published_and_loaded_again_by_its_name(exported, hub_server, tmp_path):
    environment = surroundings(hub_server, tmp_path / "home")
    done = run_on("export runs/run --to new --push me/model", environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.index("asking the Hub") < done.stderr.index("loading")
    assert published(hub_server) == files_of("new")
    assert hub_server.repos["me/model"].private
    assert len(hub_server.repos["me/model"].commits) == 2, "one of the Hub's own, one of ours"
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
        assert hub_server.token not in text
    for folder in (exported, tmp_path / "home"):
        assert not [name for name, content in files_of(folder).items() if hub_server.token.encode() in content]


@pytest.mark.slow
def test_what_was_published_is_scored_by_its_name_as_the_folder_is(exported, hub_server, tmp_path):
    environment = surroundings(hub_server, tmp_path / "home")
    assert run_on(PUSH, environment).returncode == 0
    scored = [run_on(f"eval run.yaml --model {name} --json -", environment) for name in ("me/model", "out")]
    there, here = (json.loads(one.stdout) for one in scored)
    assert {**there, "model": None} == {**here, "model": None}
    snapshot = next((tmp_path / "home/hub/models--me--model/snapshots").iterdir())
    for file in Path("out").glob("*.safetensors"):
        assert (snapshot / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_a_push_that_is_stopped_shows_nothing_and_goes_on(exported, hub_server, tmp_path, number):
    first, second, *_ = sorted(Path("out").glob("*.safetensors"))
    digest = hashlib.sha256(second.read_bytes()).hexdigest()
    held = hub_server.hold(f"PUT /storage/{digest}", after_bytes=1)
    environment = surroundings(hub_server, tmp_path / "home")
    with subprocess.Popen(
        dpo_command(*PUSH.split()), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        wait_until(held.reached.is_set, lambda: "the second file is not sent")
        program.send_signal(number)
        said = program.communicate(timeout=PATIENCE)[1]
    assert program.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    hub_server.heal()
    assert set(hub_server.content("me/model")) == {".gitattributes"}, "nothing of the model is seen"
    assert "Traceback" not in said
    if number != signal.SIGKILL:
        assert "`dpo export out --push me/model` sends what is missing" in said
    hub_server.received = 0
    again = run_on(PUSH, environment)
    assert again.returncode == 0, again.stderr
    assert published(hub_server) == files_of("out")
    assert hub_server.received == weights_bytes() - first.stat().st_size, "what had arrived is not sent again"
    assert hub_server.token not in said + again.stdout + again.stderr


def test_a_connection_that_breaks_is_tried_again(exported, hub_server, tmp_path):
    hub_server.cut(r"PUT /storage/", after_bytes=100)
    done = run_on(PUSH, surroundings(hub_server, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert published(hub_server) == files_of("out")
    assert "warning" in done.stderr
    assert SIGNATURE not in done.stderr, "whoever has it may write"


def test_quiet_and_without_a_terminal_only_results_are_printed(exported, hub_server, tmp_path):
    hub_server.fail(r"PUT /storage/", 503, times=1)
    done = run_on(f"{PUSH} --quiet", surroundings(hub_server, tmp_path / "home", HF_HUB_VERBOSITY="debug"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "published " in done.stdout
    assert "\r" not in done.stdout


def test_storage_by_xet_that_refuses_is_an_error(exported, hub_server, tmp_path):
    """Xet is the library's usual way; how it fails is its own, and neither a traceback nor a token."""
    hub_server.fail("xet-write-token", 403, json.dumps({"error": "xet is not for you"}))
    done = run_on(PUSH, surroundings(hub_server, tmp_path / "home", HF_HUB_DISABLE_XET="0"))
    assert done.returncode == 1, done.stderr
    assert hub_server.asked("xet-write-token")
    assert "error: sending model-00001" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub_server.token not in done.stdout + done.stderr
    assert set(hub_server.content("me/model")) == {".gitattributes"}


def test_publishing_imports_no_torch(exported, hub_server, tmp_path):
    code = (
        "import sys; from dpo_cli.cli import main; sys.argv = ['dpo', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *PUSH.split()]
    done = subprocess.run(command, env=surroundings(hub_server, tmp_path / "home"), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_would_be_sent_is_listed_and_a_dry_run_stops_there(exported, hub, capfd):
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
def test_a_dry_run_lists_files_where_the_hub_cannot_be_asked(exported, hub, capfd, monkeypatch, why):
    unreachable(hub, monkeypatch, why)
    capfd.readouterr()
    assert call(f"{PUSH} --dry-run") == 0
    printed = capfd.readouterr()
    assert "model.safetensors.index.json" in printed.out
    assert "was not looked at" in printed.err


@pytest.mark.parametrize("why", ["offline", "down", "no token"])
def test_a_hub_that_cannot_be_asked_is_an_error_before_anything_is_exported(exported, hub, capfd, monkeypatch, why):
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
def test_a_token_that_may_not_write_is_an_error_before_anything_is_exported(exported, hub, capfd, user, repo, said):
    hub.users = {hub.token: user} if user else {READ: User("other")}
    assert call(f"export runs/run --to new --push {repo}") == (1 if user is None else 2)
    printed = capfd.readouterr()
    assert said in printed.err
    assert printed.err.count("error: ") == 1
    assert "loading" not in printed.err
    assert not Path("new").exists()
    assert not hub.repos


@pytest.mark.parametrize("repo", ["me/model", "lab/model"])
def test_a_token_that_may_write_publishes(exported, hub, repo):
    hub.users[hub.token].orgs = {"lab": "write"}
    assert call(f"export out --push {repo} --quiet") == 0
    assert published(hub, repo) == files_of("out")


def test_a_token_for_certain_purposes_publishes_where_it_may(exported, hub):
    hub.users = {hub.token: User("me", "fineGrained", scopes=WRITES)}
    assert call(f"{PUSH} --quiet") == 0
    assert published(hub) == files_of("out")


def test_a_repository_that_others_alone_may_write_is_an_error(exported, hub, capfd):
    hub.create("lab/model")
    hub.users[hub.token].orgs = {"lab": "contributor"}
    assert call("export out --push lab/model") == 1
    assert "you don't have write access" in capfd.readouterr().err
    assert len(hub.repos["lab/model"].commits) == 1


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
def test_a_wrong_command_line_is_told_at_once_and_the_hub_is_not_asked(exported, hub, capfd, arguments, errors):
    assert call(arguments) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == len(errors)
    for error in errors:
        assert error in said
    assert not hub.requests


def test_a_new_repository_is_public_if_that_is_asked_for(exported, hub, capfd):
    assert call(f"{PUSH} --public") == 0
    assert not hub.repos["me/model"].private
    assert "me/model (public, new)" in capfd.readouterr().out


def test_a_repository_that_is_private_stays_so(exported, hub, capfd):
    hub.create("me/model")
    assert call(f"{PUSH} --public") == 0
    printed = capfd.readouterr()
    assert "me/model (private, exists already)" in printed.out
    assert "stays private" in printed.err
    assert hub.repos["me/model"].private


def test_of_an_earlier_export_nothing_stays_and_of_its_owner_all(exported, hub, capfd):
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
def test_a_repository_with_another_model_is_not_mixed_with_ours(exported, hub, capfd, name):
    hub.create("me/model", {name: b"of another program", "README.md": b"theirs"})
    for command in (PUSH, "export runs/run --to new --push me/model"):
        assert call(command) == 2
        assert f"has files of a model that was not published by `dpo export`: `{name}`" in capfd.readouterr().err
    assert len(hub.repos["me/model"].commits) == 2
    assert not Path("new").exists()


@pytest.mark.parametrize("manifest", [b"{}", b"[]", b'{"files": 3}', b'{"files": {"a": 3}}', b"\xff", b"[" * 10**5])
def test_a_manifest_of_another_program_is_replaced(exported, hub, manifest):
    hub.create("me/model", {"manifest.json": manifest, "a": b"b"})
    assert call(f"{PUSH} --quiet") == 0
    assert published(hub) == {**files_of("out"), "a": b"b"}


def test_a_card_may_be_completed_here_and_what_arrives_verifies(exported, hub, tmp_path):
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


def test_a_card_that_was_completed_on_the_hub_stays_until_there_is_a_new_one(exported, hub, capfd):
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


def test_metadata_that_the_hub_refuses_are_an_error_before_anything_is_sent(exported, hub, capfd):
    card = Path("out/README.md")
    card.write_text("---\nlicense: [\n---\n", encoding="utf-8")
    assert call(PUSH) == 1
    assert "checking the metadata of README.md failed" in capfd.readouterr().err
    assert not hub.repos


def test_files_that_the_export_did_not_write_are_not_sent(exported, hub, capfd):
    Path("out/notes.txt").write_text("private")
    assert call(PUSH) == 0
    assert "not sent, since the export did not write them: notes.txt" in capfd.readouterr().err
    assert "notes.txt" not in published(hub)


@pytest.mark.parametrize("damage", ["other", "shorter", "gone"])
def test_a_folder_that_is_not_as_it_was_exported_is_not_published(exported, hub, capfd, damage):
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


def test_large_files_in_parts_are_sent_as_they_are(exported, hub):
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
def test_a_refusal_is_an_error_in_the_hubs_words_and_shows_nothing(exported, hub, capfd, pattern, status, body, said):
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


def test_a_commit_whose_answer_is_lost_is_not_made_twice(exported, hub, capfd):
    hub.lose("/commit/")
    assert call(PUSH) == 1
    assert "publishing what was sent failed" in capfd.readouterr().err
    assert call(PUSH) == 0
    assert "nothing is left to send" in capfd.readouterr().out
    assert len(hub.repos["me/model"].commits) == 2
    assert published(hub) == files_of("out")


def test_a_repository_that_ignores_files_gets_no_part_of_a_model(exported, hub, capfd):
    hub.create("me/model", {".gitignore": b"*.safetensors"})
    assert call(PUSH) == 1
    assert ".gitignore" in capfd.readouterr().err
    assert set(hub.content("me/model")) == {".gitattributes", ".gitignore"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "form"), [("null", "--gguf f16"), ("lora", "--merge"), ("null", "--dtype bfloat16")]
)
def test_every_form_is_published_without_a_path_of_this_machine(exported, hub, adapter, form):
    settings = f"adapter={adapter} output_dir={exported}/run model.name={exported}/model"
    assert call(f"train run.yaml {settings} data.train={exported}/pairs.jsonl --quiet") == 0
    assert call(f"export run {form} --to {exported}/form --push me/model --quiet") == 0
    assert published(hub) == files_of("form")
    for name, content in published(hub).items():
        assert str(exported).encode() not in content, name


@pytest.mark.slow
def test_an_adapter_whose_base_nobody_else_has_is_not_published(exported, hub, capfd):
    assert call("train run.yaml adapter=lora output_dir=runs/adapter --quiet") == 0
    assert call("export runs/adapter --to adapter --quiet") == 0
    capfd.readouterr()
    for command in ("export runs/adapter --to new --push me/model", "export adapter --push me/model"):
        assert call(command) == 2
        said = capfd.readouterr().err
        assert "which nobody else has" in said
        assert "--merge" in said
    assert not hub.requests


def test_where_publishing_fails_the_export_stays(exported, hub, capfd):
    hub.fail("/commit/", 403, '{"error": "no room"}')
    assert call("export runs/run --to new --push me/model") == 1
    said = capfd.readouterr().err
    assert "the model is in `new`, and `dpo export new --push me/model` sends what is missing" in said
    verify(Path("new"))
    hub.heal()
    hub.received = 0
    assert call("export new --push me/model --quiet") == 0
    assert hub.received == 0, "all large files had arrived"


def test_somebody_who_changes_the_repository_meanwhile_is_not_overwritten(exported, hub, capfd, monkeypatch):
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


def test_a_hub_that_is_silent_is_not_waited_for_for_ever(exported, hub, capfd, monkeypatch):
    from dpo_cli.system import hub_repository

    monkeypatch.setattr(hub_repository, "ASKING_SECONDS", 0.2)
    hub.hold("whoami")
    assert call(PUSH) == 1
    assert "asking the Hub whose the token is failed" in capfd.readouterr().err
