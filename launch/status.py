"""What has become of a run: reads its run directory, for the launchers, whose own exit codes say little.

    python -m launch.status where [flags of train_dpo.py]     the run directory that these flags mean
    python -m launch.status attempt DIR                       number of the last start that trained into DIR
    python -m launch.status progress DIR                      step of the newest checkpoint, -1 without one
    python -m launch.status end DIR --since N --code CODE     one line on how the start after attempt N ended

`end` exits with the trainer's code: 0 done, 1 unexpected error, 2 config or data, 3 checkpoint, 4 a rank died or hung,
75 stopped on request. torchrun says 1, srun 143 and deepspeed 0 to 247 for the same events, so status.json decides.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

DONE, UNEXPECTED, REFUSED, DIED, STOPPED = 0, 1, 2, 4, 75
SETTLE_S = 5.0
"""How long rank 0, on another node, may take to write its last word."""


def read_status(directory: Path) -> dict[str, Any]:
    """The content of status.json; nothing where there is none."""
    try:
        content = json.loads((directory / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def progress(directory: Path) -> int:
    """The step of the newest checkpoint, from which a resume would go on; -1 without one."""
    names = [path.name for path in directory.glob("checkpoints/step-*")]
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=-1)


def judge(status: dict[str, Any], since: int, launcher_code: int, requested: bool) -> tuple[int, str]:
    """The exit code of a start and one line about it.

    Args:
        status: status.json after the ranks have ended.
        since: the attempt that status.json spoke of before the start.
        launcher_code: what the launcher returned.
        requested: whether a stop was asked for.
    """
    state, step, attempt = status.get("state"), status.get("step", 0), int(status.get("attempt", 0))
    if state == "finished":
        return DONE, f"finished at step {step}"
    if attempt <= since:  # no rank came so far as to open the run directory
        if requested:
            return STOPPED, "stopped before training began; the same command starts it"
        if launcher_code == 0:
            return DIED, "the ranks ended without a word before training began"
        return REFUSED, f"training did not begin (see above; the launcher returned {launcher_code})"
    if state == "stopped":
        return STOPPED, f"stopped at step {step} ({status.get('reason')}); the same command resumes"
    if state == "failed":
        code = int(status.get("exit_code") or UNEXPECTED)
        return code, f"failed at step {step} with exit code {code}: {status.get('reason')}"
    return DIED, f"died after step {step} without a word (the launcher returned {launcher_code})"


def settled(directory: Path, since: int) -> dict[str, Any]:
    """status.json once it no longer says that this start is running, or after `SETTLE_S`."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        status = read_status(directory)
        is_over = status.get("state") == "finished" or (
            int(status.get("attempt", 0)) > since and status.get("state") != "running"
        )
        if is_over or time.monotonic() > deadline:
            return status
        time.sleep(0.1)


def _where(flags: list[str]) -> int:
    from dpo.config import parse_or_exit

    print(Path(parse_or_exit(flags).run.dir).absolute())
    return 0


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if argv[:1] == ["where"]:
        return _where(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m launch.status", description=__doc__, formatter_class=Raw)
    parser.add_argument("what", choices=("where", "attempt", "progress", "end"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--since", type=int, default=0, help="attempt before the start")
    parser.add_argument("--code", type=int, default=0, help="what the launcher returned")
    parser.add_argument("--requests", type=int, default=0, help="how often a stop was asked for")
    options = parser.parse_args(argv)
    if options.what == "attempt":
        print(int(read_status(options.directory).get("attempt", 0)))
        return 0
    if options.what == "progress":
        print(progress(options.directory))
        return 0
    status = settled(options.directory, options.since)
    code, line = judge(status, options.since, options.code, options.requests > 0)
    print(f"{options.directory}: {line}", file=sys.stdout if code in (DONE, STOPPED) else sys.stderr)
    return code


Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
