"""What a GPU does with DPO: our trainer and TRL's on random models of real sizes, in calls of less than ten minutes.

    benchmarks/gpu.sh                                    all settings that fit the budget, record in benchmarks/records
    benchmarks/gpu.sh --only '^1b/lora'                  some of them
    benchmarks/gpu.sh --device cpu --size tiny --record FILE.json

Needs no network. Every setting is a process of its own: steps of 64 pairs with the lengths of HH, three to warm up,
then three times ten seconds. TRL must begin with the same loss. The record is rewritten after every setting. Exit code:
0 all that ran are sound, 1 one failed or began otherwise, 2 it cannot start.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.compare_case import PINNED, TINY, Case, CaseSize, case_of_lengths, load_case
from benchmarks.compare_plan import ROOT, Side
from benchmarks.compare_run import Failed, Worker
from benchmarks.random_model import EIGHT_B, ONE_B
from benchmarks.record import cpu_name, driver, git, write_record
from benchmarks.smoke_plan import PEAK_BF16_FLOPS, flops_per_pair

RECORDS = ROOT / "benchmarks" / "records"
WARM_UP, REPEATS = 3, 3
STEADY_S = {"real": 10.0, "tiny": 0.5}
STEPS = 100_000
"""Planned, so that the learning rate hardly moves; nobody takes them all."""
SAME_LOSS = {"cuda": 2e-2, "cpu": 2e-5}
"""Nats between our loss and TRL's in the first two steps: bf16 on a GPU, fp32 on a CPU."""
MFU_NOTE = (
    "mfu = pairs per second x model FLOPs per pair / dense bf16 peak of the card. Model FLOPs: 6 per trained and 4 per "
    "frozen weight and token with each prompt once, the head at scored tokens only; attention scores, padding, prompts "
    "computed twice, recomputing and the reference are no model FLOPs, whoever spends them."
)
CPU_NOTE = "A run on a CPU: it shows that the benchmark works, and says nothing about any GPU."


@dataclass(frozen=True, slots=True)
class Setting:
    """One trainer on one model.

    Attributes:
        model: key of the sizes.
        name: after the model and mode.
        side: the trainer; its folder and device are filled in.
        goal: MFU of PERFORMANCE goals, where there is one.
    """

    model: str
    name: str
    side: Side
    goal: float | None = None

    @property
    def title(self) -> str:
        """Such as 1b/lora/ours."""
        return f"{self.model}/{self.side.mode}/{self.name}"


def _side(name: str, mode: str, **choices: Any) -> Side:
    return Side(name, mode, STEPS, "", layout="shared", tokens_per_micro_batch=16_384, **choices)


def _settings(model: str, mode: str, goal: float, *, with_compiled: bool) -> list[Setting]:
    compiled = _side("ours", mode, reference="stored-warm", flags=("--train.compile", "true"))
    return [
        Setting(model, "ours", _side("ours", mode, reference="stored-warm"), goal),
        Setting(model, "ours_live_reference", _side("ours", mode)),
        Setting(model, "trl-default", _side("trl-default", mode)),
        Setting(model, "trl-tuned", _side("trl-tuned", mode, micro_batch=16)),
        *([Setting(model, "ours_compiled", compiled, goal)] if with_compiled else []),
    ]


def settings(size: str) -> list[Setting]:
    """All settings, the important ones first; those of a model follow each other, since it is made once."""
    if size == "tiny":
        return _settings("tiny", "lora", 0.0, with_compiled=False)
    return [
        *_settings("8b", "lora", 0.45, with_compiled=True),
        *_settings("1b", "full", 0.40, with_compiled=True),
        *_settings("1b", "lora", 0.40, with_compiled=False),
    ]


def case_size(model: str, device: str) -> CaseSize:
    """The sizes of a model's case."""
    if model == "tiny":
        return TINY
    shape = {"8b": EIGHT_B, "1b": ONE_B}[model]
    return replace(PINNED, shape=shape, tokenized=64, dtype="bfloat16", device=device)


