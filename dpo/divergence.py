"""KL(policy || reference), exact over the vocabulary, at the scored positions of given responses.

Both models read the same tokens ("teacher forced"), so each position has two whole distributions, and the sum over the
vocabulary is no estimate. At the positions of held-out responses it is not the KL divergence of the policy's own
answers, whose positions are others. Over answers y that the policy has sampled (temperature 1) it is: by the chain rule
KL(policy || reference) = E_y sum_t KL_t, so that the mean over answers is an unbiased estimate, with less variance than
one from the sampled tokens' log-probs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_utils.batching import collate, pack
from data_utils.schema import PairBatch, PairColumns, TokenizedPair
from dpo.logps import Predictions, chunk_rows, logits_of, sum_by_sequence
from dpo.policy import evaluating
from dpo.steps import FILLER_ID

if TYPE_CHECKING:
    from dpo.engine import Engine
    from dpo.reference import Reference

_COPIES = 4
"""(R, V) tensors alive at once: log-probs of both models, their difference, and one in the making."""


def token_kl(policy: Predictions, reference: Predictions) -> Tensor:
    """(N,) sum_v p (log p - log q) in nats, p the policy's distribution, q the reference's; fp32, or fp64 as the head.

    It is computed as sum_v p (log p - log q) - sum_v p + sum_v q, which is the same, since both sum to 1, but does not
    feel an error of the log-partitions to first order.
    """
    vocabulary = len(policy.weight_VH)
    size = max(1, chunk_rows(vocabulary, policy.weight_VH.dtype) // _COPIES)
    chunks = [
        _kl_of_chunk(policy.rows(start, start + size), reference.rows(start, start + size))
        for start in range(0, len(policy.hidden_NH), size)
    ]
    return torch.cat(chunks) if chunks else policy.hidden_NH.new_empty(0, dtype=torch.float32)


def _kl_of_chunk(policy: Predictions, reference: Predictions) -> Tensor:
    log_p_RV, log_q_RV = logits_of(policy).log_softmax(-1), logits_of(reference).log_softmax(-1)
    gap_RV = log_p_RV - log_q_RV
    p_RV = log_p_RV.exp_()
    gap_RV.masked_fill_(p_RV == 0, 0)  # 0 log 0 = 0, also where both logits are -inf
    return torch.linalg.vecdot(p_RV, gap_RV) - p_RV.sum(-1) + log_q_RV.exp_().sum(-1)


class Divergence:
    """Watches the reference and then the policy score one batch.

    Args:
        shares_head: the reference is the policy with its adapter off, whose head is the policy's.
    """

    def __init__(self, shares_head: bool) -> None:
        self._shares_head = shares_head
        self._reference: Predictions | None = None
        self._token_kl_N: Tensor | None = None

    def see_reference(self, predictions: Predictions) -> None:
        """Keep what the reference predicts. The head's weights are gathered for the moment only, so they are copied."""
        if not self._shares_head:
            bias_V = None if predictions.bias_V is None else predictions.bias_V.clone()
            predictions = replace(predictions, weight_VH=predictions.weight_VH.clone(), bias_V=bias_V)
        self._reference = predictions

    def see_policy(self, predictions: Predictions) -> None:
        """Hold the policy against it."""
        assert self._reference is not None
        reference, self._reference = self._reference, None
        if self._shares_head:
            reference = replace(predictions, hidden_NH=reference.hidden_NH)
        self._token_kl_N = token_kl(predictions, reference)

    def by_sequence(self, batch: PairBatch) -> Tensor:
        """(S,) nats summed over the scored tokens of each response."""
        assert self._token_kl_N is not None
        return sum_by_sequence(self._token_kl_N, batch.sequence_of_N, 2 * batch.num_pairs)


def kl_of_answers(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    engine: Engine,
    reference: Reference,
    tokens_per_micro_batch: int,
    device: torch.device,
) -> list[float]:
    """Nats of each answer, summed over its positions; one process.

    Args:
        prompts, answers: token ids, none empty, with the token that ends an answer.
    """
    layout, found = engine.policy.layout, [0.0] * len(answers)
    both = enumerate(zip(prompts, answers, strict=True))
    pairs = [TokenizedPair(ids, said, said[:1], PairColumns(), "", index) for index, (ids, said) in both]
    with evaluating(engine.policy):
        for packed in pack(pairs, layout, tokens_per_micro_batch):
            batch, divergence = collate(packed, layout, FILLER_ID).to(device), Divergence(reference.shares_head)
            reference.logps(batch, divergence.see_reference)
            engine.forward(batch, observe=divergence.see_policy)
            for pair, kl in zip(packed, divergence.by_sequence(batch).tolist(), strict=False):  # chosen ones come first
                found[pair.index] = kl
    return found
