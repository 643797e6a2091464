"""The user's checker of answers, named as `module:function` or `path/to/file.py:function`.

    def obeys(pair: PreferencePair, answer: str) -> bool       # or a grade from 0 to 1

`pair` is the held-out row (its prompt, its two responses, its `source`), `answer` what the model said.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dpo.refusals import ConfigError

if TYPE_CHECKING:
    from data_utils.schema import PreferencePair

Checker = Callable[["PreferencePair", str], float]


def load_checker(name: str) -> Checker:
    """The checker of that name, which grades an answer from 0 to 1.

    Raises:
        ConfigError: there is no such module, file or function; or, when it is called, it fails or returns no grade.
    """
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name:
        raise ConfigError(f"eval.checker={name}: write module:function, or path/to/file.py:function")
    module = _load_file(Path(place), name) if place.endswith(".py") else _load_module(place, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"eval.checker={name}: {place} has no function {function_name!r}: define it, or name another")

    def check(pair: PreferencePair, answer: str) -> float:
        return _grade(function, pair, answer, name)

    return check


def _load_module(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise ConfigError(f"eval.checker={name}: cannot import {place} ({_one_line(error)})") from error


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"eval.checker={name}: {path} is not a file (paths are relative to where the run is started)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"eval.checker={name}: {path} fails ({_one_line(error)})") from error
    return module


def _grade(function: Callable[..., Any], pair: PreferencePair, answer: str, name: str) -> float:
    try:
        grade = function(pair, answer)
    except Exception as error:
        raise ConfigError(f"eval.checker={name} failed on {pair.where} ({_one_line(error)}): correct it") from error
    if not isinstance(grade, bool | int | float) or not 0 <= grade <= 1:
        raise ConfigError(f"eval.checker={name} gave {grade!r} for {pair.where}: return a bool or a number from 0 to 1")
    return float(grade)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
