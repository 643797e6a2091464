"""Opens what a run is built from: shards, tokenizer, layout. Everything is refused here, before weights are read."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data_utils.record import DataRecord
from data_utils.repeats import num_repeats, pair_hash
from data_utils.schema import DataError, Layout, RowError
from data_utils.scratch import Scratch
from data_utils.shards import ShardSet
from data_utils.skipped import Skipped
from data_utils.sources import SourceSpec
from dpo.config import Config, ConfigError, DataSource
from dpo.policy import Pretrained, add_lora, can_pack
from dpo.world import World

Result = TypeVar("Result")
CHECKED_PER_RANK = 50_000
"""Rows that a rank parses before the model is loaded (some seconds)."""


def open_shards(
    sources: tuple[str | DataSource, ...], config: Config, world: World, scratch: Scratch, record: DataRecord
) -> tuple[ShardSet, list[str]]:
    """The shards of a source list, and what to tell people about them.

    With on_bad_row=error rows are parsed now, each rank taking its share, unless a manifest says that they are sound
    or they are too many; the first bad one ends the run before the model is loaded.

    Raises:
        DataError: a file is missing or a row cannot be used, on every rank alike.
    """
    specs = [SourceSpec(entry) if isinstance(entry, str) else SourceSpec(**asdict(entry)) for entry in sources]
    shards = world.together(lambda: _readable(lambda: ShardSet.open(specs, scratch, record)))
    causes, first = shards.bad_rows()
    if config.data.on_bad_row == "skip":
        bad = Skipped(causes, dict.fromkeys(causes, "in its manifest"))
        bad.judge(len(shards), config.data.max_bad_fraction)
    elif causes:
        raise DataError(f"{first} ({causes.total()} bad rows in all, as its manifest says)")
    refuse = config.data.on_bad_row == "error"
    hashes = world.together(lambda: _readable(lambda: _parse_share(shards, world, refuse)))
    repeats = shards.num_repeats + num_repeats(world.gather_objects(hashes))
    notes = world.together(lambda: shards.notes() if world.is_main else [])
    if num_unparsed := _num_unparsed(shards, world):
        remedy = "python -m data_utils.manifest, over their folder, parses them once"
        notes.append(f"note: {num_unparsed} rows are parsed only when they are trained on; {remedy}")
    if repeats:
        notes.append(
            f"warning: {repeats} of {len(shards)} pairs repeat an earlier one; see python -m data_utils.doctor"
        )
    return shards, notes


def _readable(read: Callable[[], Result]) -> Result:
    """What `read` returns; a file that the system does not let us read is the data's fault."""
    try:
        return read()
    except OSError as error:
        problem = f"{error.filename or 'a shard'}: {error.strerror or error}"
        raise DataError(f"{problem}; see that the file is there and may be read") from error


def _parse_share(shards: ShardSet, world: World, refuse: bool) -> np.ndarray:
    """Parse this rank's share of the rows that no manifest has looked at, unless they are too many; hashes of the
    sound pairs, uint64."""
    hashes = array("Q")
    if _num_unparsed(shards, world):
        return np.frombuffer(hashes, np.uint64)
    for index in islice(chain.from_iterable(shards.unchecked()), world.rank, None, world.size):
        try:
            hashes.append(pair_hash(shards.pair(index)))
        except RowError:
            if refuse:
                raise
    return np.frombuffer(hashes, np.uint64)


def _num_unparsed(shards: ShardSet, world: World) -> int:
    """Rows that no manifest has looked at and that are too many to look at now."""
    num_rows = sum(map(len, shards.unchecked()))
    return num_rows if num_rows > CHECKED_PER_RANK * world.size else 0


def open_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        message = str(error).strip().split("\n")[0]
        raise ConfigError(f"model.path={config.model.path}: no tokenizer: {message}") from error


def choose_layout(config: Config, source: Pretrained) -> tuple[Layout, str]:
    """`batch.layout` with auto decided by the model, and why; also refuses LoRA targets and heads.

    Raises:
        ConfigError: packed rows were asked for and the model's layers carry state; LoRA targets match nothing; the
            output head cannot be scored.
    """
    model = source.empty(torch.float32)
    packs = can_pack(model)
    _check_head(config, model)
    if config.batch.layout == "packed" and not packs:
        raise ConfigError(
            f"batch.layout=packed: layers of {config.model.path} carry state across rows: set --batch.layout padded"
        )
    if config.batch.layout != "auto":
        return config.batch.layout, "as asked"
    if config.model.attn_implementation is not None:
        return "padded", "since model.attn_implementation is set"
    return ("packed", "no padding") if packs else ("padded", "the model's layers cannot keep packed rows apart")


def _check_head(config: Config, model: PreTrainedModel) -> None:
    if config.lora.r:
        with torch.device("meta"):
            add_lora(model, config.lora, config.train.seed)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        return
    if config.lora.r:
        raise ConfigError("lora.target_modules: the output head scores and cannot have an adapter: leave it out")
    raise ConfigError(
        f"model.path={config.model.path}: its output head is a {type(head).__name__}, not a plain nn.Linear"
    )
