"""From text to typed values: a YAML file and command-line flags, read by one rule.

YAML scalars are taken as written and read exactly as flags are, so that `1e-5` is a number, `on` is no boolean and
`010` is ten in both.
"""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dpo.refusals import ConfigError, unknown_name
from dpo.sections import Config, DataSource

RECORD_KEY = "record"
"""Top-level key of a run directory's config.yaml that holds versions, commit and world; not part of the config."""

_OTHER_WORDS = {
    "lr": "optim.learning_rate",
    "num_train_epochs": "train.epochs",
    "output_dir": "run.dir",
    "model_name_or_path": "model.path",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "per_device_train_batch_size": "batch.tokens_per_micro_batch",
    "gradient_accumulation_steps": "batch.pairs_per_step",
    "batch_size": "batch.pairs_per_step",
    "lr_scheduler_type": "optim.scheduler",
    "loss_type": "loss.type",
    "loss_weights": "loss.weights",
    "simpo_gamma": "loss.gamma",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
    "logging_steps": "log.every_steps",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "ref_model_sync_steps": "reference.sync_steps",
    "ref_model_mixup_alpha": "reference.mixup_alpha",
    "rank": "lora.r",
    "deepspeed": "parallel.ds_config",
}
"""What other trainers call it."""


@cache
def known_keys() -> dict[str, Any]:
    """Type of every "section.key"."""
    sections = get_type_hints(Config)
    return {f"{name}.{key}": hint for name, cls in sections.items() for key, hint in get_type_hints(cls).items()}


def default_of(key: str) -> Any:
    """The default of "section.key"; MISSING where it is required."""
    section, name = key.split(".")
    spec: Field[Any] = {f.name: f for f in fields(get_type_hints(Config)[section])}[name]
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def unknown_key(kind: str, key: str, where: str = "") -> ConfigError:
    """The error for a flag or YAML key that does not exist, with the nearest name that does."""
    name = key.removeprefix("--")
    dashes = key[: len(key) - len(name)]
    near = nearest_key(name)
    remedy = f"did you mean '{dashes}{near}'?" if near else "--help lists the known ones"
    return ConfigError(f"unknown {kind} {key!r}{where}: {remedy}")


def nearest_key(name: str) -> str | None:
    """The known key that `name` most likely means: by its last part alone, by another trainer's word, by spelling."""
    section, _, leaf = name.replace("-", "_").rpartition(".")
    same_leaf = [key for key in known_keys() if key.endswith(f".{leaf}")]
    if len(same_leaf) == 1:
        return same_leaf[0]
    if leaf in _OTHER_WORDS:
        return _OTHER_WORDS[leaf]
    siblings = [key.split(".")[1] for key in known_keys() if key.startswith(f"{section}.")]
    near = [f"{section}.{sibling}" for sibling in get_close_matches(leaf, siblings, n=1)]
    near += get_close_matches(name, known_keys(), n=1, cutoff=0.8)
    return near[0] if near else None


