"""Send a signal to the ranks of one job on this machine: `python -m launch.signal_ranks JOB SIGNAL`.

A rank is a process of this user with DPO_JOB=JOB and a RANK in its environment: what torchrun, deepspeed or srun has
started, but neither those themselves nor ranks of another job (DeepSpeed's own clean-up, `pkill -f`, ends every
DeepSpeed job of the user on the machine). Linux only: it reads /proc.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

USAGE = "usage: python -m launch.signal_ranks JOB SIGNAL (such as USR1 or KILL)"


def ranks_of(job: str) -> list[int]:
    """Process ids of the ranks of a job, without this process."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        if f"DPO_JOB={job}".encode() in environment and any(item.startswith(b"RANK=") for item in environment):
            found.append(int(entry.name))
    return sorted(found)


def main(argv: list[str]) -> int:
    """Returns the exit code; no rank to be found is no error."""
    if len(argv) != 2 or not hasattr(signal, f"SIG{argv[1]}"):
        print(USAGE, file=sys.stdout if argv in (["--help"], ["-h"]) else sys.stderr)
        return 0 if argv in (["--help"], ["-h"]) else 2
    for pid in ranks_of(argv[0]):
        try:
            os.kill(pid, getattr(signal, f"SIG{argv[1]}"))
        except ProcessLookupError:
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
