"""Real parts that are right, for the targets to change: made once in a process, in a folder of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pkgutil
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.config import Config
from tests.conftest import DEMO_PAIRS, build_llama, write_rows
from tests.data.tiny_tokenizers import tokenizer_of

_held = []


@functools.cache
def home() -> Path:
    """Return the folder of the parts; it is gone when the process ends."""
    _held.append(tempfile.TemporaryDirectory(prefix="fuzz-parts-"))
    return Path(_held[-1].name)


@functools.cache
def rooms() -> None:
    """Import all of the program, and what its rooms import when they work."""
    import dpo_cli

    for module in pkgutil.walk_packages(dpo_cli.__path__, "dpo_cli."):
        # A worker is a process of its own, with packages that need not be installed.
        if not module.name.endswith(("__main__", "_worker")):
            importlib.import_module(module.name)
    import tests.builders  # noqa: F401


@functools.cache
def tokenizer() -> Any:
    """Return a tiny tokenizer with a ChatML template."""
    return tokenizer_of("ChatML")


@functools.cache
def model() -> Path:
    """Return the folder of a tiny random Llama."""
    return build_llama(home() / "model", tokenizer(), seed=0)


@functools.cache
def pairs() -> Path:
    """Return a file of twelve demo pairs."""
    lines = DEMO_PAIRS.read_text(encoding="utf-8").splitlines()[:12]
    return write_rows(home() / "pairs.jsonl", [json.loads(line) for line in lines])


@functools.cache
def prepared() -> Path:
    """Return a folder of prepared pairs."""
    rooms()
    from tests.builders import prepare_pairs

    prepare_pairs(pairs(), tokenizer(), home() / "prepared")
    return home() / "prepared"


@functools.cache
def stopped_run() -> Path:
    """Return a folder with a run that has two checkpoints and no trained model yet, and the cache that it used."""
    rooms()
    folder = home() / "stopped"
    with cache_in(folder / "cache"):
        resume(folder)
    shutil.rmtree(folder / "run" / "final")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000004")
    return folder


def run_config(folder: Path) -> Config:
    """Return the configuration of the run in a folder."""
    return Config.model_validate(
        {
            "model": str(model()),
            "data": {"train": str(pairs()), "eval": 0.2},
            "training": {"pairs_per_step": 4, "epochs": 2, "max_steps": 4, "micro_batch_tokens": 512},
            "checkpoints": {"every_steps": 1, "keep": 3},
            "output_dir": str(folder / "run"),
        }
    )


def resume(folder: Path) -> None:
    """Run what `dpo train --resume` runs, without a word."""
    from dpo_cli import train

    for _ in train(run_config(folder), resume=True):
        pass


@functools.cache
def gguf() -> bytes:
    """Return a GGUF file of a Llama that has a few settings and one tensor."""
    import gguf
    import numpy as np

    path = home() / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "</s>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Let the program keep its cache in a folder."""
    before = os.environ.get("DPO_CACHE_DIR")
    os.environ["DPO_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["DPO_CACHE_DIR"]
        else:
            os.environ["DPO_CACHE_DIR"] = before


def saved_dataset(folder: Path) -> None:
    """Write a folder as `datasets` does of two splits, small enough to be written for every input."""
    split = folder / "train"
    split.mkdir(parents=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}), encoding="utf-8")
    write_rows(split / "data.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    state = {"_data_files": [{"filename": "data.jsonl"}], "_fingerprint": "1", "_split": "train"}
    (split / "state.json").write_text(json.dumps(state), encoding="utf-8")


def resolved(config: Config) -> dict[str, Any]:
    """Return a configuration as its run writes it down."""
    from dpo_cli.config import resolved_yaml

    return dict(yaml.safe_load(resolved_yaml(config)))
