"""Submit launch/slurm.sbatch: `launch/submit.sh --nodes 4 --gpus 8 [options] [--config FILE] [flags of train_dpo.py]`.

Options may also stand in a small YAML file, `--cluster FILE`, one `name: value` a line; those of the command line win.
DRY_RUN=1 prints the sbatch command and what the job would run. Values reach SLURM as they are and are never evaluated.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
BATCH = ROOT / "launch" / "slurm.sbatch"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+:@/-]*")
_TIME = re.compile(r"\d+(-\d+(:\d+){0,2})?|\d+(:\d+){1,2}")


def fail(message: str) -> NoReturn:
    """Say it in one line and end with exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def number(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else count(text)


def name(text: str) -> str:
    """A name that SLURM takes for nothing else, such as an option."""
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: letters, digits and _.,+:@/-, not first a dash")
    return text


def time_limit(text: str) -> str:
    """SLURM's minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
    if not _TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit such as 24:00:00 or 2-12")
    return text


def container_image(text: str) -> str:
    """A path or an image of a registry."""
    if not text or text.startswith("-") or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no image")
    return text


def parser() -> Parser:
    """The options; `dest` is also the name in the YAML file."""
    found = Parser(prog="launch/submit.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cluster", metavar="FILE", help="YAML file with any of the options below")
    found.add_argument("--nodes", type=count, help="nodes (default 1)")
    found.add_argument("--gpus", type=count, help="GPUs, and so ranks, per node (default 1)")
    found.add_argument("--no-gpus", action="store_const", const=True, help="--gpus counts ranks on the CPU")
    found.add_argument("--cpus-per-task", type=count, help="cores per rank (default 8)")
    found.add_argument("--mem", type=name, help="memory per node, such as 900G (default: all of it)")
    found.add_argument("--time", type=time_limit, help="time limit (default 24:00:00); the job is requeued after it")
    found.add_argument("--partition", type=name)
    found.add_argument("--account", type=name)
    found.add_argument("--qos", type=name)
    found.add_argument("--constraint", type=name)
    found.add_argument("--reservation", type=name)
    found.add_argument("--job-name", type=name, help="(default dpo)")
    found.add_argument("--warn-seconds", type=count, help="signal so long before the time limit (default 300)")
    found.add_argument("--max-restarts", type=number, help="requeue so often at most (default 50)")
    found.add_argument("--container", type=container_image, help="IMAGE.sif for Apptainer, else an image for pyxis")
    return found


DEFAULTS = {
    "nodes": 1,
    "gpus": 1,
    "no_gpus": False,
    "cpus_per_task": 8,
    "mem": "0",
    "time": "24:00:00",
    "job_name": "dpo",
    "warn_seconds": 300,
    "max_restarts": 50,
}
_PASSED_ON = ("partition", "account", "qos", "constraint", "reservation", "mem", "time", "job_name", "cpus_per_task")


def read_cluster(path: str) -> list[str]:
    """The options of a YAML file as a command line has them, so that both are checked in one way."""
    import yaml

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)  # noqa: S506 (text only)
    except OSError as error:
        fail(f"--cluster {path}: {error.strerror}")
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"--cluster {path}: malformed YAML: {error}")
    if not isinstance(content, dict):
        fail(f"--cluster {path}: expected lines such as `partition: gpu`")
    known = {action.dest for action in parser()._actions} - {"help", "cluster"}
    words = []
    for key, value in content.items():
        if key.replace("-", "_") not in known:
            fail(f"--cluster {path}: unknown option {key!r}: one of {', '.join(sorted(known))}")
        if not isinstance(value, str):
            fail(f"--cluster {path}: {key} takes one value")
        if key.replace("-", "_") == "no_gpus":
            words += ["--no-gpus"] if value == "true" else []
        else:
            words.append(f"--{key.replace('_', '-')}={value}")
    return words


def parse(argv: list[str]) -> tuple[dict[str, object], list[str]]:
    """The options (defaults < file < command line) and the flags of train_dpo.py, which come after them."""
    split = next((at for at, word in enumerate(argv) if word == "--config" or re.match(r"--[a-z]+\.", word)), len(argv))
    options = vars(parser().parse_args(argv[:split]))
    from_file = vars(parser().parse_args(read_cluster(options["cluster"]))) if options["cluster"] else {}
    merged = dict(DEFAULTS)
    for layer in (from_file, options):
        merged |= {key: value for key, value in layer.items() if value is not None}
    return merged, argv[split:]


def sbatch_command(options: dict[str, object], flags: list[str]) -> list[str]:
    """The sbatch command line."""
    command = ["sbatch", f"--nodes={options['nodes']}", f"--ntasks-per-node={options['gpus']}"]
    if not options["no_gpus"]:
        command.append(f"--gres=gpu:{options['gpus']}")
    for key in _PASSED_ON:
        if key in options:
            command.append(f"--{key.replace('_', '-')}={options[key]}")
    command.append(f"--signal=B:USR1@{options['warn_seconds']}")
    return [*command, str(BATCH), *flags]


def environment(options: dict[str, object]) -> dict[str, str]:
    """What the batch script reads; through the environment, since sbatch's --export would split values at commas."""
    variables = {"DPO_ROOT": str(ROOT), "DPO_MAX_RESTARTS": str(options["max_restarts"])}
    return variables | ({"DPO_CONTAINER": str(options["container"])} if "container" in options else {})


def main(argv: list[str]) -> int:
    """Submit, or print what would be; returns the exit code."""
    options, flags = parse(argv)
    command, variables = sbatch_command(options, flags), environment(options)
    if os.environ.get("DRY_RUN") != "1":
        try:
            return subprocess.run(command, env=os.environ | variables, check=False).returncode
        except FileNotFoundError:
            fail("sbatch was not found: submit from a login node of the cluster")
    print(" ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items()), shlex.join(command), flush=True)
    allocation = {
        "SLURM_NNODES": str(options["nodes"]),
        "SLURM_NTASKS_PER_NODE": str(options["gpus"]),
        "SLURM_CPUS_PER_TASK": str(options["cpus_per_task"]),
    }
    return subprocess.run(["bash", str(BATCH), *flags], env=os.environ | variables | allocation, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
