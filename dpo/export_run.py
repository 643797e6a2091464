"""A finished run -> an export that was checked; `python -m dpo.export` starts it."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from dpo.config import Config, ConfigError
from dpo.engine import DTYPES
from dpo.files import read_object
from dpo.model_card import model_card
from dpo.parity import Parity, check_parity
from dpo.policy import plain_base
from dpo.report.collect import config_of

Form = Literal["adapter", "model"]


class ParityError(RuntimeError):
    """The export is not what was trained; the message is one line."""


@dataclass(frozen=True)
class Exported:
    """What was written where, and how far it is from the run's own numbers."""

    directory: str
    form: Form
    files: list[str]
    num_bytes: int
    parity: Parity

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def told(self) -> str:
        """For people."""
        size = f"{len(self.files)} files, {self.num_bytes / 1e6:,.1f} MB"
        return f"{self.directory}: {self.form}, {size}\n{self.parity.told()}"


def export_run(
    run: Path, out: Path | None, *, form: Form | None, dtype: str | None, max_shard_size: str, check_pairs: int
) -> Exported:
    """Export a run's final model; the directory appears only once it was checked.

    Args:
        out: None: a folder of the form's name in the run directory.
        form: None: what was trained.
        dtype: of a model's weights; None: as the run left them (an adapter is merged in fp32, and then has the dtype of
            its base).

    Raises:
        ConfigError: there is no finished run, or it cannot be exported so.
        ParityError: what was written does not score as the run did.
    """
    transformers.utils.logging.disable_progress_bar()
    config, final = config_of(run), _final(run)
    is_adapter = (final / "adapter_config.json").is_file()
    if form == "adapter" and not is_adapter:
        raise ConfigError(f"{final} holds a whole model, not an adapter: drop --form adapter")
    form = form or ("adapter" if is_adapter else "model")
    directory = out or run / f"export-{form}"
    if directory.exists():
        raise ConfigError(f"{directory} is there already: remove it, or name another folder with --out")
    aside = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write(aside, config, final, form, dtype, max_shard_size)
        parity = check_parity(run, config, final, aside, check_pairs)
        if not parity.passed:
            raise ParityError(f"{directory}: not exported: {parity.told()}")
        (aside / "README.md").write_text(model_card(run, directory, config, form, parity), encoding="utf-8")
        os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = sum(path.stat().st_size for path in files)
    return Exported(str(directory), form, [str(path.relative_to(directory)) for path in files], sizes, parity)


def _final(run: Path) -> Path:
    status, final = read_object(run / "status.json"), run / "final"
    if status.get("state") != "finished" or not final.is_dir():
        state = status.get("state", "not begun")
        raise ConfigError(f"{run}: the run is {state}; finish it with the command that started it, then export")
    return final


def _write(aside: Path, config: Config, final: Path, form: Form, dtype: str | None, max_shard_size: str) -> None:
    trust = config.model.trust_remote_code
    if form == "adapter":
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy2(final / name, aside / name)
    else:
        model = _whole_model(config, final, None if dtype is None else DTYPES[dtype])
        model.save_pretrained(aside, max_shard_size=max_shard_size)
    AutoTokenizer.from_pretrained(final, trust_remote_code=trust).save_pretrained(aside)
    generation = _generation_config(config.model.path)
    if generation is not None:
        generation.save_pretrained(aside)


def _whole_model(config: Config, final: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The trained model; an adapter is merged in fp32."""
    trust = config.model.trust_remote_code
    if not (final / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(final, dtype=dtype or "auto", trust_remote_code=trust)
    base = plain_base(config.model, torch.float32)
    published = AutoModelForCausalLM.from_pretrained(config.model.path, dtype="auto", trust_remote_code=trust).dtype
    merged = PeftModel.from_pretrained(base, str(final)).merge_and_unload()
    return merged.to(dtype or published)  # type: ignore[return-value]


def _generation_config(path: str) -> GenerationConfig | None:
    """How the base model wants to be sampled, where it says so."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None