def main(argv: list[str] | None = None) -> int:
    """Measure what is wanted; returns the exit code."""
    options = _options(argv)
    wanted = [setting for setting in settings(options.size) if re.search(options.only, setting.title)]
    if not wanted:
        print(f"error: --only {options.only!r}: no setting has such a name", file=sys.stderr)
        return 2
    if options.device == "cuda" and not _card():
        print("error: no GPU here: give --device cpu --size tiny to try the benchmark itself", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="dpo-gpu-") as folder:
        return Benchmark(options, Path(folder), sys.argv[1:] if argv is None else argv).run(wanted)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(STEADY_S), default="real", help="tiny: for anything")
    parser.add_argument("--record", type=Path, help="file to write (default: a dated one in benchmarks/records)")
    parser.add_argument("--budget_s", type=float, default=570.0, help="seconds; what is left then is 'not run'")
    parser.add_argument("--only", default="", help="regular expression that a setting's name must contain")
    options = parser.parse_args(argv)
    if options.device == "cpu" and (options.record is None or RECORDS in options.record.resolve().parents):
        parser.error(f"--device cpu needs --record FILE outside {RECORDS.relative_to(ROOT)}: it is no record of a GPU")
    return options


def _card() -> str | None:
    """The GPU's name, without a context on it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _build(folder: str, model: str, device: str) -> None:
    """In a process of its own, which gives the GPU's memory back."""
    case_of_lengths(Path(folder), case_size(model, device), "hh", seed=0)


