"""One trainer in a process of its own: `python -m benchmarks.compare_worker CASE_FOLDER SIDE_AS_JSON`.

Reads commands from stdin and answers on what was stdout when it started; everything that libraries print goes to
stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    RAYON_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
)


def main(case_folder: str, settings: str) -> int:
    """Set up the trainer and step it until the parent has enough."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    from benchmarks.compare_case import load_case
    from benchmarks.compare_meter import Finished, Meter
    from benchmarks.compare_plan import Side
    from benchmarks.compare_sides import OUR_TALKERS, run_ours, run_trl

    torch.set_num_threads(1)
    case, side = load_case(case_folder), Side(**json.loads(settings))
    meter = Meter(sys.stdin, answers, OUR_TALKERS)
    try:
        (run_ours if side.name == "ours" else run_trl)(case, side, meter)
    except Finished:
        answers.close()
        os._exit(0)  # threads of the loader and atexit handlers of libraries have nothing left to do
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
