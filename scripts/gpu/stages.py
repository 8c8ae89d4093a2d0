"""All stages of the check, those first that say most in their time."""

from __future__ import annotations

import datetime
import platform
import subprocess
from typing import Any

import torch

from dpo_cli.modeling.determinism import gpu_software
from dpo_cli.reporting.environment import versions
from gpu import kernels, program
from gpu.clock import Check, Stage
from gpu.models import SHORT, job


def environment(check: Check) -> None:
    """Say what is measured, where and when."""
    card: dict[str, Any] = {}
    if check.on_cuda:
        free, total = torch.cuda.mem_get_info()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        card = {"card": torch.cuda.get_device_name(), "capability": capability, "free": free, "memory": total}
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=5).stdout.strip() or None
    except OSError:
        commit = None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    software = {**versions(), **gpu_software()}
    check.tell(date=today, commit=commit, dry=check.dry, platform=platform.platform(), **card, versions=software)


SPLIT, FLOAT32 = {"model": {"weights": "split"}}, {"model": {"weights": "float32"}}
LORA = {"adapter": {"type": "lora", "rank": 16}}
SMALL = {**SPLIT, "training": {"optimizer": "adamw_8bit", "gradient_checkpointing": True}}
RECOMPUTED = {"training": {"gradient_checkpointing": True}}
COMPILED = {"training": {"compile": True}}

STAGES = [
    Stage("environment", 20, environment),
    Stage("attention exactness", 110, kernels.attention_exactness),
    Stage("dynamo entries", 60, kernels.dynamo_entries),
    Stage("attention memory", 30, kernels.attention_memory),
    Stage("log-probabilities exactness", 15, kernels.logps_exactness),
    Stage("1B whole, split", 45, job("1B", price=True, **SPLIT)),
    Stage("8B LoRA, recomputed", 60, job("8B", **LORA, **RECOMPUTED)),
    Stage("8B whole, split, 8-bit moments, recomputed", 60, job("8B", **SMALL)),
    Stage("kill and resume", 90, program.resume),
    Stage("beside TRL, 1B LoRA, short", 75, program.beside_trl("lora", "short", dry=True)),
    Stage("beside TRL, 1B whole, long", 75, program.beside_trl(None, "long", dry=False)),
    Stage("1B whole, split, compiled", 75, job("1B", **SPLIT, **COMPILED)),
    Stage("1B whole, float32", 45, job("1B", **FLOAT32)),
    Stage("head speed", 20, kernels.head_speed),
    Stage("attention speed", 20, kernels.attention_speed),
    Stage("1B whole, split, short pairs", 45, job("1B", 32, SHORT, **SPLIT)),
    Stage("beside TRL, 1B whole, short", 60, program.beside_trl(None, "short", dry=False)),
    Stage("beside TRL, 1B LoRA, long", 60, program.beside_trl("lora", "long", dry=False)),
    Stage("1B whole, float32, compiled", 75, job("1B", **FLOAT32, **COMPILED)),
    Stage("doctor", 60, program.doctor),
]
"""In their order."""
