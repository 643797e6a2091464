"""Check the machines of a job before it starts: `python -m launch.preflight [--json FILE] [flags of train_dpo.py]`.

Every launcher runs it on all ranks, as it would run the trainer. One table: who came, devices and drivers, whether an
all-reduce is right and its rate, the same code, config and packages everywhere, a free port, a file system that all
see, free disk against the planned checkpoints, clocks, limits. A check that fails names the node; exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from dpo.config import Config, parse_or_exit, to_yaml
from launch.preflight_checks import Check, judge

FAILED = 2
MEETING_S = 30
"""How long ranks wait for each other."""
COLLECTIVE_S = 45


def main(argv: list[str]) -> int:
    """Run all checks on all ranks; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        print(__doc__, "\nusage: python -m launch.preflight [--json FILE] [flags of train_dpo.py]")
        return 0
    argv, json_path = take_json(argv)
    config = parse_or_exit(argv)
    from launch.preflight_ranks import Ranks, Unmet

    since = time.perf_counter()
    try:
        ranks = Ranks.meet(config.parallel.device, timedelta(seconds=MEETING_S), timedelta(seconds=COLLECTIVE_S))
    except Unmet as error:
        print(f"error: preflight: {error}", file=sys.stderr)
        return FAILED
    facts = ranks.facts(config, to_yaml(config))
    checks = judge(facts, needed_bytes(config))
    if ranks.rank == 0:
        show(checks, len(facts), time.perf_counter() - since)
        if json_path is not None:
            write_json(json_path, checks, facts)
    ranks.leave()
    return FAILED if any(check.failed for check in checks) else 0


def take_json(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--json FILE`, and the file."""
    if "--json" not in argv:
        return argv, None
    at = argv.index("--json")
    if at + 1 == len(argv):
        print("error: --json needs a file", file=sys.stderr)
        raise SystemExit(FAILED)
    return argv[:at] + argv[at + 2 :], argv[at + 1]


def needed_bytes(config: Config) -> int | None:
    """What checkpoints and the final model of this config take at most at a time; None where the model's weights are
    not in a local folder of safetensors."""
    from launch.weights import checkpoint_bytes, weight_shapes

    shapes = weight_shapes(Path(config.model.path))
    return None if shapes is None else checkpoint_bytes(shapes, config)


def show(checks: list[Check], num_ranks: int, seconds: float) -> None:
    """The table, and one line per failure to standard error."""
    print(f"preflight of {num_ranks} ranks, {seconds:.1f} s")
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"  {'FAIL' if check.failed else 'ok':<5}{check.name:<{width}}  {check.found}")
    sys.stdout.flush()
    for check in checks:
        if check.failed:
            print(f"error: preflight: {check.name}: {check.found}", file=sys.stderr)


def write_json(path: str, checks: list[Check], facts: Sequence[Mapping[str, Any]]) -> None:
    """The table and every rank's facts for programs."""
    rows = [{"name": check.name, "failed": check.failed, "found": check.found} for check in checks]
    Path(path).write_text(json.dumps({"checks": rows, "ranks": facts}, indent=1) + "\n")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as dpo.session.end_process: without the destructors of C++ libraries
