"""How a launcher on the same machine knows of a rank that can no longer speak: a few bytes that outlive the rank.

DPO_LAUNCHER names a folder of the launcher's. Rank R writes the number of steps it has taken into `step.R` there, and
rank 0 the place of the run directory into `run_dir`. `launch/local.py` reads both.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "DPO_LAUNCHER"


class Beat:
    """Steps of this rank, where its launcher sees them; nothing without such a launcher."""

    def __init__(self, environ: Mapping[str, str], rank: int, run_dir: Path) -> None:
        self._memory: mmap.mmap | None = None
        folder = environ.get(VARIABLE)
        if folder is None:
            return
        if rank == 0:
            (Path(folder) / "run_dir").write_text(str(run_dir.resolve()))
        descriptor = os.open(Path(folder) / f"step.{rank}", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, 8)
        self._memory = mmap.mmap(descriptor, 8)
        os.close(descriptor)

    def step(self, number: int) -> None:
        """So many steps were taken."""
        if self._memory is not None:
            self._memory[:] = number.to_bytes(8, "little")
