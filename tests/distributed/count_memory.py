"""Counts the bytes of all tensors that are alive when a step's gradients are there, under real engines.

    python launch/local.py -n 2 tests/distributed/count_memory.py COMMANDS.json

COMMANDS.json: command lines of train_dpo.py; each leaves bytes-RANK.json in its run directory. Also what
`dpo.estimate` says for the same config and ranks.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dpo.config import parse_config
from dpo.estimate import Setup, memory
from dpo.run import Run
from dpo.session import end_process, session
from dpo.shapes import count_shapes
from dpo.world import World


def alive() -> dict[int, torch.UntypedStorage]:
    """The storage behind every tensor that Python knows of, by its address; their gradients too."""
    storages: dict[int, torch.UntypedStorage] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu":
                local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage()
    return {address: storage for address, storage in storages.items() if storage.nbytes() >= 1024}


def count(run: Run, before: dict[int, torch.UntypedStorage]) -> bool:
    """One step without its update, then the count."""
    gc.collect()
    (step, *_) = run.steps(run.resume())
    for batch in step.micro_batches:
        run.reference.logps(batch)
        run.engine.backward(run.engine.forward(batch)[0].sum(), last=False)
    gc.collect()
    build = run.parts
    ds_json = (
        None if run.config.parallel.ds_config is None else json.loads(Path(run.config.parallel.ds_config).read_text())
    )
    setup = Setup.of(run.config, run.world.size, build.dtype.itemsize, ds_json)
    device, host = memory(setup, count_shapes(run.config, build.dtype))
    counted = sum(storage.nbytes() for address, storage in alive().items() if address not in before)
    facts = {"counted": counted, "device": device, "host": host}
    (Path(run.config.run.dir) / f"bytes-{run.world.rank}.json").write_text(json.dumps(facts))
    return False


def main(path: str) -> int:
    """Count for every command line; returns the first exit code that is not that of a stop."""
    World.leave = lambda self: None
    for argv in json.loads(Path(path).read_text()):
        gc.collect()
        before = alive()  # DeepSpeed keeps parts of an engine for the life of a process
        code = session(parse_config(argv), partial(count, before=before))
        if code != 75:
            return code
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1]))
