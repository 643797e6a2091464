"""`--help`: tyro writes it from the sections, their types and the docstrings below each field."""

from __future__ import annotations

import contextlib

import tyro

from dpo.sections import Config, DataSource

_DESCRIPTION = """Align a causal language model to preferences with DPO (arXiv 2305.18290).

- Settings are merged as default < --config FILE.yaml < flags.
- The file holds the sections below as mappings; --print-config shows the merge.
- Booleans are true or false, lists are separated by spaces, none unsets a key.
- model.path, data.train and run.dir are required."""


PROGRAM = "train_dpo.py [--config FILE.yaml] [--print-config]"


def show_help(program: str = PROGRAM, description: str = _DESCRIPTION) -> None:
    """Print the help of a program that takes this config to stdout."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_boolean)
    registry.primitive_rule(_source)
    with contextlib.suppress(SystemExit):
        tyro.cli(
            Config,
            args=["--help"],
            prog=program,
            description=description,
            use_underscores=True,
            registry=registry,
            config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
        )


def _boolean(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[bool] | None:
    """Booleans as `parse_config` reads them."""
    if info.type is not bool:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="true|false",
        instance_from_str=lambda texts: texts[0].lower() == "true",
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
    )


def _source(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
    """A path; the mapping form of a source exists in YAML only."""
    if info.type != str | DataSource:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )
