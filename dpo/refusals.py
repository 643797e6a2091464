"""How config and checkpoints refuse: one line that says which key or file, what is wrong, and what to do."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches


class ConfigError(ValueError):
    """The config cannot be used; the message is one line: which key, what is wrong, what to set."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message is one line."""


class DiskError(CheckpointError):
    """A checkpoint could not be written, and nothing is wrong with what should be in it."""


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """ "unknown key 'optim.lr': did you mean 'optim.learning_rate'?", or where to look when no name is near."""
    near = get_close_matches(name, known, n=1)
    listed = f"known: {', '.join(known)}" if len(known) < 20 else "--help lists the known ones"
    return f"unknown {kind} {name!r}: " + (f"did you mean {near[0]!r}?" if near else listed)


def require(condition: bool, message: str) -> None:
    """Refuse unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def at_least(key: str, value: float | None, least: int) -> None:
    """Refuse a value below `least`."""
    require(value is not None and value >= least, f"{key} must be at least {least}, not {value}: set --{key}")


def positive(key: str, value: float) -> None:
    """Refuse a value that is not above 0."""
    require(value > 0, f"{key} must be above 0, not {value}: set --{key}")


def in_range(key: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside [low, high)."""
    require(low <= value < high, f"{key} must be in [{low}, {high}), not {value}: set --{key}")


def unchanged(section: object, prefix: str, names: tuple[str, ...], because: str, remedy: str) -> None:
    """Refuse an option that would be ignored: a field that differs from its default."""
    for spec in fields(section):  # type: ignore[arg-type]
        if spec.name in names and getattr(section, spec.name) != spec.default:
            raise ConfigError(f"{prefix}.{spec.name} does nothing with {because}: set {remedy}, or drop it")
