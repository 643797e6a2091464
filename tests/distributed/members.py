"""Runs several trainings one after another in the same ranks, so that a two-rank job pays for its start only once.

    python launch/local.py -n 2 tests/distributed/members.py MEMBERS.json

MEMBERS.json: a list of command lines of train_dpo.py. Ends with the first exit code that is neither 0 nor 75.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dpo
from dpo import layers, numbers, offload
from dpo.session import end_process
from dpo.world import World


def main(path: str) -> int:
    """Run all members; returns the exit code."""
    offload.LEAST_BYTES = 1024
    numbers.LEAST_LOSSES = 3
    layers.BACKEND = "aot_eager"  # of train.compile: all but the making of kernels, which takes a minute
    World.leave = lambda self: None  # DeepSpeed keeps groups for the life of a process, so all members share one
    for argv in json.loads(Path(path).read_text()):
        code = train_dpo.main(argv)
        gc.collect()  # else a later collection, in whatever thread, tears down what is compiled while it is looked up
        torch._dynamo.reset()
        if code not in (0, 75):
            print(f"member failed with {code}: {argv}", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1]))
