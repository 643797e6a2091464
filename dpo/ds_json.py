"""Reading, checking and completing a DeepSpeed JSON, without importing DeepSpeed.

The file holds ZeRO knobs only; batch sizes, clipping, precision, optimizer and schedule come from the config.
DeepSpeed lets unknown top-level keys pass silently (`zero_optimisation` would train at stage 0), so they are refused
here. The names are those that deepspeed 0.19.8 reads (`runtime/config.py`, `runtime/zero/config.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal

from dpo.refusals import ConfigError
from dpo.sections import SHIPPED_DS_CONFIGS

DEEPSPEED_VERSION = "0.19.8"
"""The release that the names below were taken from."""

ALLOWED_KEYS = frozenset(
    "aio comms_logger compile disable_allgather disable_python_gc dump_state flops_profiler log_level memory_breakdown "
    "steps_per_print timers vocabulary_size wall_clock_breakdown zero_optimization".split()
)
"""Top-level keys that a file may have: ZeRO itself, its transport and its diagnostics."""

_FROM_CONFIG = {
    "train_batch_size": "set --batch.pairs_per_step instead",
    "train_micro_batch_size_per_gpu": "set --batch.tokens_per_micro_batch instead",
    "gradient_accumulation_steps": "it follows from --batch.pairs_per_step and --batch.tokens_per_micro_batch",
    "gradient_clipping": "set --optim.max_grad_norm instead",
    "fp16": "set --model.dtype instead",
    "bf16": "set --model.dtype instead",
    "bfloat16": "set --model.dtype instead",
    "torch_autocast": "set --model.dtype instead",
    "data_types": "set --model.dtype instead; gradients are always summed in float32",
    "communication_data_type": "gradients are always reduced in float32",
    "optimizer": "set --optim.name and the keys beside it instead",
    "scheduler": "set --optim.scheduler instead",
    "zero_allow_untested_optimizer": "the trainer sets it",
    "zero_force_ds_cpu_optimizer": "the trainer sets it",
    "managed_gradient_accumulation": "the trainer marks the end of a step itself",
    "gradient_allreduce_op": "the trainer weighs pairs itself",
    "prescale_gradients": "the trainer weighs pairs itself",
    "gradient_predivide_factor": "the trainer weighs pairs itself",
    "activation_checkpointing": "set --train.gradient_checkpointing instead",
    "checkpoint": "set --checkpoint.every_steps and the keys beside it instead",
    "datastates_ckpt": "set --checkpoint.every_steps and the keys beside it instead",
    "tensorboard": "set --log.tensorboard instead",
    "wandb": "set --log.wandb instead",
    "comet": "metrics are in metrics.jsonl and, with --log.tensorboard, in TensorBoard",
    "csv_monitor": "metrics are in metrics.jsonl and, with --log.tensorboard, in TensorBoard",
    "dataloader_drop_last": "the trainer reads and orders the data itself",
    "data_efficiency": "the trainer reads and orders the data itself",
}
"""Top-level keys whose owner is the config, with what to set there."""

_UNSUPPORTED_KEYS = frozenset(
    "autotuning expert_parallel hybrid_engine pipeline seq_parallel_communication_data_type sequence_parallel_size "
    "tensor_parallel use_data_before_expert_parallelism weight_quantization".split()
)
"""Top-level keys of features that this trainer does not drive."""

_REMOVED_KEYS = frozenset(
    "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop "
    "quantize_training sparse_attention sparse_gradients".split()
)
"""Top-level keys that DeepSpeed has dropped."""

KNOWN_KEYS = ALLOWED_KEYS | frozenset(_FROM_CONFIG) | _UNSUPPORTED_KEYS | _REMOVED_KEYS

_STAGE3_KEYS = frozenset(
    "allgather_sequential gather_16bit_weights_on_model_save max_live_parameters max_reuse_distance "
    "model_persistence_threshold module_granularity_threshold param_persistence_threshold prefetch_bucket_size "
    "use_all_reduce_for_fetch_params".split()
)
"""Keys that DeepSpeed also takes with the prefix `stage3_`."""

ZERO_KEYS = (
    frozenset(
        "allgather_bucket_size allgather_partitions contiguous_gradients enable_sanity_checks "
        "ignore_unused_parameters leaf_module legacy_stage1 log_trace_cache_warnings "
        "memory_efficient_linear offload_optimizer offload_param overlap_comm override_module_apply "
        "parameter_alignment reduce_bucket_size reduce_scatter "
        "save_muon_momentum_buffer_in_memory stage sub_group_size use_multi_rank_bucket_allreduce "
        "zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights "
        "zenflow".split()
    )
    | _STAGE3_KEYS
    | frozenset(f"stage3_{key}" for key in _STAGE3_KEYS)
)
"""Keys of `zero_optimization`."""

_ONLY_STAGE3_KEYS = frozenset(
    "offload_param zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights "
    "zero_quantized_weights".split()
)
"""Keys that stages 1 and 2 would ignore, beside those with the prefix `stage3_`."""

_OWN_CHECKPOINTS = "the trainer writes checkpoints of its own, for any number of ranks: drop it"

_REFUSED_ZERO_KEYS = {
    "elastic_checkpoint": _OWN_CHECKPOINTS,
    "load_from_fp32_weights": _OWN_CHECKPOINTS,
    "pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "round_robin_gradients": f"DeepSpeed {DEEPSPEED_VERSION} takes other weights for a parameter's with it: drop it",
    "compute_grad_norm": "the gradient norm is always logged, and clipping needs it: drop it",
    "cpu_offload": 'deprecated: use "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'deprecated: use "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "deprecated: set pin_memory in offload_optimizer or offload_param",
    "stage3_gather_fp16_weights_on_model_save": "deprecated: use stage3_gather_16bit_weights_on_model_save",
    "mics_shard_size": "removed from DeepSpeed: drop it",
    "mics_hierarchical_params_gather": "removed from DeepSpeed: drop it",
    "zeropp_loco_param": "removed from DeepSpeed: drop it",
}

OFFLOAD_KEYS = {
    "offload_param": frozenset("device nvme_path buffer_count buffer_size max_in_cpu pin_memory".split()),
    "offload_optimizer": frozenset(
        "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
        "cpuadam_cores_perc".split()
    ),
}


def read_ds_json(path: str) -> dict[str, Any]:
    """The checked content of a DeepSpeed JSON that holds ZeRO knobs only.

    Raises:
        ConfigError: the file is missing or malformed (file:line), or a key is unknown, removed, or the config's.
    """
    raw = load_ds_json(path)
    for problem in problems(raw):
        raise ConfigError(f"{path}: {problem}")
    return raw


def problems(raw: dict[str, Any]) -> Iterator[str]:
    """All that is wrong with the content of a DeepSpeed JSON, each in one line: what, and what to do."""
    for key in raw:
        yield from _top_level(key)
    yield from _zero(raw.get("zero_optimization"))
    yield from _values(raw, "")


def complete_ds_json(
    raw: dict[str, Any], *, dtype: Literal["bfloat16", "float32"], world_size: int, max_grad_norm: float
) -> dict[str, Any]:
    """`raw` with everything that the config owns: the dictionary for `deepspeed.initialize`.

    Args:
        raw: what `read_ds_json` returned.
        dtype: dtype of compute. Master weights, accumulated gradients and reductions are float32 for both.
        world_size: processes.
        max_grad_norm: bound of the global gradient norm; 0: no clipping.
    """
    return raw | {
        # Micro-batches differ in size and number: the trainer weighs pairs and tells DeepSpeed where a step ends.
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # the default under bf16 is bf16
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's AdamW: no compiler needed at run time
        "zero_force_ds_cpu_optimizer": False,  # the same under optimizer offload
    }


def load_ds_json(path: str) -> dict[str, Any]:
    """The object in a file, whatever its keys. Raises ConfigError (file:line) where there is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            raw = json.load(file, object_pairs_hook=lambda pairs: _without_duplicates(path, pairs))
    except OSError as error:
        remedy = f"give a DeepSpeed JSON such as {SHIPPED_DS_CONFIGS}"
        raise ConfigError(f"--parallel.ds_config {path}: {error.strerror}: {remedy}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--parallel.ds_config {path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object with zero_optimization")
    return raw


