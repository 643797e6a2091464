"""The suite that runs whenever a GPU is at hand: equal numbers from all engines, and what they cost.

    benchmarks/gpu_smoke.sh                                    the whole suite on one GPU, record in benchmarks/records
    benchmarks/gpu_smoke.sh --device cpu --size tiny --record FILE.json

Needs no network. One JSON record is rewritten after every check, so whatever ends the suite leaves what was measured.
Exit code: 0 every check that ran passed, 1 a check failed or none ran, 2 it cannot start.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.record import driver, git, write_record
from benchmarks.smoke_plan import (
    LEARNS,
    LORA_RANK,
    MFU_GOAL,
    PEAK_BF16_FLOPS,
    ROOT,
    SIZES,
    TIMED_STEPS,
    TIMED_WINDOW,
    TOLERANCES,
    Plan,
    Task,
    beginning,
    differences,
    throughput,
    within,
)
from benchmarks.smoke_process import Worker

RECORDS = ROOT / "benchmarks" / "records"
PROGRESS_S = 15.0
POLL_S = 0.2
LONGEST_TASK_S = 240.0
CPU_NOTE = "A run on a CPU: it shows that the suite works, and says nothing about any GPU."
MFU_NOTE = (
    "mfu = pairs_per_second x model_flops_per_pair / dense bf16 peak; model FLOPs: 6 per trained and 4 per frozen "
    "weight and computed token (a shared prompt once), the head at scored tokens only; attention scores, recompute and "
    "the reference's forward are left out. mfu_in_metrics is the trainer's own, by the same count."
)


def main(argv: list[str]) -> int:
    """Run the suite; returns the exit code."""
    options = _options(argv)
    with tempfile.TemporaryDirectory(prefix="dpo-gpu-smoke-") as folder:
        suite = Suite(options, Path(folder), argv)
        try:
            suite.run()
        except Refusal as refusal:
            print(f"error: {refusal}", file=sys.stderr)
            return 2
    return suite.finish()


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_smoke.sh", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="1b", help="models: 1b for a GPU, tiny for anything")
    parser.add_argument("--record", type=Path, help="file to write (default: a dated one in benchmarks/records)")
    parser.add_argument("--budget_s", type=float, default=570.0, help="seconds; what is left then is 'not run'")
    parser.add_argument("--only", default="", help="regular expression that a check's name must contain")
    options = parser.parse_args(argv)
    if options.device == "cpu" and options.record is None:
        parser.error("--device cpu needs --record FILE: a run on a CPU is no record of a GPU")
    if options.device == "cpu" and RECORDS in options.record.resolve().parents:
        parser.error(f"--record {options.record}: {RECORDS} is for runs on a GPU: give a file elsewhere")
    return options


class Refusal(Exception):
    """The suite cannot start; the message is one line."""


class Suite:
    """The record that grows, and the worker processes that feed it."""

    def __init__(self, options: argparse.Namespace, folder: Path, argv: list[str]) -> None:
        self.options, self.folder = options, folder
        self.plan = Plan(folder, options.device, options.size)
        self.since = time.monotonic()
        self.started = datetime.now(UTC)
        self.path: Path | None = options.record
        self.built: dict[str, Any] = {}
        self.checks: list[dict[str, Any]] = []
        self.num_workers = 0
        self.record: dict[str, Any] = {
            "what": "benchmarks/gpu_smoke.sh",
            "date": self.started.isoformat(timespec="seconds"),
            "state": "running",
            **({"note": CPU_NOTE} if options.device == "cpu" else {}),
            "command": shlex.join(["benchmarks/gpu_smoke.sh", *argv]),
            "commit": git("rev-parse", "HEAD"),
            "uncommitted_changes": bool(git("status", "--porcelain")),
            "size": options.size,
            "driver": driver() if options.device == "cuda" else None,
            "settings": {"lora_rank": LORA_RANK, "timed_steps": TIMED_STEPS, "window": TIMED_WINDOW},
            "peak_bf16_flops": PEAK_BF16_FLOPS,
            "mfu_formula": MFU_NOTE,
            "tolerances": TOLERANCES,
        }

    # ---- running

    def run(self) -> None:
        """Every wanted task, in order, until the budget is spent.

        Raises:
            Refusal: nothing is wanted, or there is no such device.
        """
        tasks = [Task("build", "build"), *(task for task in self._wanted() if not self._misses(task))]
        while tasks:
            together = 1 if _is_timed(tasks[0]) else next((n for n, t in enumerate(tasks) if _is_timed(t)), len(tasks))
            tasks = self._work(tasks[:together]) + tasks[together:]
        self._compare_precisions()

    def _wanted(self) -> list[Task]:
        """What `--only` names, and what that is held against."""
        tasks = self.plan.tasks()
        named = [task for task in tasks if re.search(self.options.only, task.name)]
        if not named:
            raise Refusal(f"--only {self.options.only!r}: no check has such a name")
        names = {task.name for task in named} | {task.against for task in named if not _is_timed(task)}
        return [task for task in tasks if task.name in names]

    def _misses(self, task: Task) -> bool:
        missing = [f"no {package}" for package in task.needs if find_spec(package) is None]
        if task.counts_syncs and self.options.device == "cpu":
            missing.append("needs a GPU")
        if missing:
            self._note(task.name, "not run", ", ".join(missing))
        return bool(missing)

    def _work(self, tasks: list[Task]) -> list[Task]:
        """Start one worker for these tasks; returns those that it did not come to."""
        if not self._left_s():
            for task in tasks:
                self._note(task.name, "not run", f"the budget of {self.options.budget_s:g} s is spent")
            return []
        worker = Worker(
            self.folder / f"worker-{self.num_workers}", self.options.device, self.options.size, self.folder, tasks
        )
        self.num_workers += 1
        waiting, told = list(tasks), time.monotonic()
        while True:
            ended = worker.ended()
            for event in worker.events():
                self._take(event, waiting)
                told = time.monotonic()
            if ended is not None or not waiting:
                break
            if time.monotonic() - told > PROGRESS_S:
                self._say(f"... {waiting[0].name}")
                told = time.monotonic()
            if problem := self._problem(worker, waiting[0]):
                worker.kill()
                self._note(waiting.pop(0).name, *problem)
                return waiting
            time.sleep(POLL_S)
        code = worker.wait()
        if waiting:
            self._note(waiting.pop(0).name, "fail", f"the process ended with code {code}: {worker.last_words()}")
        return waiting

    def _problem(self, worker: Worker, task: Task) -> tuple[str, str] | None:
        if not self._left_s():
            return "not run", f"the budget of {self.options.budget_s:g} s ended while it ran"
        if worker.task_s() > LONGEST_TASK_S:
            return "fail", f"no end after {LONGEST_TASK_S:g} s: {worker.last_words()}"
        return None

    def _left_s(self) -> float:
        return max(0.0, self.options.budget_s - (time.monotonic() - self.since))

    # ---- judging

    def _take(self, event: dict[str, Any], waiting: list[Task]) -> None:
        if event["event"] == "refused":
            raise Refusal(event["reason"])
        if event["event"] == "facts":
            self.record |= {"hardware": event["hardware"], "versions": event["versions"]}
            self.path = self.path or RECORDS / self._file_name(event["hardware"]["device_name"])
        if event["event"] == "end":
            task = waiting.pop(0)
            assert task.name == event["name"]
            if "error" in event:
                self._note(task.name, "fail", event["error"], seconds=event["seconds"])
            else:
                self._judge(task, event)

    def _judge(self, task: Task, event: dict[str, Any]) -> None:
        family = task.name.split("/")[0]
        passed, measured, tolerance = getattr(self, f"_judge_{family}")(task, event)
        self._note(task.name, "pass" if passed else "fail", "", measured, tolerance, event["seconds"])

    def _judge_build(self, task: Task, event: dict[str, Any]) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        self.built = event["built"]
        self.record["built"] = self.built
        return True, {}, {}

    def _judge_attention(self, task: Task, event: dict[str, Any]) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        passed = all(case["passed"] for case in event["cases"].values())
        if self.options.device == "cpu":
            self._note("attention/varlen", "not run", "the variable-length kernel needs a GPU")
        return passed, event["cases"], event["tolerances"]

    def _judge_equal(self, task: Task, event: dict[str, Any]) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        tolerance, rows = TOLERANCES[task.name.split("/")[1]], self._rows(task.name)
        if task.against:
            measured = differences(rows, self._rows(task.against))
            return within(measured, tolerance), measured, tolerance
        measured = beginning(rows)
        least = LEARNS * tolerance["loss"]
        passed = within(measured, tolerance) and measured["learned"] >= least
        return passed, measured, tolerance | {"learned_at_least": least}

    def _judge_syncs(self, task: Task, event: dict[str, Any]) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        """Splitting the same steps into more micro-steps must not add synchronizations."""
        measured = {"syncs": event["syncs"]}
        if not task.against:
            return True, measured, {}
        measured["added_by_splitting"] = event["syncs"] - self._measured(task.against).get("syncs", -math.inf)
        return measured["added_by_splitting"] <= 0, measured, {"added_by_splitting": 0}

    def _judge_throughput(self, task: Task, event: dict[str, Any]) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        trained = task.name.split("/")[1]
        rows, sums = self._rows(task.name), self.built["timed"]["sums"]
        if len(rows) < TIMED_STEPS // TIMED_WINDOW:
            return False, {"rows": len(rows)}, {}
        tokens = sums["tokens" if task.name.endswith("_packed") else "shared_tokens"]
        per_pair = {"tokens": tokens / sums["pairs"], "scored": sums["scored"] / sums["pairs"]}
        name = self.record["hardware"]["device_name"]
        measured = throughput(rows, self.plan.size.timed, trained, per_pair, name)
        goal = MFU_GOAL.get(task.name)
        if goal is not None and measured["mfu"] is not None:
            measured |= {"mfu_goal": goal, "meets_goal": measured["mfu"] >= goal}
        if single := self._measured(task.against).get("pairs_per_second"):
            measured["times_single"] = single / measured["pairs_per_second"]
        finite = all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
        return finite and measured["skipped_steps"] == 0, measured, {"skipped_steps": 0}

    def _compare_precisions(self) -> None:
        """The bf16 yardsticks against those in fp32: an error that all bf16 members share would show here."""
        for trained in ("full", "lora"):
            low, high = (self._rows(f"equal/{dtype}/{trained}/single_padded") for dtype in ("bfloat16", "float32"))
            if low and high:
                measured, tolerance = differences(low, high), TOLERANCES["bfloat16_against_float32"]
                passed = within(measured, tolerance)
                self._note(
                    f"equal/bfloat16_against_float32/{trained}", "pass" if passed else "fail", "", measured, tolerance
                )

    def _measured(self, name: str) -> dict[str, Any]:
        return next((check["measured"] for check in self.checks if check["name"] == name), {})

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.plan.run_dir(name) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [row for row in rows if "loss" in row]

    # ---- writing

    def _note(
        self,
        name: str,
        status: str,
        reason: str = "",
        measured: dict[str, Any] | None = None,
        tolerance: dict[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        check = {"name": name, "status": status, "reason": reason, "measured": measured or {}, "tolerance": tolerance}
        self.checks.append(check | {"seconds": seconds})
        self._write()
        self._say(f"{status:7} {name}  {reason}{_short(measured or {})}".rstrip())

    def _write(self) -> None:
        if self.path is None:
            return
        counts = Counter(check["status"] for check in self.checks)
        document = self.record | {"seconds": self._seconds(), "counts": dict(counts), "checks": self.checks}
        write_record(self.path, document)

    def finish(self) -> int:
        """Write the end of the record; returns the exit code."""
        counts = Counter(check["status"] for check in self.checks if check["name"] != "build")
        self.record["state"] = "complete"
        self._write()
        self._say(f"{counts['pass']} passed, {counts['fail']} failed, {counts['not run']} not run; record: {self.path}")
        failed = any(check["status"] == "fail" for check in self.checks)
        return 1 if failed or not counts["pass"] else 0

    def _file_name(self, device_name: str) -> str:
        card = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
        return f"gpu-smoke-{self.started:%Y-%m-%d-%H%M%S}-{card}.json"

    def _seconds(self) -> float:
        return round(time.monotonic() - self.since, 1)

    def _say(self, line: str) -> None:
        print(f"[{self._seconds():6.1f} s] {line}", flush=True)


def _is_timed(task: Task) -> bool:
    """Timed trainings get a process each: fresh memory, nothing compiled or cached by another."""
    return task.name.startswith("throughput/")


def _short(measured: dict[str, Any]) -> str:
    """Some of the numbers, for the terminal."""
    if measured and all(isinstance(value, dict) for value in measured.values()):
        errors = [v for case in measured.values() for k, v in case.items() if k.endswith("_error") and "sdpa" not in k]
        worst = f", worst {max(errors):.1e}, median {statistics.median(errors):.1e}" if errors else ""
        return f"{sum(case['passed'] for case in measured.values())} of {len(measured)} cases{worst}"
    shown = ("loss", "grad_norm", "first_loss", "learned", "syncs", "added_by_splitting", "tokens_per_second", "mfu",
             "peak_memory_gib", "times_single")  # fmt: skip
    return " ".join(f"{key} {measured[key]:.3g}" for key in shown if measured.get(key) is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