def coerce(key: str, raw: Any, hint: Any, where: str) -> Any:
    """`raw` (text, a list or a mapping of text; numbers, booleans and None too) as the type `hint`.

    Raises:
        ConfigError: one line that names the key, where it was set and what it takes.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(key, raw, hint, where)
    if origin is tuple:
        items = raw if isinstance(raw, list) else [] if _is_none(raw) else [raw]
        return tuple(coerce(key, item, get_args(hint)[0], where) for item in items)
    if is_dataclass(hint):
        return _coerce_source(key, raw, where)
    if isinstance(raw, list | dict) or raw is None:
        raise ConfigError(f"{key}{where}: expected {_describe(hint)}, found {_describe_raw(raw)}")
    value = _coerce_scalar(str(raw), hint)
    if value is None:
        raise ConfigError(f"{key}{where}: expected {_describe(hint)}, found {str(raw)!r}")
    return value


def _coerce_union(key: str, raw: Any, hint: Any, where: str) -> Any:
    options = get_args(hint)
    if type(None) in options and _is_none(raw):
        return None
    wanted = DataSource if isinstance(raw, dict) and DataSource in options else options[0]
    return coerce(key, raw, wanted, where)


def _is_none(raw: Any) -> bool:
    return raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null", "~", ""))


def _coerce_source(key: str, raw: dict[str, Any], where: str) -> DataSource:
    hints = get_type_hints(DataSource)
    for name in raw:
        if name not in hints:
            raise ConfigError(f"{key}{where}: {unknown_name('key', name, list(hints))}")
    if "path" not in raw:
        raise ConfigError(f"{key}{where}: a source needs a path, found {', '.join(raw) or 'nothing'}")
    return DataSource(**{name: coerce(f"{key}.{name}", value, hints[name], where) for name, value in raw.items()})


def _coerce_scalar(text: str, hint: Any) -> Any:
    """The value, or None where `text` is no `hint`."""
    if get_origin(hint) is Literal:
        return text if text in get_args(hint) else None
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower())
    if hint is str:
        return text
    assert hint in (int, float), hint
    try:
        value = hint(text)
    except ValueError:
        return None
    return value if hint is int or math.isfinite(value) else None


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]


def _describe_raw(raw: Any) -> str:
    if isinstance(raw, str):
        return repr(raw)
    return {list: "a list", dict: "a mapping"}.get(type(raw), "nothing")


def _is_list(key: str) -> bool:
    return get_origin(known_keys().get(key)) is tuple


def split_flags(argv: list[str]) -> dict[str, list[str]]:
    """Flags with their values, in either form: `--key value ...` or `--key=value`. The last one of a key counts.

    `--local_rank` is dropped: the deepspeed launcher adds it, and the rank comes from the environment.
    """
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for token in argv:
        if not token.startswith("--"):
            if current is None:
                raise ConfigError(f"unexpected argument {token!r}: flags are written --section.name value")
            current.append(token)
            continue
        name, equals, value = token.partition("=")
        current = [value] if equals else []
        if name in flags and _is_list(name.removeprefix("--")):
            raise ConfigError(f"{name} is given twice: list all its values after one flag")
        flags[name] = current
    return {name: values for name, values in flags.items() if name not in ("--local_rank", "--local-rank")}


def flag_values(flags: dict[str, list[str]]) -> dict[str, Any]:
    """Typed values by key of `--section.key` flags."""
    values = {}
    for flag, texts in flags.items():
        key = flag.removeprefix("--")
        if key not in known_keys():
            raise unknown_key("flag", flag)
        if not _is_list(key) and len(texts) != 1:
            raise ConfigError(f"{flag}: expected one value, found {' '.join(map(repr, texts)) or 'none'}")
        values[key] = coerce(flag, texts if _is_list(key) else texts[0], known_keys()[key], "")
    return values


def read_yaml(path: str) -> Any:
    """The file's content with every scalar as the text that is written; mappings with a key twice are refused."""
    import yaml

    class Loader(yaml.BaseLoader):
        """Scalars stay text; duplicate keys, which YAML forbids and PyYAML lets pass, are errors."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key, line = str(key_node.value), key_node.start_mark.line + 1
                if key in seen:
                    raise ConfigError(f"{path}:{line}: key {key!r} is given twice: keep one")
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader)  # noqa: S506  (BaseLoader builds text, lists and mappings only)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: malformed YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: malformed YAML: {str(error).splitlines()[0]}") from error


def yaml_values(document: Any, path: str) -> dict[str, Any]:
    """Typed values by key of a document of sections; `path` is for the messages."""
    if document in (None, ""):
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:', found {_describe_raw(document)}")
    values = {}
    sections = get_type_hints(Config)
    for section, entries in document.items():
        if section == RECORD_KEY:
            continue
        if section not in sections:
            raise ConfigError(f"{path}: {unknown_name('section', section, list(sections))}")
        if entries not in (None, "") and not isinstance(entries, dict):
            raise ConfigError(f"section {section!r} in {path}: expected keys below it, found {_describe_raw(entries)}")
        for name, raw in (entries or {}).items():
            key = f"{section}.{name}"
            if key not in known_keys():
                raise unknown_key("key", key, f" in {path}")
            values[key] = coerce(key, raw, known_keys()[key], f" in {path}")
    return values
