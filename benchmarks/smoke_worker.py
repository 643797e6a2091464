"""The process of the GPU suite that touches the device: does one task after another and writes a line about each.

    python -m benchmarks.smoke_worker TASKS.json EVENTS.jsonl

Events: {"event": "facts", ...} once, then {"event": "begin" | "end", "name": ..., ...} for each task. If this process
dies, its parent knows by the last event which task it was and starts another process for the rest.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import runpy
import sys
import traceback
import warnings
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.cuda.nccl

from benchmarks import attention_check
from benchmarks.random_model import Shape, describe, write_model, write_pairs
from benchmarks.smoke_plan import (
    EQUAL_PAIRS,
    ROOT,
    SIZES,
    SYNC_SIGN,
    TIMED_STEPS,
)
from dpo.world import World

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "triton", "safetensors", "numpy")
STOPPED = 75


def main(tasks_path: str, events_path: str) -> int:
    """Do all tasks; each writes its events at once."""
    World.leave = lambda self: None  # DeepSpeed keeps groups for the life of a process, so all members share one
    job = json.loads(Path(tasks_path).read_text())
    with open(events_path, "a") as events:

        def write(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        if job["device"] == "cuda" and not torch.cuda.is_available():
            write({"event": "refused", "reason": f"--device cuda: torch {torch.__version__} sees no GPU here"})
            return 2
        write({"event": "facts", **facts(job["device"])})
        for task in job["tasks"]:
            write({"event": "begin", "name": task["name"]})
            write({"event": "end", "name": task["name"], **_attempt(task, job)})
    return 0


def facts(device: str) -> dict[str, Any]:
    """What the numbers depend on: device, driver, versions."""
    hardware: dict[str, Any] = {
        "device": device,
        "device_name": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        hardware |= {"device_name": card.name, "memory_gib": card.total_memory / 2**30}
        hardware |= {"multiprocessors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}"}
    versions: dict[str, Any] = {name: _version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda, "torch": torch.__version__}
    versions["cudnn"] = torch.backends.cudnn.version() if device == "cuda" else None
    versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else None
    return {"hardware": hardware, "versions": versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _attempt(task: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The task's result, with `error` where it failed."""
    try:
        return {"build": _build, "attention": _attention, "train": _train}[task["kind"]](task, job)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def _build(task: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Write models and pairs: fp32 weights for equality, weights in the dtype of compute for timing."""
    size, folder = SIZES[job["size"]], Path(job["folder"])
    timed_dtype = torch.bfloat16 if job["device"] == "cuda" else torch.float32
    built: dict[str, Any] = {}

    def build(name: str, shape: Shape, dtype: torch.dtype, num_pairs: int) -> None:
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        write_model(target / "model", shape, dtype, job["device"])
        pairs = size.equal_pairs if name == "equal" else size.timed_pairs
        sums = write_pairs(target / "train.jsonl", num_pairs, pairs, shape.vocabulary)
        built[name] = {"model": describe(shape), "pairs": asdict(pairs), "sums": asdict(sums)}

    build("equal", size.equal, torch.float32, EQUAL_PAIRS)
    build("timed", size.timed, timed_dtype, TIMED_STEPS * size.timed_pairs_per_step)
    return {"built": built}


def _attention(task: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Every case in fp32 and, on a GPU, in bf16 through the variable-length kernel."""
    device = torch.device(job["device"])
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    results = {}
    for dtype in dtypes:
        for case in attention_check.CASES:
            name = f"{str(dtype).removeprefix('torch.')}/{case.name}"
            try:
                results[name] = attention_check.check(case, device, dtype)
            except RuntimeError as error:
                results[name] = {"passed": False, "error": " ".join(str(error).split())[:400]}
    documents = {"packed": attention_check.PACKED, "shared": attention_check.SHARED}
    tolerances = {str(dtype).removeprefix("torch."): value for dtype, value in attention_check.TOLERANCE.items()}
    return {"cases": results, "tolerances": tolerances, "documents": documents}


def _train(task: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Run the task's command lines of train_dpo.py in this process."""
    on_gpu = job["device"] == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train = runpy.run_path(str(ROOT / "train_dpo.py"))["main"]
    if task["counts_syncs"]:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
    codes = []
    for command in task["commands"]:
        codes.append(train(list(command)))
        gc.collect()  # the last engine's weights, and its hold on how models are loaded (ZeRO-3)
    if task["counts_syncs"]:
        torch.cuda.set_sync_debug_mode("default")
    expected = [STOPPED] * (len(codes) - 1) + [0]
    if codes != expected:
        return {"error": f"exit codes {codes}, expected {expected}: {_reason(Path(task['run_dir']))}"}
    log = Path(task["run_dir"]) / "logs" / "rank-00000.log"
    return {"syncs": log.read_text().count(SYNC_SIGN)} if task["counts_syncs"] else {}


def _reason(run_dir: Path) -> str:
    status = run_dir / "status.json"
    return json.loads(status.read_text())["reason"] if status.is_file() else "no status.json"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
