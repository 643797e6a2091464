"""Checks before a run costs money: our scoring against the model's own logits, policy against reference."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from data_utils.batching import collate
from data_utils.schema import Layout, PairBatch, PairColumns, TokenizedPair
from dpo import attention, flash
from dpo.config import ConfigError
from dpo.engine import Engine
from dpo.logps import mean_gap
from dpo.policy import Policy, evaluating

if TYPE_CHECKING:
    from dpo.reference import Reference

logger = logging.getLogger("dpo")

SCORING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Nats per token between our scoring and the model's own logits, which bf16 models round to 8 bits."""
KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Error of a variable-length attention kernel, relative to its largest output or gradient: a hundredth by rounding in
bf16, about 1 where documents are aligned elsewhere."""
FALLBACKS: dict[Layout, tuple[Layout, ...]] = {
    "shared": ("packed", "padded"),
    "packed": ("padded",),
    "padded": (),
}
"""What `auto` tries when a layout fails the checks at the start."""
STEP0_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Nats per token between policy and reference before the first step."""


class GateError(ConfigError):
    """A check before training failed: the numbers would be wrong."""


def probe_batch(vocabulary: int, layout: Layout) -> PairBatch:
    """Two small pairs of arbitrary tokens, unequal in every length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (27,), generator=generator).tolist()
    first = TokenizedPair(tokens[:5], tokens[5:9], tokens[9:15], PairColumns(), "probe", 0)
    second = TokenizedPair(tokens[15:18], tokens[18:25], tokens[25:27], PairColumns(), "probe", 1)
    return collate([first, second], layout, pad_token_id=0)


def kernel_error(policy: Policy, device: torch.device, dtype: torch.dtype) -> float:
    """Error of the attention that a policy's layout would use on this rank's device; 0 where documents are taken one by
    one, infinite where it does not run (flash attention wants a GPU of 2020 or later).

    A flash implementation that is off is dropped for the next one. FlexAttention is dropped where it is off, since
    documents can be taken one by one instead.
    """
    if policy.layout == "padded":
        return 0.0
    while True:
        error = _kernel_error(policy, device, dtype)
        if error <= KERNEL_TOLERANCE[dtype] or device.type != "cuda":
            return error
        if flash.drop_first(f"its error is {error:.2g}"):
            continue
        if attention.FLEX_DEVICES and _needs_flex(policy):
            logger.warning("FlexAttention is not used (its error is %.2g): documents are taken one by one", error)
            attention.FLEX_DEVICES.clear()
            continue
        return error


def _heads(policy: Policy) -> attention.Heads:
    config = policy.causal_lm.config.get_text_config()
    num_heads = config.num_attention_heads
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads  # GPT-NeoX has none
    if hasattr(config, "v_head_dim"):  # latent attention (DeepSeek) rotates a part of each head of queries and keys
        return attention.Heads(
            num_heads, num_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return attention.Heads(num_heads, num_key_heads, size, size)


def _softcap(policy: Policy) -> float | None:
    return getattr(policy.causal_lm.config.get_text_config(), "attn_logit_softcapping", None)


def _has_sinks(policy: Policy) -> bool:
    return any(name.endswith(".sinks") for name, _ in policy.named_parameters())


def _needs_flex(policy: Policy) -> bool:
    heads = _heads(policy)
    return _softcap(policy) is not None or _has_sinks(policy) or not attention.fits_flash_sizes(heads)


def _kernel_error(policy: Policy, device: torch.device, dtype: torch.dtype) -> float:
    with_prefixes = policy.layout == "shared"
    try:
        return attention.kernel_error(
            _heads(policy), with_prefixes, device, dtype, _softcap(policy), _has_sinks(policy)
        )
    except (RuntimeError, TypeError) as error:  # also what torch.compile raises, and a package of other arguments
        logger.warning("attention over documents: %s", str(error).strip().split("\n")[0])
        return math.inf


def require_kernel(error: float, dtype: torch.dtype, layout: Layout) -> None:
    """Refuse a layout whose attention kernel does something else than it should on this device.

    Raises:
        GateError: the error exceeds the tolerance of the dtype.
    """
    if not error <= KERNEL_TOLERANCE[dtype]:
        raise GateError(
            f"batch.layout={layout}: this device's variable-length attention kernel is off by {error:.2g} (allowed"
            f" {KERNEL_TOLERANCE[dtype]:g}): it must align documents at the end of their keys;"
            f" set --batch.layout {FALLBACKS[layout][0]}"
        )


def scoring_gap(engine: Engine, vocabulary: int, device: torch.device) -> float:
    """Largest difference per token between our scoring and the model's own logits, over a few sequences, in nats.

    Every rank calls it, with adapters on: FSDP2 settles what it will compute in on its first forward, which must
    therefore not be one with the adapter off.
    """
    batch = probe_batch(vocabulary, engine.policy.layout).to(device)
    with evaluating(engine.policy):
        ours_S, _ = engine.forward(batch)
        own_S, _ = engine.forward(batch, own_logits=True)
    return mean_gap(ours_S, own_S, batch.response_lengths_S)


def require_scoring(gap: float, dtype: torch.dtype, model: str, layout: Layout) -> None:
    """Refuse a model whose logits we do not reproduce.

    Raises:
        GateError: the gap exceeds the tolerance of the dtype.
    """
    if gap > SCORING_TOLERANCE[dtype]:
        remedy = "try --batch.layout padded" if FALLBACKS[layout] else "its head does something we do not know"
        raise GateError(
            f"model.path={model}: our log-probs ({layout}) are {gap:.2g} nats per token off the model's own logits"
            f" (allowed {SCORING_TOLERANCE[dtype]:g}): {remedy}"
        )


def step0_gap(engine: Engine, reference: Reference, batch: PairBatch) -> float:
    """Largest difference per token between policy and reference on a batch, in nats; every rank calls it."""
    reference_logps_S = reference.logps(batch)
    with evaluating(engine.policy):
        policy_logps_S, _ = engine.forward(batch)
    return mean_gap(policy_logps_S, reference_logps_S, batch.response_lengths_S)


def require_step0(gap: float, dtype: torch.dtype, remedy: str) -> None:
    """Refuse a reference that is not the model before training; `remedy` says what to do then.

    Raises:
        GateError: the gap before the first step exceeds the tolerance of the dtype.
    """
    if gap > STEP0_TOLERANCE[dtype]:
        raise GateError(
            f"step 0: policy and reference differ by {gap:.2g} nats per token (allowed {STEP0_TOLERANCE[dtype]:g}):"
            f" {remedy}"
        )
