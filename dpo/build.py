"""Opens what a run is built from: shards, tokenizer, layout. Everything is refused here, before weights are read."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_utils.schema import Layout
from data_utils.shards import ShardSet, SourceSpec
from dpo.config import Config, ConfigError, DataSource
from dpo.policy import Pretrained, add_lora, can_pack
from dpo.world import World


def open_shards(sources: tuple[str | DataSource, ...], config: Config, world: World) -> ShardSet:
    """The shards of a source list; with on_bad_row=error every row is parsed now, each rank taking its share.

    Raises:
        DataError: a file is missing or a row cannot be used, on every rank alike.
    """
    specs = [entry if isinstance(entry, str) else SourceSpec(entry.path, entry.name) for entry in sources]
    shards = world.together(lambda: ShardSet.open(specs))

    def check() -> None:
        for problem in shards.check(range(world.rank, len(shards), world.size)):
            raise problem

    if config.data.on_bad_row == "error":
        world.together(check)
    return shards


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


def choose_layout(config: Config, source: Pretrained) -> Layout:
    """`batch.layout`, with auto decided by the model; also refuses LoRA targets and heads before weights are read.

    Raises:
        ConfigError: packed rows were asked for and the model's layers carry state; LoRA targets match nothing.
    """
    empty = source.empty(torch.float32)
    packs = can_pack(empty)
    if config.batch.layout == "packed" and not packs:
        raise ConfigError(
            f"batch.layout=packed: layers of {config.model.path} carry state across rows: set --batch.layout padded"
        )
    layout: Layout = "packed" if packs and config.model.attn_implementation is None else "padded"
    layout = layout if config.batch.layout == "auto" else config.batch.layout
    if config.lora.r:
        with torch.device("meta"):
            add_lora(empty, config.lora, config.train.seed)
    return layout
