"""Whether a run that was killed and resumed has the bytes of one that was not: real runs of a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from dpo_cli.doctor.findings import Finding
from dpo_cli.modeling.folders.saving import write_model
from dpo_cli.reporting.row_log import digest_in
from dpo_cli.system import plain_yaml
from dpo_cli.system.storage import file_digest

_STEPS, _EVERY = 12, 3
_KILLED_AT = f"checkpoint of step {_EVERY} saved"
_PATIENCE_SECONDS = 300
_REPORT = "report what was printed, with the versions above; until then do not rely on `--resume` here"
_ROWS = 24
"""Pairs: two epochs of steps of four."""


class RunFailed(Exception):
    """A run ended otherwise than it should."""


def check_resume(device: torch.device) -> Iterator[Finding]:
    """Train once without a break, and once killed and resumed, at the same time; compare what both leave."""
    with tempfile.TemporaryDirectory(prefix="dpo-doctor-") as name:
        folder = Path(name)
        try:
            settings = write_run(folder)
            yield compared(folder, settings)
        except RunFailed as failure:
            yield Finding("resume", "kill and resume", "wrong", f"a run of a tiny model failed: {failure}", _REPORT)


def compared(folder: Path, settings: Path) -> Finding:
    """Make both runs and compare them.

    Raises:
        RunFailed: One of them failed.
    """
    with _started(settings, folder / "whole") as whole:
        with _started(settings, folder / "killed") as killed:
            was_killed = _kill_at(killed, _KILLED_AT)
        said = _finish(whole)
    if not was_killed:
        what = f"the run could not be killed before its end: it ended with status {killed.returncode}"
        return Finding("resume", "kill and resume", "not here", what, "make the check again")
    with _started(settings, folder / "killed", "--resume") as resumed:
        said = _finish(resumed)
    if "resuming after step" not in said:
        raise RunFailed("a killed run was not continued from its checkpoint")
    left, right = _left(folder / "whole"), _left(folder / "killed")
    differing = [what for what, digest in left.items() if digest != right[what]]
    figures = {"steps": _STEPS, "differing": differing}
    if differing:
        what = f"a run that was killed and resumed has other bytes: {', '.join(differing)}"
        return Finding("resume", "kill and resume", "wrong", what, _REPORT, figures)
    what = f"the same weights and metrics, byte for byte, after {_STEPS} steps, killed after step {_EVERY} or not"
    return Finding("resume", "kill and resume", "ok", what, figures=figures)


def write_run(folder: Path, **shape: int) -> Path:
    """Write a tiny random model, or one of another shape, pairs and a configuration; return the configuration."""
    hf_logging.disable_progress_bar()
    model = folder / "model"
    model.mkdir()
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(tokenizer), **{**ends, **tiny, "num_key_value_heads": 2, **shape})
    write_model(model, LlamaForCausalLM(config), tokenizer)
    rows = [
        {"instruction": f"Name number {row}.", "input": "", "chosen": f"{row}.", "rejected": f"It is {row}, I think."}
        for row in range(_ROWS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": {"name": str(model), "chat_template": "plain"},
        "data": {"train": str(folder / "pairs.jsonl"), "eval": None},
        "training": {"pairs_per_step": 4, "learning_rate": 1e-3, "max_steps": _STEPS, "epochs": 2},
        "checkpoints": {"every_steps": _EVERY},
    }
    file = folder / "run.yaml"
    file.write_text(plain_yaml.dump(settings), encoding="utf-8")
    return file


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|end|>"
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([end, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def _started(settings: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    """Start a run with a cache of its own, as a user would."""
    command = [sys.executable, "-m", "dpo_cli", "train", str(settings), f"output_dir={output}", *options]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "DPO_CACHE_DIR": f"{output}-cache", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _kill_at(run: subprocess.Popen[str], line: str) -> bool:
    """Kill a run when it prints a line; tell whether it was killed, and not done."""
    assert run.stderr is not None
    for said in run.stderr:
        if said.startswith(line):
            run.kill()
            break
    run.wait()
    return run.returncode < 0


def _finish(run: subprocess.Popen[str]) -> str:
    """Wait for a run; return what it said.

    Raises:
        RunFailed: It ended with another status than 0, or does not end.
    """
    try:
        _, said = run.communicate(timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        run.kill()
        raise RunFailed(f"it did not end within {_PATIENCE_SECONDS} seconds") from None
    if run.returncode != 0:
        lines = [line for line in said.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error:")] or lines[-1:]
        raise RunFailed(f"status {run.returncode}: {' '.join(told)}")
    return said


def _left(run: Path) -> dict[str, str]:
    """Return a digest of what must be the same of two runs: the weights, and the rows of metrics without the speed."""
    return {"weights": file_digest(run / "final" / "model.safetensors"), "metrics": digest_in(run / "metrics.jsonl")}
