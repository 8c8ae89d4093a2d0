"""Pack what a machine with a GPU, Python 3.12 and torch, but no network, lacks to run the check: into `.gpu/`.

    make gpu-kit
    make gpu-kit GPU_KIT='--without pyarrow bitsandbytes'      what is there already, or may be missing

Wheels of the versions in constraints.txt, and the demo's tokenizer. The checkout itself travels as it is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from dpo_cli.modeling.folders.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".gpu"
PYTHON = "3.12"
NEEDED = (
    "accelerate", "annotated-doc", "annotated-types", "bitsandbytes", "datasets", "dill", "filelock",
    "huggingface_hub", "multiprocess", "packaging", "peft", "psutil", "pyarrow", "pydantic", "pydantic_core", "PyYAML",
    "RapidFuzz", "rich", "safetensors", "shellingham", "tokenizers", "transformers", "trl", "typer",
    "typing-inspection", "xxhash",
)  # fmt: skip
"""What the check imports beside torch and what comes with it, each without its dependencies."""
PLATFORMS = (
    "manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
    "manylinux2014_x86_64", "manylinux_2_12_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
)  # fmt: skip
MOST_BYTES = 64 * 2**20


def main() -> int:
    """Fetch the wheels, write the tokenizer, and say what the kit weighs."""
    without = {name.lower() for name in sys.argv[1:] if name != "--without"}
    if unknown := without - set(map(str.lower, NEEDED)):
        sys.exit(f"error: not in the kit: {', '.join(sorted(unknown))}")
    wheels = KIT / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    names = [name for name in NEEDED if name.lower() not in without]
    subprocess.run(download(names, wheels), check=True)
    load_tokenizer(str(next((ROOT / "models").glob("*.gguf")))).save_pretrained(KIT / "tokenizer")
    total = sum(file.stat().st_size for file in KIT.rglob("*") if file.is_file() and "results" not in file.parts)
    print(f"{KIT.name}: {len(list(wheels.glob('*.whl')))} wheels, {total / 2**20:.0f} MiB in all")
    if total > MOST_BYTES:
        largest = sorted(wheels.glob("*.whl"), key=lambda file: -file.stat().st_size)[:3]
        sizes = ", ".join(f"{file.name.partition('-')[0]} {file.stat().st_size / 2**20:.0f}" for file in largest)
        print(f"more than {MOST_BYTES / 2**20:.0f} MiB; the largest: {sizes}; `--without` leaves out what is there")
    return 0


def download(names: list[str], folder: Path) -> list[str]:
    """Return the command that fetches wheels, in the versions that the tests ran with, for the other machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return [*command, *(pinned(name) for name in names)]


def pinned(name: str) -> str:
    """Return a package with its version in constraints.txt, however its name is spelt there."""
    spelt = re.escape(name).replace("_", "[-_]").replace(r"\-", "[-_]")
    found = re.search(
        rf"^{spelt}==\S+?(?=;|\s|$)", (ROOT / "constraints.txt").read_text(), re.MULTILINE | re.IGNORECASE
    )
    return found[0] if found else name


if __name__ == "__main__":
    sys.exit(main())
