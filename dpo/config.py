"""The config of a run: default < `--config FILE.yaml` < flags.

`parse_config` is the one entry; `Config` and its sections are in `dpo.sections`. Imports neither torch nor
transformers, and tyro and PyYAML only when they are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict
from typing import Any, NoReturn, get_type_hints

from dpo.config_text import (
    RECORD_KEY,
    default_of,
    flag_values,
    known_keys,
    read_yaml,
    split_flags,
    yaml_values,
)
from dpo.refusals import ConfigError
from dpo.sections import (
    BatchSection,
    CheckpointSection,
    Config,
    DataSection,
    DataSource,
    EvalSection,
    ExportSection,
    LogSection,
    LoraSection,
    LossSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    ReferenceSection,
    RunSection,
    TrainSection,
)

__all__ = [
    "BatchSection",
    "CheckpointSection",
    "Config",
    "ConfigError",
    "DataSection",
    "DataSource",
    "EvalSection",
    "ExportSection",
    "LogSection",
    "LoraSection",
    "LossSection",
    "ModelSection",
    "OptimSection",
    "ParallelSection",
    "ReferenceSection",
    "RunSection",
    "TrainSection",
    "changed_keys",
    "load_record",
    "parse_config",
    "parse_or_exit",
    "to_dict",
    "to_yaml",
]

_SAME_TRAJECTORY = (
    "log.",
    "eval.",
    "checkpoint.",
    "run.",
    "export.",
    "parallel.",
    "train.stop_after_steps",
    "train.max_bad_steps",
    "train.gradient_checkpointing",
    "train.recompute",
    "train.activation_offload",
    "train.compile",
    "batch.tokens_per_micro_batch",
    "batch.layout",
    "model.attn_implementation",
    "data.eval",
    "data.on_bad_row",
    "data.max_bad_fraction",
    "data.num_workers",
    "reference.mode",
    "reference.offload",
    "reference.store",
)
"""Keys (or, with a dot at the end, sections) that may change on resume: training follows the same trajectory."""


def parse_config(argv: list[str]) -> Config:
    """The config of a command line (without the program's name).

    `--help` prints the help and `--print-config` the merged YAML; both raise `SystemExit(0)`.

    Raises:
        ConfigError: one line: which flag or file and key, what is wrong, what to do.
    """
    if "--help" in argv or "-h" in argv:
        print_help()
    flags = split_flags(argv)
    path = _take_one(flags, "--config")
    print_config = flags.pop("--print-config", None)
    if print_config:
        raise ConfigError(f"--print-config takes no value, found {' '.join(print_config)}")
    values = yaml_values(read_yaml(path), path) if path else {}
    config = build(values | flag_values(flags))
    if print_config is not None:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def parse_or_exit(argv: list[str]) -> Config:
    """`parse_config` for the tools: a ConfigError is printed and ends the program with exit code 2."""
    try:
        return parse_config(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def build(values: dict[str, Any]) -> Config:
    """The Config of typed values by "section.key", with defaults for the rest."""
    for key in known_keys():
        if key not in values and default_of(key) is MISSING:
            raise ConfigError(f"--{key} is missing: set it as a flag or in the file of --config")
    sections = {
        name: cls(**{key.split(".")[1]: value for key, value in values.items() if key.startswith(f"{name}.")})
        for name, cls in get_type_hints(Config).items()
    }
    return Config(**sections)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """section -> key -> value, of types that JSON and YAML know."""
    return {section: {k: _plain(v) for k, v in vars(getattr(config, section)).items()} for section in vars(config)}


def to_yaml(config: Config, record: dict[str, Any] | None = None) -> str:
    """The merged config as YAML that `--config` reads back to an equal config.

    Args:
        record: facts about the run (versions, commit, world) to keep below the config; ignored when read back.
    """
    import yaml

    document = to_dict(config) | ({RECORD_KEY: record} if record else {})
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def load_record(path: str) -> dict[str, Any]:
    """The document of a run directory's config.yaml, for `changed_keys`. Raises ConfigError."""
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: not a config written by a run")
    return document


def changed_keys(saved: Mapping[str, Any], current: Config) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ and would change the trajectory of training, as (key, saved value, current value).

    Args:
        saved: document of the run directory's config.yaml (`load_record`), or `to_dict` of a config. A key that it
            lacks counts as the default.
        current: the config of this command.
    """
    old = to_dict(build(yaml_values(dict(saved), "the run directory's config.yaml")))
    new = to_dict(current)
    return [
        (key, old[section][name], new[section][name])
        for key in known_keys()
        for section, name in [key.split(".")]
        if old[section][name] != new[section][name] and not key.startswith(_SAME_TRAJECTORY)
    ]


def print_help() -> NoReturn:
    """Write the help, generated from the sections and their docstrings, and raise SystemExit(0)."""
    from dpo.config_help import show_help

    show_help()
    raise SystemExit(0)


def _take_one(flags: dict[str, list[str]], name: str) -> str | None:
    values = flags.pop(name, None)
    if values is None:
        return None
    if len(values) != 1:
        raise ConfigError(f"{name}: expected one file, found {' '.join(map(repr, values)) or 'none'}")
    return values[0]


def _plain(value: Any) -> Any:
    if isinstance(value, DataSource):
        return asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
