"""Opens what a run is built from: shards, tokenizer, layout. Everything is refused here, before weights are read."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data_utils.record import DataRecord
from data_utils.repeats import num_repeats, pair_hash
from data_utils.schema import DataError, Layout, PairBatch, RowError
from data_utils.scratch import Scratch
from data_utils.shards import ShardSet
from data_utils.skipped import Skipped
from data_utils.sources import SourceSpec
from dpo.config import Config, ConfigError, DataSource
from dpo.engine import Engine, Scorer
from dpo.gates import FALLBACKS, GateError, kernel_error, require_kernel, require_scoring, scoring_gap
from dpo.logps import Observer
from dpo.policy import Policy, add_lora, evaluating
from dpo.pretrained import Pretrained, can_pack
from dpo.quantize import Coverage, QuantizedLinear
from dpo.terminal import count
from dpo.world import World

logger = logging.getLogger("dpo")
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


def max_length(config: Config, source: Pretrained) -> int:
    """Longest sequence in tokens: `data.max_length`, or what the model has positions for."""
    positions = source.max_positions
    return config.data.max_length if positions is None else min(config.data.max_length, positions)


def choose_layout(config: Config, source: Pretrained, reference: Pretrained) -> tuple[Layout, str]:
    """`batch.layout` with auto decided by the models' configurations, and why; also refuses LoRA targets and heads.

    Raises:
        ConfigError: shared or packed rows were asked for and layers of the policy or of the reference carry state; LoRA
            targets match nothing; the output head cannot be scored.
    """
    model = source.empty(torch.float32)
    _check_head(config, model)
    models = {source.path: model}
    if reference.path != source.path:
        models[reference.path] = reference.empty(torch.float32)
    stateful = [path for path, model in models.items() if not can_pack(model)]
    asked = config.batch.layout
    if asked in ("shared", "packed") and stateful:
        raise ConfigError(
            f"batch.layout={asked}: layers of {stateful[0]} carry state across a row: set --batch.layout padded"
        )
    if asked != "auto":
        return asked, "as asked"
    if config.model.attn_implementation is not None:
        return "padded", "since model.attn_implementation is set"
    if stateful:
        return "padded", f"layers of {stateful[0]} carry state across a row"
    return "shared", "each prompt once, no padding"


def settle_layout(config: Config, source: Pretrained, engine: Engine, dtype: torch.dtype, world: World) -> str:
    """Hold attention kernel and scoring against what they should give; with `batch.layout=auto` the engine falls back
    from layout to layout. Returns why it did, or nothing.

    Raises:
        GateError: on every rank, when a layout that was asked for, or the last one, gives wrong numbers on any.
    """

    def worst(gap: float) -> float:
        return max(world.gather_objects(gap))

    failed: list[str] = []
    remaining = iter(FALLBACKS[engine.policy.layout] if config.batch.layout == "auto" else ())
    while True:
        layout = engine.policy.layout
        try:
            require_kernel(worst(kernel_error(engine.policy, world.device, dtype)), dtype, layout)
            gap = worst(scoring_gap(engine, source.text_config.vocab_size, world.device))
            require_scoring(gap, dtype, config.model.path, layout)
        except GateError as error:
            fallback = next(remaining, None)
            if fallback is None:
                raise
            logger.warning("%s rows: %s", layout, error)
            failed.append(layout)
            engine.policy.use_layout(fallback)
            continue
        return f"{' and '.join(failed)} rows did not pass the check at the start" if failed else ""


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


def describe_quantized(policy: Policy, source: Pretrained, dtype: torch.dtype) -> str:
    """What of a policy is quantized and what is not, in words; nothing, where nothing should be.

    Holds the layers that the engine has against those that the configuration promises, and what is trained against
    the adapters.
    """
    if source.quantization is None:
        return ""
    promised = Coverage.of(source.empty(dtype))
    layers = [module for module in policy.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == promised.num_layers, (len(layers), promised)
    assert all("lora_" in name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    text = f"{count(promised.num_weights)} weights of {promised.num_layers} linear layers in {source.quantization.kind}"
    others = ", ".join(["embeddings", "head", "norms", *promised.left])
    return f"{text}; {others} in {str(dtype).removeprefix('torch.')}"


def open_reference(config: Config, source: Pretrained) -> Pretrained:
    """The model that serves as the reference: `reference.path`, or the policy's own starting weights.

    Raises:
        ConfigError: `reference.path` is no model, or has no KL divergence to the policy.
    """
    path, model = config.reference.path, config.model
    if path is None:
        return source
    reference = Pretrained.open(path, model.attn_implementation, model.trust_remote_code, "reference.path")
    if config.measures_kl and not source.has_vocabulary_of(reference):
        raise ConfigError(f"eval.kl=true: {path} and {model.path} have other vocabularies: drop it")
    return reference


def open_scorer(config: Config, source: Pretrained, engine: Engine) -> Callable[[], Scorer]:
    """What makes the live reference that the config asks for; every rank calls it at the same moment.

    Args:
        source: what `open_reference` gave.
    """
    if config.reference_source == "adapter_off":
        return lambda: _adapter_off(engine)
    moves = config.reference.sync_steps is not None
    return lambda: engine.frozen_scorer(source, config.reference.offload, moves)


def _adapter_off(engine: Engine) -> Scorer:
    def score(batch: PairBatch, observe: Observer | None = None) -> Tensor:
        with evaluating(engine.policy), engine.policy.adapter_off():
            logps_S, _ = engine.forward(batch, observe=observe)
        return logps_S

    return score
