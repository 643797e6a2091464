"""A run, finished or not -> an export that was checked; `python -m dpo.export` starts it."""

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
from dpo.export_checkpoint import config_and_state, is_checkpoint, newest, write_final
from dpo.files import read_object
from dpo.model_card import model_card
from dpo.parity import Parity, Trained, check_parity, load_plain
from dpo.pretrained import plain_base
from dpo.report.collect import config_of

Form = Literal["adapter", "model"]


class ParityError(RuntimeError):
    """The export is not what was trained; the message is one line."""


@dataclass(frozen=True)
class Exported:
    """What was written where, of which step, and how far it is from the run's own numbers."""

    directory: str
    step: int
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
        return f"{self.directory}: {self.form} after step {self.step}, {size}\n{self.parity.told()}"


def export_run(
    place: Path,
    out: Path | None,
    *,
    form: Form | None,
    dtype: str | None,
    max_shard_size: str,
    check_pairs: int,
    trust: bool = False,
) -> Exported:
    """Export a run's final model, or a checkpoint; the directory appears only once it was checked.

    Args:
        place: a run directory, whose newest checkpoint is taken where it has not finished; or a checkpoint.
        out: None: a folder of the form's name in the run directory.
        form: None: what was trained.
        dtype: of a model's weights; None: as the run left them (an adapter is merged in fp32, and then has the dtype of
            its base).
        trust: use a checkpoint of another user, or one that others may write to.

    Raises:
        ConfigError: there is nothing to export, or it cannot be exported so.
        CheckpointError: the checkpoint is damaged or not trusted.
        ParityError: what was written does not score as the run did.
    """
    transformers.utils.logging.disable_progress_bar()
    run, checkpoint = _found(place, trust)
    if trust and checkpoint is None:
        raise ConfigError(f"--trust is for checkpoints, but the run has finished: {run}/final is exported; drop it")
    config, state = (config_of(run), None) if checkpoint is None else config_and_state(checkpoint, trust)
    is_adapter = config.lora.r > 0 and not config.export.merge_lora
    if form == "adapter" and not is_adapter:
        raise ConfigError(f"{place} holds a whole model, not an adapter: drop --form adapter")
    form = form or ("adapter" if is_adapter else "model")
    directory = out or run / (f"export-{form}" if state is None else f"export-{form}-step-{state.step}")
    if directory.exists():
        raise ConfigError(f"{directory} is there already: remove it, or name another folder with --out")
    aside, final = (directory.with_name(f".{directory.name}.{part}") for part in ("part", "final"))
    for folder in (aside, final):
        shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        if checkpoint is None or state is None:
            trained = _final(run, config)
        else:
            trained = write_final(checkpoint, config, state, final)
        _write(aside, config, trained.folder, form, dtype, max_shard_size)
        parity = check_parity(run, config, trained, aside, check_pairs)
        if not parity.passed:
            raise ParityError(f"{directory}: not exported: {parity.told()}")
        card = model_card(run, directory, config, form, parity, trained.step)
        (aside / "README.md").write_text(card, encoding="utf-8")
        os.replace(aside, directory)
    finally:
        for folder in (aside, final):
            shutil.rmtree(folder, ignore_errors=True)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = sum(path.stat().st_size for path in files)
    names = [str(path.relative_to(directory)) for path in files]
    return Exported(str(directory), trained.step, form, names, sizes, parity)


def _found(place: Path, trust: bool) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint to export where it is not the final model."""
    if is_checkpoint(place):
        return place.resolve().parent.parent, place
    config_of(place)
    status = read_object(place / "status.json")
    if status.get("state") == "finished" and (place / "final").is_dir():
        return place, None
    checkpoint = newest(place, trust)
    if checkpoint is None:
        state = status.get("state", "not begun")
        remedy = "finish it with the command that started it, then export"
        raise ConfigError(f"{place}: the run is {state} and has no checkpoint; {remedy}")
    return place, checkpoint


def _final(run: Path, config: Config) -> Trained:
    step = read_object(run / "status.json").get("step", 0)
    name, evaluation = "the run's final model", "the run's last evaluation"
    return Trained(run / "final", step, name, evaluation, lambda: load_plain(config, run / "final"))


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
