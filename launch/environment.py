"""The one place that decides what ranks find in their environment, whoever starts them; what the user has set stays.

    python3 launch/environment.py RANKS_PER_NODE [--threads N] [--alone]

prints NAME=VALUE for each, ended by NUL, to launch/job.sh, which the shell launchers share; launch/local.py imports it.
--threads: CPU threads of a rank, where SLURM has said so. --alone: no other node takes part. Only the standard library,
since it also runs before the Python environment is made.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping

DEFAULTS = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # NCCL says what is wrong, never what goes right; a collective that hangs leaves the last ones of each rank on disk.
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
}
ALWAYS = {
    # torchrun: ranks that are started again must not find the addresses of their dead predecessors (35 s per restart).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def rank_environment(
    num_ranks_here: int, environ: Mapping[str, str], *, threads: int | None = None, alone: bool = False
) -> dict[str, str]:
    """Variables for all ranks of a node.

    Args:
        num_ranks_here: ranks on this node, which share its cores.
        environ: of the user.
        threads: CPU threads of a rank; None: an equal part of the cores that this process may use.
        alone: all ranks are on this machine. gloo else takes the interface of the host's name, and tries for minutes
            when that name does not resolve.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    defaults = DEFAULTS | {"OMP_NUM_THREADS": str(threads or max(1, cores // num_ranks_here))}
    if alone and sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: environ.get(name) or value for name, value in defaults.items()} | ALWAYS


def meeting_here(environ: Mapping[str, str]) -> dict[str, str]:
    """Where ranks of this machine alone meet: a free port, unless the user has named one."""
    port = environ.get("MASTER_PORT") or str(_free_port())
    return {"MASTER_ADDR": environ.get("MASTER_ADDR") or "127.0.0.1", "MASTER_PORT": port}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: list[str]) -> None:
    """Print for the shell."""
    threads = int(argv[argv.index("--threads") + 1]) if "--threads" in argv else None
    variables = rank_environment(int(argv[0]), os.environ, threads=threads, alone="--alone" in argv)
    sys.stdout.write("".join(f"{name}={value}\0" for name, value in variables.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
