"""Run by `test_sharded`: models that are sharded over 1 to 4 processes are saved, and resumed on other numbers of them.

python -m tests.training.sharded_ranks STAGES

Every stage forks its processes, which find each other through a file. Gradients are made up, the same whatever the
number of processes: what is tried is saving, not computing.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.folders import shard_files
from dpo_cli.modeling.folders.shard_files import gathered
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import OpenReference
from dpo_cli.training.checkpoints import CheckpointWriter
from dpo_cli.training.learner import Learner
from dpo_cli.training.optimizer import AdamW, AdamW8bit, RMSprop, schedule
from dpo_cli.training.state import RunNotes, restore_checkpoint
from dpo_cli.training.together import Together

FINGERPRINTS = {"model": "m", "data": "d", "settings": "s"}
LORA = Lora(rank=2)
OPTIMIZERS = {"adamw": AdamW(), "adamw_8bit": AdamW8bit(), "rmsprop": RMSprop(momentum=0.5)}


def learner_of(model: str, *, adapter: bool, reference: bool, optimizer: str, hybrid: bool) -> Learner:
    accelerator = Accelerator(cpu=True)

    def policy() -> Policy:
        made = Policy.load(model, trained=Adapted(LORA, 3, model) if adapter else None)
        if distributed.is_initialized():
            size = (2, distributed.get_world_size() // 2) if hybrid else (distributed.get_world_size(),)
            mesh = init_device_mesh("cpu", size, mesh_dim_names=("replicate", "shard")[-len(size) :])
            for layer in made.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(made.model, mesh=mesh)
        return made

    trained = policy()
    chosen = OPTIMIZERS[optimizer].over(trained.weights.trained(), 1e-2, 0.1)
    return Learner(
        policy=trained,
        objective=Objective.of(DPO()),
        reference=OpenReference(lambda batch: torch.zeros(len(batch.targets)), policy() if reference else None),
        optimizer=chosen,
        rates=schedule(chosen, "linear", 0.0, 10),
        accelerator=accelerator,
    )


def take(learner: Learner, steps: int) -> None:
    """Take steps with gradients that depend on the step and the weight alone."""
    for _ in range(steps):
        for place, weights in enumerate(learner.policy.weights.trained()):
            generator = torch.Generator().manual_seed(1000 * learner.done + place)
            gradient = torch.randn(weights.shape, generator=generator)
            split = isinstance(weights, DTensor)
            weights.grad = distribute_tensor(gradient, weights.device_mesh, weights.placements) if split else gradient
        learner.optimizer.step()
        learner.rates.step()
        if learner.reference.moving:
            learner.reference.moving.weights.move_towards(learner.policy.weights, 0.5)


def result_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Return all weights and all that the optimizer keeps, whole."""
    found = {name: gathered(weights).clone() for name, weights in learner.policy.weights.tensors().items()}
    for name, weights in learner.policy.weights.moved().items():
        for kind, kept in learner.optimizer.state.get(weights, {}).items():
            if not (isinstance(weights, DTensor) and not isinstance(kept, DTensor) and kept.ndim):
                found[f"{name}.{kind}"] = gathered(kept).clone().contiguous()
    if learner.reference.moving:
        found |= {f"ref.{n}": gathered(one).clone() for n, one in learner.reference.moving.weights.tensors().items()}
    return found


def stage(rank: int, asked: dict[str, Any]) -> None:
    """Begin or resume, save, and go on, and write down what came of it or what was refused."""
    ways = {"adapter": False, "reference": False, "optimizer": "adamw", "hybrid": False}
    learner = learner_of(asked["model"], **{name: asked.get(name, usual) for name, usual in ways.items()})
    tokenizer, out = load_tokenizer(asked["model"]), Path(asked["out"])
    together = Together() if learner.policy.sharded else None
    checkpoints, background = out / "checkpoints", asked.get("background", False)
    writer = CheckpointWriter(checkpoints, tokenizer, 2, background=background, together=together)
    if asked.get("resume"):
        try:
            restore_checkpoint(Path(asked["resume"]), learner)
        except UserError as error:
            (out / f"refused-{rank}.txt").write_text(f"{error.status} {error}")
            return
    else:
        take(learner, 2)
        writer.save(learner, RunNotes(FINGERPRINTS))
        writer.finish()
    take(learner, 2)
    if asked.get("struck") == rank:
        FAULTS[asked["fault"]]()
    try:
        writer.save(learner, RunNotes(FINGERPRINTS))
        writer.finish()
    except UserError as error:
        (out / f"refused-{rank}.txt").write_text(f"{error.status} {error}")
        return
    whole = result_of(learner)
    if rank == 0:
        save_file(whole, out / "result.safetensors")


def limit_files() -> None:
    """Let the system refuse files of more than some bytes, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def end_in_a_write() -> None:
    """End this process without a word when it has written a half of its first file."""

    def struck(tensors: Any, path: Path, *more: Any) -> None:
        path.write_bytes(b"\0" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    shard_files.save_tensors = struck  # type: ignore[attr-defined]


FAULTS = {"limit": limit_files, "kill": end_in_a_write}


def in_processes(num_ranks: int, work: Any, asked: dict[str, Any], meet: Path) -> list[int]:
    """Run some work in forked processes; return how each ended."""
    children = []
    for rank in range(num_ranks):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            if num_ranks > 1:
                # Accelerate looks for an address, and asks nobody there.
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": str(num_ranks)}
                os.environ |= {**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=num_ranks)
            work(rank, asked)
            if num_ranks > 1 and "fault" not in asked:
                distributed.barrier()
                distributed.destroy_process_group()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(stages: str) -> None:
    torch.set_num_threads(1)
    for place, asked in enumerate(json.loads(Path(stages).read_text())):
        Path(asked["out"]).mkdir(parents=True)
        statuses = in_processes(asked["ranks"], stage, asked, Path(asked["out"]) / f"meet-{place}")
        if any(statuses) and "fault" not in asked:
            sys.exit(f"{asked}: {statuses}")


if __name__ == "__main__":
    main(sys.argv[1])
