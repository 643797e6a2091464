"""Check DeepSpeed JSON files: `python -m launch.ds_lint [--json FILE] FILE ...`.

One line per problem: keys that DeepSpeed does not know (at top level it is silent, and trains at stage 0 with
`zero_optimisation`), that it has removed, or that the config owns, such as batch sizes; values that cannot work, such
as page-locked buffers beyond this machine's memory. Exit code 0, or 2 when there is any. The trainer refuses the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dpo.ds_json import load_ds_json, problems
from dpo.nvme import with_buffers
from dpo.refusals import ConfigError


def lint(path: str) -> list[str]:
    """Everything that is wrong with a file, a line each."""
    try:
        raw = load_ds_json(path)
    except ConfigError as error:
        return [str(error)]
    found = list(problems(raw))
    if not found:
        try:
            with_buffers(raw["zero_optimization"], share=1, dtype_bytes=2, ranks_here=1, will_lock=False)
        except ConfigError as error:
            found = [str(error)]
    return [f"{path}: {problem}" for problem in found]


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.ds_lint", description=__doc__, formatter_class=Raw)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="write {file: [problem, ...]} there")
    options = parser.parse_args(argv)
    found = {path: lint(path) for path in options.files}
    for path, lines in found.items():
        print("\n".join(lines) if lines else f"{path}: ok", file=sys.stderr if lines else sys.stdout)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 2 if any(found.values()) else 0


Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
