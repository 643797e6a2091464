"""The model card of an export: what it is, what was measured, how to load it, how it was made."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Literal

import yaml

from dpo.config import Config
from dpo.final import loading_code
from dpo.parity import Parity
from dpo.report.collect import collect


def model_card(
    run: Path, directory: Path, config: Config, form: Literal["adapter", "model"], parity: Parity, step: int
) -> str:
    """README.md with the metadata that the hub reads, of the weights after so many steps."""
    found = collect(run, in_detail=False, until=step)
    head = {
        "base_model": config.model.path,
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "preference-alignment", *(["lora"] if config.lora.r else [])],
    }
    what = "A LoRA adapter for" if form == "adapter" else "A model trained from"
    facts = "\n".join(f"- {name}: {_line(value)}" for name, value in found["facts"])
    settings = "\n".join(f"| `{key}` | {_line(value)} |" for key, value in found["changed"].items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {_line(run.name)}

{what} {_line(config.model.path)}, aligned to preferences by Direct Preference Optimization
([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)).

```python
{textwrap.dedent(loading_code(directory))}
```

## Measured

{_table(found, step)}

{_caution(found)}
Loaded in plain {"peft" if form == "adapter" else "transformers"}, its {parity.told()}.

## How it was made

{facts}

| setting | value |
|---|---|
{settings}

Repository commit `{found["reproduce"]["commit"]}`; command `{found["reproduce"]["command"]}`.
"""


def _table(found: dict[str, Any], step: int) -> str:
    """Before and after of each evaluation set."""
    sets = found["before_after"].get("sets")
    if not sets:
        return "Nothing: there was no evaluation."
    measured = found["before_after"]["step"]
    lines = [] if measured == step else [f"These weights are of step {step}; the evaluation is of step {measured}.", ""]
    for name, one in sets.items():
        title = f"{one['pairs']} held-out pairs" + (f" of {name}" if name else "")
        lines += [f"| {title} | before | after |", "|---|---|---|"]
        lines += [f"| {label} | {_number(before)} | {_number(after)} |" for _, label, before, after in one["rows"]]
        lines.append("")
    return "\n".join(lines).strip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _caution(found: dict[str, object]) -> str:
    warnings = found["warnings"]
    assert isinstance(warnings, list)
    return "".join(f"{_line(warning)}\n\n" for warning in warnings)


def _line(text: str) -> str:
    """On one line, and no markup of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
