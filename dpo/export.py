"""`python -m dpo.export RUN`: what a run has trained, as a model to hand on, held against the run's own numbers.

Nothing heavy is imported here, so that its --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """Export what a run has trained: a peft adapter, or a model in sharded safetensors, with tokenizer, chat
template, generation config and a model card that holds the measured numbers. Of a run that has not finished, the newest
checkpoint; of any run, a checkpoint that is named.

The export is then loaded as anybody would load it, in plain transformers or peft, and must give the log-probs of
held-out pairs that the run's evaluation at that step has recorded (without one: those of what was trained)."""
EPILOG = """exit codes: 0 exported and checked; 2 nothing to export, or bad arguments; 3 the checkpoint is damaged, or
the export does not give the run's log-probs (nothing is left behind)."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo.export",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory (run.dir), or one of its checkpoints")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to (default RUN/export-adapter or RUN/export-model, with -step-N of a checkpoint)",
    )
    parser.add_argument(
        "--form",
        choices=("adapter", "model"),
        help="the adapter alone, or a whole model with the adapter merged into it (default: what was trained)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of a model's weights (default: as final/ has them)"
    )
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a model's files (default 5GB)")
    parser.add_argument("--check_pairs", type=int, default=16, metavar="N", help="pairs to check with (default 16)")
    parser.add_argument(
        "--trust", action="store_true", help="use a checkpoint of another user, or one that others may write to"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="what was exported and how it was checked, for programs"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Export and check; returns the exit code."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    if arguments.check_pairs < 1:
        command_line.error(f"--check_pairs must be at least 1, not {arguments.check_pairs}")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        command_line.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}: make it first")
    if arguments.form == "adapter" and arguments.dtype is not None:
        command_line.error("--dtype does nothing with --form adapter, which stays in float32: drop it")
    from dpo.session import quiet

    quiet()
    from data_utils.schema import DataError
    from dpo.export_run import ParityError, export_run
    from dpo.refusals import CheckpointError, ConfigError

    try:
        done = export_run(
            arguments.run,
            arguments.out,
            form=arguments.form,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            check_pairs=arguments.check_pairs,
            trust=arguments.trust,
        )
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(done.facts(), indent=1) + "\n", encoding="utf-8")
    except (ConfigError, DataError) as error:
        return _refuse(str(error), 2)
    except OSError as error:
        return _refuse(f"{error.filename or arguments.run}: {error.strerror or error}", 2)
    except (CheckpointError, ParityError) as error:
        return _refuse(str(error), 3)
    print(done.told())
    return 0


def _refuse(reason: str, code: int) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
