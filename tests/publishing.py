"""An exported model, and a Hub on this machine to publish it on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer, serving
from tests.waiting import PATIENCE

PUSH = "export out --push me/model"
READ = "hf_" + "rEad0" * 7
"""A token."""


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory, tiny_llama, demo_rows) -> Path:
    """A folder with a finished run, and `out`, its model as it was exported: in several files, and with a card."""
    from tests.cli.in_process import call
    from tests.conftest import make_config, write_rows

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
def exported(tmp_path, monkeypatch, exported_once) -> Path:
    """A copy of it, in which the test is."""
    folder = tmp_path / "project"
    shutil.copytree(exported_once, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path) -> HubServer:
    """A Hub that this process publishes on, where a token that may write is in the environment."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from dpo_cli.reporting import secrets

    for name in list(os.environ):
        if "proxy" in name.lower():
            monkeypatch.delenv(name)
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.address)
    template = f"{hub_server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    monkeypatch.setattr(secrets, "_known", set())
    return hub_server


def published(hub: HubServer, repo: str = "me/model") -> dict[str, bytes]:
    """Return what a repository has, but for the file that the Hub makes itself."""
    return {name: content for name, content in hub.content(repo).items() if name != ".gitattributes"}


def surroundings(server: HubServer, home: Path, **settings: str) -> dict[str, str]:
    """Return the environment of a program that publishes on a Hub; no proxy is asked for it."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    told = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **told, "HF_TOKEN": server.token, **settings}


def run_on(arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dpo_cli", *arguments.split()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def files_of(folder: Path | str) -> dict[str, bytes]:
    """Return the content of all files of a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }
