"""Which names are asked for on the Hub, and what becomes of a run where it cannot be reached."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_cli.data.pairs.sources import Source, as_sources, check_source
from dpo_cli.modeling.folders.model_names import check_model
from tests.builders import save_adapter
from tests.conftest import dpo_command
from tests.waiting import PATIENCE

pytestmark = pytest.mark.program

NOT_ON_THE_HUB = ["./some/name", "./name", "../name", "/name", "~/name", "~name", ".name/other", "here/name"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NOT_ON_THE_HUB)
def test_what_looks_like_a_path_is_never_asked_for(folder, name):
    assert f"no model folder `{name}`" in check_model(name).what
    (source,) = as_sources(name)
    assert f"no file or folder `{name}`" in check_source(source).what


def test_a_name_that_begins_with_a_folder_says_so(folder):
    for problem in (check_model("here/name"), check_source(Source(path="here/name"))):
        assert "`here` is a local folder" in problem.hint
    assert check_model("there/name") is None
    assert check_source(Source(path="there/name")) is None


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub that has nothing, or breaks."""

    status = 404
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    """Serve a Hub of its own on this machine."""
    kind = type("OwnHub", (Hub,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kind.address = f"http://127.0.0.1:{server.server_port}"
        yield kind
        server.shutdown()


SITE = """
import time
real = time.sleep
def sleep(seconds):
    with open({file!r}, "a") as file:
        file.write(f"{{seconds}}\\n")
    real(seconds)
time.sleep = sleep
"""
"""Writes down how long a program sleeps, which a slow machine does not change: before it tries again, say."""


@pytest.fixture
def slept(tmp_path) -> Path:
    """Return the file that `run` writes all sleeps of a program into."""
    file = tmp_path / "site" / "slept"
    file.parent.mkdir()
    file.touch()
    (file.parent / "sitecustomize.py").write_text(SITE.format(file=str(file)))
    return file


def run(*arguments: object, address: str, cache: Path, slept: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program where the Hub stands at an address; no proxy is asked for it."""
    told = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    told |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(cache)}
    if slept:
        told["PYTHONPATH"] = os.pathsep.join(filter(None, [str(slept.parent), told.get("PYTHONPATH")]))
    return subprocess.run(
        dpo_command(*arguments), env=told, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "model.name=some/name"),
        ("train", "reference.model=some/name"),
        ("train", "data.eval=some/name"),
        ("prepare-data", "data.train=some/name"),
        ("eval", "--model", "some/name"),
        ("eval", "--model", "some/name", "--data", "other/name"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("there", [True, False], ids=["it has none", "it is not there"])
def test_what_is_not_available_is_an_error_at_once(write_config, tmp_path, hub, slept, arguments, there):
    address = hub.address if there else "http://127.0.0.1:9"
    command, *rest = arguments
    result = run(command, "--config", write_config(), *rest, address=address, cache=tmp_path / "hf", slept=slept)
    assert result.returncode == 2, result.stderr
    assert "`some/name` cannot be loaded" in result.stderr
    assert "Retrying" not in result.stderr
    assert "prepar" not in result.stderr.replace("prepare-data", "")
    assert sum(map(float, slept.read_text().split())) < 1
    if there:
        assert len([path for path in hub.asked if "some/name" in path]) == 1
        assert result.stderr.count("error: ") == 1 + ("other/name" in arguments)
    assert not (tmp_path / "runs").exists()


def test_a_model_in_the_hubs_cache_is_used_where_the_hub_cannot_be_reached(write_config, tmp_path, tiny_llama):
    cached = tmp_path / "hf/hub/models--some--body"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    shutil.copytree(tiny_llama, cached / "snapshots/abc")
    file = write_config(training={"max_steps": 1})
    result = run("train", "--config", file, "model.name=some/body", address="http://127.0.0.1:9", cache=tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the Hub cannot be reached") == 1
    assert "Retrying" not in result.stderr
    assert json.loads((tmp_path / "runs/run/final/config.json").read_text())["model_type"] == "llama"


@pytest.fixture
def cached_adapter(tmp_path, tiny_llama) -> Path:
    """Lay an adapter into a Hub's cache as `some/adapter`; return the cache."""
    cached = tmp_path / "hf/hub/models--some--adapter"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    save_adapter(tiny_llama, cached / "snapshots/abc", rank=3, target_modules=["q_proj", "v_proj"])
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (["adapter.start=some/adapter"], "adapter_model.safetensors"),
        (["model.name=some/adapter"], "model.safetensors"),
    ],
)
def test_an_adapter_in_the_hubs_cache_is_used_as_a_folder_is(write_config, tmp_path, cached_adapter, settings, left):
    """Training goes on from it, or trains all weights of its base with it merged; the run keeps its id, and resumes."""
    told = {"address": "http://127.0.0.1:9", "cache": cached_adapter}
    file = write_config(training={"max_steps": 1})
    result = run("train", "--config", file, *settings, **told)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/run/final" / left).is_file()
    resolved = (tmp_path / "runs/run/config.yaml").read_text()
    assert "some/adapter" in resolved
    assert str(cached_adapter) not in resolved
    again = run("train", "--config", tmp_path / "runs/run/config.yaml", "--resume", **told)
    assert "is finished" in again.stderr, again.stderr


def test_an_adapter_in_the_hubs_cache_is_scored(write_config, tmp_path, cached_adapter, tiny_llama):
    told = {"address": "http://127.0.0.1:9", "cache": cached_adapter}
    names = ["some/adapter", cached_adapter / "hub/models--some--adapter/snapshots/abc"]
    by_id, by_path = (run("eval", "--config", write_config(), "--model", name, "--json", "-", **told) for name in names)
    assert by_id.returncode == 0, by_id.stderr
    found, same = json.loads(by_id.stdout), json.loads(by_path.stdout)
    assert (found.pop("model"), found["base"]) == ("some/adapter", str(tiny_llama))
    assert {**same, "model": None} == {**found, "model": None}


class HubWithAdapter(Hub):
    """A Hub that has one adapter, whose files are in a folder."""

    folder: Path
    sha = "a" * 40

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = self.folder / path.rpartition("/")[2]
        if path.startswith("/api/models/some/adapter"):
            files = [
                {"type": "file", "path": one.name, "oid": "0", "size": one.stat().st_size}
                for one in self.folder.iterdir()
            ]
            siblings = [{"rfilename": one["path"]} for one in files]
            body = json.dumps(
                files if "/tree/" in path else {"id": "some/adapter", "sha": self.sha, "siblings": siblings}
            )
            self._answer(body.encode())
        elif path.startswith("/some/adapter/resolve/") and file.is_file():
            self._answer(file.read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if path.startswith("/some/adapter/") else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        for name, value in (
            ("X-Repo-Commit", self.sha),
            ("ETag", f'"{hash(body)}"'),
            ("Content-Length", str(len(body))),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.mark.parametrize("setting", ["adapter.start", "model.name"])
def test_an_adapter_is_downloaded_where_the_hub_has_it(write_config, tmp_path, tiny_llama, setting):
    own = save_adapter(tiny_llama, tmp_path / "served", rank=3, target_modules=["q_proj", "v_proj"])
    kind = type("Serving", (HubWithAdapter,), {"folder": own, "asked": []})
    file, cache = write_config(), tmp_path / "hf"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        result = run("train", "--config", file, "--dry-run", f"{setting}=some/adapter", address=address, cache=cache)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    known = cache / f"hub/models--some--adapter/snapshots/{HubWithAdapter.sha}"
    assert (known / "adapter_model.safetensors").read_bytes() == (own / "adapter_model.safetensors").read_bytes()
    assert not (known / "README.md").exists()


@pytest.mark.parametrize("there", [True, False], ids=["it has none", "it is not there"])
def test_a_start_that_the_hub_has_not_is_one_error(write_config, tmp_path, hub, there):
    address = hub.address if there else "http://127.0.0.1:9"
    result = run("train", "--config", write_config(), "adapter.start=some/name", address=address, cache=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "`some/name` cannot be loaded" in result.stderr
    assert "`adapter.start`" in result.stderr


def test_an_adapter_of_the_hub_is_no_model_beside_which_another_trains(write_config, cached_adapter):
    told = {"address": "http://127.0.0.1:9", "cache": cached_adapter}
    result = run("train", "--config", write_config(), "model.name=some/adapter", "adapter=lora", **told)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "`adapter.start: some/adapter`" in result.stderr


def test_a_hub_that_is_broken_is_one_that_cannot_be_reached(write_config, tmp_path, hub):
    hub.status = 503
    result = run("train", "--config", write_config(), "model.name=some/body", address=hub.address, cache=tmp_path)
    assert result.returncode == 2
    assert "the Hub cannot be reached (status 503)" in result.stderr


def test_nothing_heavy_is_needed_to_ask(tmp_path):
    look = "import sys; from dpo_cli.system.hub import look_up; look_up('model', 'some/name', 'here'); "
    heavy = "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", look + heavy], capture_output=True, text=True, check=False)
    assert ended.stdout == "[]\n", ended.stderr
