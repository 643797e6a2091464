"""The load-balancing loss of mixtures of experts, pair by pair, whatever the layout.

Of Switch Transformers (arXiv 2101.03961, Eqs. 4-6), as transformers computes it for one pair's two sequences: with f_e
how many of a token's choices fall on expert e and p_e its probability under the router, both averaged over layers and
tokens, it is E sum_e f_e p_e; top_k where the load is even. The prompt is in both sequences, so where a shared row
holds it once its tokens count twice. Taken per pair, and not per micro-batch as elsewhere, it does not depend on how
pairs are packed, on accumulation or on ranks; at one pair per micro-batch the two are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_utils.schema import PairBatch
from dpo.config import ConfigError

_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
_KEY = "router_logits"


@dataclass(frozen=True, slots=True)
class Routers:
    """What is known of a model's routers: how many experts each token is sent to."""

    top_k: int

    @staticmethod
    def of(model: PreTrainedModel) -> Routers:
        """The routers of a model.

        Raises:
            ConfigError: it has none whose logits transformers hands out.
        """
        values = model.config.get_text_config().to_dict()
        top_k = next((values[key] for key in _TOP_K if values.get(key)), None)
        records = any(_KEY in (getattr(part, "_can_record_outputs", None) or {}) for part in model.modules())
        if top_k is None or not records:
            kind = values.get("model_type")
            raise ConfigError(f"loss.router_aux_loss_coef: a {kind} model has no routers that can be read: drop it")
        return Routers(top_k)

    def balance(self, logits: tuple[Tensor, ...], batch: PairBatch) -> Tensor:
        """(B,) load-balancing loss of each pair.

        Args:
            logits: of each layer with a router, (R * T, experts) or (R, T, experts).
            batch: the batch that they were computed from.
        """
        pair_of_T, weight_T = _tokens(batch, logits[0].device)
        shape = batch.num_pairs, logits[0].shape[-1]
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        chosen_BE = torch.zeros(shape, dtype=dtype, device=logits[0].device)
        probs_BE = torch.zeros_like(chosen_BE)
        for layer in logits:
            probs_TE = layer.flatten(0, -2).to(dtype).softmax(-1)
            chosen_TE = torch.zeros_like(probs_TE).scatter_(1, probs_TE.detach().topk(self.top_k, dim=1).indices, 1)
            chosen_BE = chosen_BE.index_add(0, pair_of_T, weight_T[:, None].to(dtype) * chosen_TE)
            probs_BE = probs_BE.index_add(0, pair_of_T, weight_T[:, None].to(dtype) * probs_TE)
        tokens_B = torch.zeros(shape[0], dtype=dtype, device=logits[0].device)
        tokens_B = len(logits) * tokens_B.index_add(0, pair_of_T, weight_T.to(dtype))
        return shape[1] * (chosen_BE * probs_BE).sum(1) / tokens_B.square()


def _tokens(batch: PairBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(R * T,) each: the pair that a token is of, and how many of its two sequences hold it (0: padding)."""
    pairs = np.arange(batch.num_pairs)
    halves = np.array(batch.sequence_lengths).reshape(2, -1)
    if batch.layout == "shared":
        prompts = np.array(batch.prompt_lengths)
        pair_of = np.repeat(pairs, halves.sum(0) - prompts)
        parts = np.stack([prompts, halves.sum(0) - 2 * prompts], axis=1).ravel()
        weight = np.repeat(np.tile([2, 1], batch.num_pairs), parts)
    elif batch.layout == "packed":
        pair_of, weight = np.repeat(np.tile(pairs, 2), halves.ravel()), np.ones(halves.sum())
    else:
        width = batch.input_ids_RT.shape[1]
        pair_of = np.repeat(np.tile(pairs, 2), width)
        weight = (np.arange(width)[None, :] < halves.ravel()[:, None]).ravel()
    together = torch.from_numpy(np.stack([pair_of, weight.astype(np.int64)]))
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    return together[0], together[1]


def wants_logits(module: nn.Module) -> bool:
    """Whether a forward of `module` in its present mode is one whose routers are balanced."""
    return module.training and torch.is_grad_enabled()
