"""Opens what a run is built from: shards, tokenizer, layout. Everything is refused here, before weights are read."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