class Benchmark:
    """The record that grows."""

    def __init__(self, options: argparse.Namespace, folder: Path, argv: Sequence[str]) -> None:
        self.options, self.folder, self.since = options, folder, time.monotonic()
        now = datetime.now(UTC)
        self.card = _card() if options.device == "cuda" else None
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.card or "cpu").strip("-").lower()
        self.path: Path = options.record or RECORDS / f"gpu-{now:%Y-%m-%d-%H%M%S}-{name}.json"
        self.measured: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {
            "what": "benchmarks/gpu.sh",
            "date": now.isoformat(timespec="seconds"),
            "state": "running",
            **({"note": CPU_NOTE} if self.card is None else {}),
            "command": shlex.join(["benchmarks/gpu.sh", *argv]),
            "commit": git("rev-parse", "HEAD"),
            "uncommitted_changes": bool(git("status", "--porcelain")),
            "hardware": {"device_name": self.card, "driver": driver(), "cpu": cpu_name(), "cores": os.cpu_count()},
            "mfu_formula": MFU_NOTE,
            "peak_bf16_flops": self._peak(),
        }

    def _peak(self) -> float | None:
        return next((peak for card, peak in PEAK_BF16_FLOPS.items() if card in (self.card or "")), None)

    def run(self, wanted: Sequence[Setting]) -> int:
        """Measure each, as long as there is time; returns the exit code."""
        case: Case | None = None
        model = ""
        for setting in wanted:
            if setting.side.name != "ours" and find_spec("trl") is None:
                self._note(setting, {"status": "not run", "reason": "no trl"})
                continue
            if self._left_s() <= 0:
                self._note(setting, self._out_of_time("is spent"))
                continue
            if case is None or setting.model != model:
                case, model = self._case(setting.model), setting.model
            self._note(setting, self._measure(case, setting))
        self.record["state"] = "complete"
        self._write()
        print(f"record: {self.path}")
        statuses = [one["status"] for one in self.measured]
        return 0 if "fail" not in statuses and "pass" in statuses else 1

    def _case(self, model: str) -> Case:
        folder = str(self.folder / model)
        process = multiprocessing.get_context("spawn").Process(target=_build, args=(folder, model, self.options.device))
        process.start()
        process.join()
        return load_case(folder)

    def _measure(self, case: Case, setting: Setting) -> dict[str, Any]:
        folder = str(self.folder / setting.title.replace("/", "-"))
        side = replace(setting.side, folder=folder, device=self.options.device)
        if self.options.size == "tiny":
            side = replace(side, micro_batch=case.size.micro_batch)
        started: list[Worker] = []
        watch = threading.Timer(max(1.0, self._left_s()), lambda: [worker.kill() for worker in started])
        watch.start()
        try:
            worker = Worker(case, side, started.append)
            answers = [worker.step("time") for _ in range(WARM_UP)]
            repeats = [self._steady(worker) for _ in range(REPEATS)]
            worker.close()
        except Failed as error:
            if self._left_s() <= 0:
                return self._out_of_time("ended while it ran")
            return {"status": "fail", "reason": str(error)}
        finally:
            watch.cancel()
        rates = sorted(case.size.pairs * len(steps) / sum(one["seconds"] for one in steps) for steps in repeats)
        memory = [one["peak_memory_gib"] for steps in repeats for one in steps if one["peak_memory_gib"] is not None]
        losses = [answer["loss"] for answer in answers[:2]]
        return self._judged(setting, losses) | {
            "pairs_per_second": statistics.median(rates),
            "pairs_per_second_range": [rates[0], rates[-1]],
            "steps": [len(steps) for steps in repeats],
            "peak_memory_gib": max(memory) if memory else None,
            "first_losses": losses,
            "settings": {"layout": side.layout, "reference": side.reference, "micro_batch": side.micro_batch}
            | {"tokens_per_micro_batch": side.tokens_per_micro_batch, "flags": side.flags, "facts": worker.facts},
            **self._mfu(case, setting, statistics.median(rates)),
        }

    def _steady(self, worker: Worker) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = []
        while sum(step["seconds"] for step in steps) < STEADY_S[self.options.size]:
            steps.append(worker.step("time"))
        return steps

    def _judged(self, setting: Setting, losses: list[float]) -> dict[str, Any]:
        """TRL's first losses against ours, where ours were measured."""
        group = setting.title.rsplit("/", 1)[0]
        ours = next((one for one in self.measured if one["name"] == f"{group}/ours" and "first_losses" in one), None)
        if ours is None or setting.name == "ours":
            return {"status": "pass"}
        gap = max(abs(a - b) for a, b in zip(losses, ours["first_losses"], strict=True))
        passed = gap <= SAME_LOSS[self.options.device]
        return {
            "status": "pass" if passed else "fail",
            "reason": "" if passed else f"a first loss is {gap:.2g} off ours",
        }

    def _mfu(self, case: Case, setting: Setting, rate: float) -> dict[str, Any]:
        pairs = case.size.pairs
        tokens, scored = sum(case.tokens.values()) / pairs, (case.tokens["chosen"] + case.tokens["rejected"]) / pairs
        flops = flops_per_pair(case.size.shape, setting.side.mode, tokens, scored, case.size.lora_rank)
        peak = self._peak()
        mfu = None if peak is None else rate * flops / peak
        ours = next((one for one in self.measured if one["name"] == f"{setting.model}/{setting.side.mode}/ours"), {})
        theirs = ours.get("pairs_per_second")
        return {
            "model_flops_per_pair": flops,
            "mfu": mfu,
            "mfu_goal": setting.goal if peak else None,
            "times_slower_than_ours": None if theirs is None or setting.name == "ours" else theirs / rate,
        }

    def _out_of_time(self, how: str) -> dict[str, Any]:
        return {"status": "not run", "reason": f"the budget of {self.options.budget_s:g} s {how}"}

    def _left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.since)

    def _note(self, setting: Setting, result: dict[str, Any]) -> None:
        self.measured.append({"name": setting.title} | result)
        self._write()
        shown = [f"{key} {result[key]:.3g}" for key in _SHOWN if result.get(key) is not None]
        print(f"{result['status']:7} {setting.title}  {result.get('reason') or ' '.join(shown)}", flush=True)

    def _write(self) -> None:
        seconds = round(time.monotonic() - self.since, 1)
        write_record(self.path, self.record | {"seconds": seconds, "measured": self.measured})


_SHOWN = ("pairs_per_second", "mfu", "peak_memory_gib", "times_slower_than_ours")

if __name__ == "__main__":
    sys.exit(main())
