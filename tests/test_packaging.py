"""What is handed out: a source archive from which all can be built and tested, and a wheel that works by itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.program

BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
LEFT = shutil.ignore_patterns(".*", "__pycache__", "models", "runs", "build", "dist", "*.egg-info")


def run(*command: object, cwd: Path, **settings: object) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Both archives, built from a copy of the project."""
    project = tmp_path_factory.mktemp("build") / "project"
    shutil.copytree(ROOT, project, symlinks=True, ignore=LEFT)
    run(sys.executable, "-W", "ignore", "-c", BUILD, cwd=project)
    return project / "dist"


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory) -> Path:
    """What the source archive holds."""
    folder = tmp_path_factory.mktemp("unpacked")
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def test_the_source_archive_holds_all_that_the_project_is(unpacked):
    """Every file of the folders that make up the project, as files: a link would lead nowhere by itself."""
    for name in ("dpo_cli", "configs", "docs", "scripts", "tests"):
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (unpacked / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY"):
        assert (unpacked / f"{name}.md").is_file()
    assert all((unpacked / name).is_file() for name in ("LICENSE", "Makefile", "constraints.txt", "pyproject.toml"))
    assert not [path for path in unpacked.rglob("*") if path.is_symlink() or path.suffix == ".pyc"]


def test_the_tests_of_the_source_archive_run(unpacked):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    tests = ("tests/test_floors.py", "tests/config/test_config.py", "-k", "floor or shipped or schema")
    printed = run(sys.executable, "-m", "pytest", *tests, cwd=unpacked, env=environment)
    assert "100%" in printed


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"dpo_cli"}
    files = [file for file in (ROOT / "dpo_cli").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {str(file.relative_to(ROOT)) for file in files} == {name for name in names if name.startswith("dpo_cli/")}
    assert {file.suffix for file in files} >= {".html", ".css", ".json", ".yaml", ".typed"}


def test_the_wheel_works_where_there_is_nothing_else(dist, tmp_path):
    """Installed into an environment of its own, which takes the packages that it needs from this one."""
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    dpo = tmp_path / "env" / "bin" / "dpo"
    assert str(site) in run(python, "-c", "import dpo_cli; print(dpo_cli.__file__)", cwd=tmp_path)
    assert run(dpo, "config", "example", cwd=tmp_path) == (ROOT / "configs/full.yaml").read_text(encoding="utf-8")
    assert run(dpo, "config", "schema", cwd=tmp_path) == (ROOT / "configs/schema.json").read_text(encoding="utf-8")
    assert "Usage: dpo" in run(dpo, "--help", cwd=tmp_path)
    render = "from dpo_cli.reporting.pages.rendering import render; print(render('base.html'))"
    assert "<!doctype html>" in run(python, "-c", render, cwd=tmp_path)


def test_the_page_of_the_package_has_no_link_that_leads_nowhere_outside_the_repository():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all("://" in target for target in re.findall(r"\]\(([^)]+)\)", readme))
    for name in re.findall(r"`((?:docs/)?[\w/-]+\.md)`", readme):
        assert (ROOT / name).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(url in readme for url in project["urls"].values())
