"""`python -m dpo.evaluate --model M --data PATH ...`: scores preference pairs with any model; needs no training run.

Nothing heavy is imported here, so that its --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo.signals import StopRequest
    from dpo.world import World

DESCRIPTION = """Score preference pairs with a model: how likely it finds chosen and rejected, and which it prefers.

- M is a model of transformers (a folder or a hub name), or the folder of a peft adapter.
- An adapter is held against its base model, a model against --reference; that gives rewards, their accuracy and margin,
  the DPO loss and the drift, as the trainer logs them. A model without --reference gets the likelihoods alone.
- Several ranks share the pairs: python launch/local.py -n 2 -m dpo.evaluate ...; each holds the whole model."""
EPILOG = "exit codes: 0 scored; 2 the model, the data or the arguments cannot be used."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo.evaluate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="folder or hub name of a model, or folder of an adapter")
    add("--data", required=True, nargs="+", metavar="PATH", help="shards, as the trainer's data.eval; each is a set")
    add("--reference", metavar="M", help="another model to hold it against (default: an adapter's base; else none)")
    add("--beta", type=float, metavar="B", help="of rewards and loss (default 0.1)")
    add("--max_length", type=int, default=1024, metavar="N", help="as the trainer's data.max_length (default 1024)")
    add(
        "--layout", choices=("auto", "padded", "packed", "shared"), default="auto", help="as the trainer's batch.layout"
    )
    add("--tokens", type=int, default=8192, metavar="N", help="tokens that a rank computes at a time (default 8192)")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of compute (default: bfloat16 on a GPU)",
    )
    add(
        "--quantization",
        choices=("auto", "none", "nf4", "int8"),
        default="auto",
        help="of M's base (default: that of the run whose directory the adapter's folder is in; else none)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU per rank where there is one")
    add("--on_bad_row", choices=("error", "skip"), default="error", help="as the trainer's data.on_bad_row")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--json", metavar="FILE", type=Path, help="the metrics, for programs")
    add("--pairs", metavar="FILE", type=Path, help="every pair, one JSON object per line")
    return parser


def main(argv: Sequence[str]) -> int:
    """Score and print; returns the exit code."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    for path in (arguments.json, arguments.pairs):
        if path is not None and not path.parent.is_dir():
            command_line.error(f"{path}: there is no folder {path.parent}: make it first")
    from dpo.config import ConfigError
    from dpo.evaluate_model import Target, config_for
    from dpo.session import tool_session

    try:
        target = Target.of(arguments.model, arguments.reference, arguments.beta, arguments.quantization)
        config = config_for(arguments, target)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def work(world: World, stop: StopRequest) -> bool:
        from dpo.evaluate_model import evaluate_model

        evaluate_model(config, target, world, stop, json_file=arguments.json, pairs_file=arguments.pairs)
        return True

    return tool_session(config, work)


if __name__ == "__main__":
    from dpo.session import end_process

    end_process(main(sys.argv[1:]))
