#!/usr/bin/env python
"""Our trainer against TRL's on this machine's CPU: the same model, tokenizer, token ids, pairs, order and optimizer.

    benchmarks/compare_trl.py --data FILE...             64 seeded pairs of any of our formats, a BPE trained on all
    benchmarks/compare_trl.py --lengths ultrafeedback    random words with the lengths of a known set
    benchmarks/compare_trl.py --tiny                     seconds instead of minutes

trl-default is TRL as installed; trl-tuned has its reference precomputed, no checkpointing, pairs grouped by length and
the micro-batch that takes the fewest CPU-seconds. Token ids and the losses of every step are held equal before anything
is timed; then steps of all trainers alternate, each in a process with one thread. FLOPs are the matrix products that
torch's counter sees; CPU-seconds are `time.process_time`, data loading included. A ratio above 1 is in our favour and
says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on stdout that it chose it

from benchmarks.compare_plan import REFERENCES, RIVALS, Side, as_flags
from benchmarks.compare_report import plot, summary, table
from benchmarks.compare_run import Failed, Measured, NotEqual, best_micro_batch, compare, planned_steps, ratio
from benchmarks.length_models import LENGTH_MODELS
from benchmarks.record import cpu_name, git, write_record
from data_utils.schema import DataError

if TYPE_CHECKING:
    from benchmarks.compare_case import Case

CANDIDATES = (2, 4, 8, 16, 32)
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def main(argv: list[str] | None = None) -> int:
    """Compare, print and record; 0 done, 1 the trainers do not do the same or one failed, 2 bad arguments or data."""
    options = _options(argv)
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        folder = Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # nothing that an earlier run has cached
        try:
            _check_config(options, folder)
            case = _case(folder / "case", options)
            record = _measure(case, options, folder)
        except (DataError, ValueError) as error:
            _say(f"error: {error}")
            return 2
        except (NotEqual, Failed) as error:
            _say(f"error: {error}")
            return 1
    print(_headline(case, record))
    print(table(record["sides"], record["ratios"]))
    _keep(record, options)
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", nargs="+", metavar="FILE", help="shards, as for data.train")
    data.add_argument("--lengths", choices=LENGTH_MODELS, default="hh", help="without --data (default: %(default)s)")
    parser.add_argument("--mode", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--rival", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--layout", default="auto", help="our batch.layout (default: %(default)s)")
    parser.add_argument("--reference", choices=REFERENCES, default="live", help="ours (default: %(default)s)")
    parser.add_argument("--tokens_per_micro_batch", type=int, default=8192, help="ours (default: %(default)s)")
    parser.add_argument("--micro_batch", type=int, help="pairs per micro-batch of trl-default (default: the case's, 8)")
    parser.add_argument("--tuned_micro_batch", type=int, help="of trl-tuned (default: the best is looked for)")
    parser.add_argument("--pairs", type=int, help="pairs per step (default: the case's, 64)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: %(default)s; 0: only count)")
    parser.add_argument("--seed", type=int, default=0, help="of pairs and model (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and 16 short pairs")
    parser.add_argument("--json", metavar="FILE", help="write the record there")
    parser.add_argument("--record", metavar="FOLDER", help="keep the record, dated, with a plot")
    options = parser.parse_args(argv)
    words = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if argv is None else argv)]
    options.command = shlex.join(["benchmarks/compare_trl.py", *words])  # no folders of this machine
    return options


def _case(folder: Path, options: argparse.Namespace) -> Case:
    from benchmarks.compare_case import PINNED, TINY, case_of_files, case_of_lengths

    size = TINY if options.tiny else PINNED
    size = replace(size, pairs=options.pairs or size.pairs, micro_batch=options.micro_batch or size.micro_batch)
    for name, micro_batch in (("micro_batch", size.micro_batch), ("tuned_micro_batch", options.tuned_micro_batch or 1)):
        if size.pairs % micro_batch:
            raise ValueError(f"--{name} {micro_batch} does not divide the {size.pairs} pairs of a step")
    if options.data:
        return case_of_files(folder, size, options.data, options.seed)
    return case_of_lengths(folder, size, options.lengths, options.seed)


def _check_config(options: argparse.Namespace, folder: Path) -> None:
    """Our own refusals, such as of an unknown layout, before anything is built.

    Raises:
        ConfigError: what the config says.
    """
    from dpo.config import parse_config

    stand_ins = {"model.path": "model", "data.train": "pairs.jsonl", "run.dir": "run"}
    parse_config(as_flags(stand_ins | _ours(options, "full", folder).choices))


def _ours(options: argparse.Namespace, mode: str, folder: Path) -> Side:
    return Side(
        name="ours",
        mode=mode,
        steps=planned_steps(options.repeats),
        folder=str(folder / mode / "ours"),
        layout=options.layout,
        reference=options.reference,
        tokens_per_micro_batch=options.tokens_per_micro_batch,
    )


def _measure(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sides, ratios, details = [], [], []
    tuned = options.tuned_micro_batch
    for mode in options.mode:
        rivals = [_rival(case, options, name, mode, folder) for name in options.rival]
        if "trl-tuned" in options.rival and tuned is None:
            candidates = [size for size in CANDIDATES if case.size.pairs % size == 0]
            tuned = best_micro_batch(case, rivals[options.rival.index("trl-tuned")], candidates, _say)
        rivals = [replace(side, micro_batch=tuned) if side.name == "trl-tuned" else side for side in rivals]
        measured = compare(case, [_ours(options, mode, folder), *rivals], options.repeats, _say)
        ratios += [ratio(measured[0], rival) for rival in measured[1:]]
        sides += [summary(_plain(one), case.size.pairs, case.size.shape.layers) for one in measured]
        details += [_plain(one) for one in measured]
    floors = {mode: floor_flops(case, mode) / case.size.pairs for mode in options.mode}
    return _facts(case, options) | {
        "ratios": ratios,
        "sides": sides,
        "tuned_micro_batch": tuned,
        "floor_flops_per_pair": floors,
        "measured": details,
    }


def _rival(case: Case, options: argparse.Namespace, name: str, mode: str, folder: Path) -> Side:
    steps = planned_steps(options.repeats)
    return Side(name, mode, steps, str(folder / mode / name), micro_batch=case.size.micro_batch)


def _plain(measured: Measured) -> dict[str, Any]:
    plain = asdict(measured)
    del plain["side"]["folder"]
    return plain | {
        "name": measured.side.name,
        "mode": measured.side.mode,
        "counted": measured.counted,
    }


def floor_flops(case: Case, mode: str) -> float:
    """Matrix products of a step that computes each prompt once, runs no reference and recomputes nothing."""
    from dpo.metrics import model_flops
    from dpo.policy import Sizes

    shape = case.size.shape
    body, head = shape.body_parameters, shape.vocabulary * shape.hidden
    adapter = shape.lora_parameters(case.size.lora_rank) if mode == "lora" else 0
    trained = (adapter, 0) if mode == "lora" else (body, head)
    sizes = Sizes(body + adapter + head, sum(trained), body + adapter, trained[0], head, trained[1])
    return model_flops(sizes, sum(case.tokens.values()), case.tokens["chosen"] + case.tokens["rejected"])


def _facts(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "compare_trl",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": options.command,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "threads": 1},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "case": case.facts(),
        "not_counted": "attention (torch's counter knows none on a CPU); copies from device to host, which would also"
        " synchronize; collectives of engines, which a single process does not have",
    }


def _headline(case: Case, record: dict[str, Any]) -> str:
    prompt, chosen, rejected = (case.tokens[name] / case.size.pairs for name in ("prompt", "chosen", "rejected"))
    ours = [side for side in record["sides"] if side["trainer"] == "ours"]
    above = ", ".join(
        f"{side['mode']} {side['flops_per_pair'] / record['floor_flops_per_pair'][side['mode']]:.2f}x" for side in ours
    )
    layout, reference = record["ratios"][0]["layout"], record["ratios"][0]["reference"]
    tuned = record["tuned_micro_batch"]
    return "\n".join(
        [
            f"{case.data[:80]}",
            f"{case.size.pairs} pairs of P {prompt:.0f} + C {chosen:.0f} + R {rejected:.0f} tokens;"
            f" (2P+C+R)/(P+C+R) = {case.prompt_factor:.2f}",
            f"ours: {layout}, reference {reference}; FLOPs above the floor: {above}",
            f"trl-default: micro-batch {case.size.micro_batch}" + (f"; trl-tuned: {tuned}" if tuned else ""),
            "",
        ]
    )


def _keep(record: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        write_record(Path(options.json), record)
    if options.record:
        data = "files" if options.data else options.lengths
        first = record["ratios"][0]
        stem = f"{record['date'][:10]}-compare-{data}-{first['layout']}-{first['reference']}"
        write_record(Path(options.record) / f"{stem}.json", record)
        title = f"{data}: {first['layout']}, reference {first['reference']}, one CPU thread, fp32"
        (Path(options.record) / f"{stem}.svg").write_text(plot(record["sides"], title))
        _say(f"kept {options.record}/{stem}.json and .svg")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
