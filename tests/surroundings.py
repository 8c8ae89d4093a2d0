"""What the tests leave alone: the user's home with its caches, and the checkout."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_FOLDER = "DPO_TESTS_HOME"
_CACHES = ("XDG_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH_HOME", "TORCHINDUCTOR_", "TRITON_", "MPLCONFIGDIR")
_MADE_BY_TOOLS = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".faults", ".fuzz"}


def move_out_of_home() -> None:
    """Give this process, and all that it starts, an empty home; call it before any library looks where its cache is."""
    if os.environ.get(_FOLDER) == os.environ.get("HOME"):
        # A worker of the tests, or a test of tests.
        return
    home, folder, maker = Path.home(), tempfile.mkdtemp(prefix="dpo-tests-home-"), os.getpid()
    for name in list(os.environ):
        if name.startswith(_CACHES):
            del os.environ[name]
    # Whose checkout git trusts is written there.
    os.environ.setdefault("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
    os.environ.update({_FOLDER: folder, "HOME": folder, "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"})

    def remove() -> None:
        if os.getpid() == maker:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def stamped_files(folder: Path) -> dict[str, int]:
    """Return the files below a folder, without those of tools, and when each was changed."""
    found = {}
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _MADE_BY_TOOLS and not name.endswith(".egg-info")]
        for name in files:
            path = Path(above, name)
            found[str(path.relative_to(folder))] = path.lstat().st_mtime_ns
    return found
