"""Run by `test_ranks` in each of several ranks: exchange something with the others and say what was noted of it.

python -m tests.training.exchanging PORT RANKS RANK SCRIPT
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dpo_cli.training.collectives import count_exchanges, exchanges
from tests.waiting import wait_until


def sharded() -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("shard",))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def everything() -> None:
    for model in (sharded(), DistributedDataParallel(nn.Linear(8, 8))):
        for _ in range(2):
            model(torch.ones(3, 8)).sum().backward()
        for weights in model.parameters():
            if hasattr(weights, "full_tensor"):
                weights.full_tensor()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    objects: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(objects, "anything")
    distributed.broadcast_object_list(objects, src=0)
    distributed.barrier()


def waits_in_a_layer() -> None:
    model = sharded()
    model(torch.ones(3, 8))
    threading.Thread(target=model, args=(torch.ones(3, 8),), daemon=True).start()
    wait_until(lambda: exchanges().waits, lambda: "does not wait")


def hangs_in_a_layer() -> None:
    model, reached = sharded(), threading.Event()

    def hang(*_: object) -> None:
        reached.set()
        time.sleep(3600)

    model(torch.ones(3, 8))
    model[0].register_forward_pre_hook(hang, prepend=True)
    threading.Thread(target=model, args=(torch.ones(3, 8),), daemon=True).start()
    assert reached.wait(600)


def main(port: str, num_ranks: str, rank: str, script: str) -> None:
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", int(port), int(num_ranks), rank == "0", timedelta(seconds=600))
    distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=int(num_ranks))
    globals()[script.replace(" ", "_")]()
    # One that hangs has not ended what it began before for as long as the other may take to begin the next.
    store.add("done", 1)
    wait_until(lambda: store.add("done", 0) == int(num_ranks), lambda: "the other is not done")
    wait_until(lambda: len(exchanges().waits) == ("waits" in script), lambda: f"still waits for {exchanges().waits}")
    noted = dataclasses.asdict(exchanges())
    print(json.dumps({**noted, "exchanged": count_exchanges()}), flush=True)
    store.add("said", 1)
    # The first one keeps the store.
    wait_until(lambda: rank != "0" or store.add("said", 0) == int(num_ranks), lambda: "the other says nothing")
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
