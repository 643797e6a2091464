"""FLOPs per pair of a tiny case, which every run must reproduce: the gate on work that was not there before.

    python -m benchmarks.flop_gate            compare with the record
    python -m benchmarks.flop_gate --write    write the record anew, after a change that is meant

The counts are exact, so the limit of 3 % only leaves room for what other releases of torch and transformers count.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare_case import TINY, Case, case_of_lengths
from benchmarks.compare_meter import Finished, Meter
from benchmarks.compare_plan import ROOT, Side
from benchmarks.compare_sides import OUR_TALKERS, run_ours
from benchmarks.record import write_record

RECORD = ROOT / "benchmarks" / "records" / "flops-tiny.json"
LIMIT = 0.03
MEMBERS = [
    (mode, layout, reference)
    for mode in ("full", "lora")
    for layout, reference in (
        ("auto", "live"),
        ("padded", "live"),
        ("packed", "live"),
        ("shared", "live"),
        ("shared", "stored-warm"),
    )
]
"""(mode, layout, reference); add what there is, and write the record anew."""
COMMAND = "python -m benchmarks.flop_gate --write"


def name_of(mode: str, layout: str, reference: str) -> str:
    """A member's key in the record."""
    return f"{mode}/{layout}/{reference}"


def gate_case(folder: Path) -> Case:
    """The case that the record is of."""
    return case_of_lengths(folder, TINY, "hh", seed=0)


def count_step(case: Case, folder: Path, mode: str, layout: str, reference: str) -> dict[str, Any]:
    """Counts of the second step of our trainer, in this process (see `compare_meter.Count`)."""
    answers = io.StringIO()
    meter = Meter(io.StringIO("time\ncount\nstop\n"), answers, OUR_TALKERS)
    side = Side("ours", mode, 5, str(folder / name_of(mode, layout, reference)), layout=layout, reference=reference)
    try:
        run_ours(case, side, meter)
    except Finished:
        return json.loads(answers.getvalue().splitlines()[-1])
    raise AssertionError("the plan has more steps than the meter asks for")


def recorded() -> dict[str, float]:
    """FLOPs per pair of every member in the record."""
    return json.loads(RECORD.read_text())["flops_per_pair"]


def main(argv: list[str] | None = None) -> int:
    """Count every member; 1 where one is off the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flop_gate", description="FLOPs per pair against the record."
    )
    parser.add_argument("--write", action="store_true", help="write the record anew")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="flops-") as temporary:
        folder = Path(temporary)
        case = gate_case(folder / "case")
        found = {name_of(*one): count_step(case, folder, *one)["flops"] / case.size.pairs for one in MEMBERS}
    if options.write:
        write_record(RECORD, {"command": COMMAND, "case": case.facts(), "flops_per_pair": found})
        print(f"wrote {RECORD}")
        return 0
    wrong = off_record(found, recorded())
    print("\n".join(wrong) or f"{len(found)} counts are within {LIMIT:.0%} of the record")
    return int(bool(wrong))


def off_record(found: dict[str, float], record: dict[str, float]) -> list[str]:
    """One line for each member whose FLOPs differ from the record's by more than `LIMIT`, or that it lacks."""
    lines = []
    for name, flops in found.items():
        if name not in record:
            lines.append(f"{name}: not in the record: {COMMAND}")
        elif abs(flops / record[name] - 1) > LIMIT:
            change = flops / record[name] - 1
            lines.append(f"{name}: {change:+.1%} FLOPs per pair against the record; if that is meant: {COMMAND}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