def _without_duplicates(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ConfigError(f"{path}: key {key!r} is given twice: keep one")
        mapping[key] = value
    return mapping


def _top_level(key: str) -> Iterator[str]:
    if key in ALLOWED_KEYS:
        return
    if key in _FROM_CONFIG:
        yield f"{key!r} belongs to the config, not to the DeepSpeed JSON: {_FROM_CONFIG[key]}"
    elif key in _REMOVED_KEYS:
        yield f"{key!r} was removed from DeepSpeed: drop it"
    elif key in _UNSUPPORTED_KEYS:
        yield f"{key!r} is a DeepSpeed feature that this trainer does not use: drop it"
    else:
        yield _unknown(key, KNOWN_KEYS, "")


def _zero(zero: Any) -> Iterator[str]:
    if not isinstance(zero, dict):
        yield 'zero_optimization is missing: add "zero_optimization": {"stage": 2}'
        return
    for key in zero:
        if key in _REFUSED_ZERO_KEYS:
            yield f"zero_optimization.{key}: {_REFUSED_ZERO_KEYS[key]}"
        elif key not in ZERO_KEYS:
            yield _unknown(key, ZERO_KEYS, "zero_optimization.")
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        yield f"zero_optimization.stage must be 1, 2 or 3, not {json.dumps(stage)}"
    elif stage != 3:
        ignored = [key for key in zero if key in _ONLY_STAGE3_KEYS or key.startswith("stage3_")]
        for key in ignored:
            yield f"zero_optimization.{key} needs stage 3, not {stage}"
    for name, known in OFFLOAD_KEYS.items():
        yield from _offload(f"zero_optimization.{name}", zero.get(name), known)


def _offload(name: str, offload: Any, known: frozenset[str]) -> Iterator[str]:
    if offload is None:
        return
    if not isinstance(offload, dict):
        yield f'{name} must be an object such as {{"device": "cpu"}}'
        return
    for key in offload:
        if key not in known:
            yield _unknown(key, known, f"{name}.")
    device = offload.get("device")
    if device not in ("none", "cpu", "nvme"):
        yield f'{name}.device must be "cpu", "nvme" or "none", not {json.dumps(device)}'
    if device == "nvme" and name.endswith("offload_optimizer"):
        yield f'{name}.device: checkpoints cannot be read from "nvme": use "cpu"'
    if device == "nvme" and not isinstance(offload.get("nvme_path"), str):
        yield f'{name}.nvme_path is missing: name a folder on the local disk, such as "/local_nvme"'


def _values(value: Any, name: str) -> Iterator[str]:
    """Refuse "auto", which is the Hugging Face Trainer's and no value of DeepSpeed's."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _values(entry, f"{name}.{key}" if name else key)
    elif value == "auto":
        yield f'{name} is "auto", which only the Hugging Face Trainer fills in: drop the key'


def _unknown(key: str, known: frozenset[str], prefix: str) -> str:
    near = get_close_matches(key, sorted(known), n=1)
    remedy = f"did you mean {prefix + near[0]!r}?" if near else f"deepspeed {DEEPSPEED_VERSION} knows no such key"
    return f"unknown key {prefix + key!r}: {remedy}"
