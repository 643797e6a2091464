"""Answers: prompts continued by a model, greedily or by sampling, many at a time.

Prompts of a batch are padded on the left and share one cache of keys and values; a prompt that is to be answered
several times is computed once; answers that have ended leave the batch. Nothing here knows engines or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_COMPACT_AT = 0.125
"""Leave out the rows that have ended once they are this share of the batch: moving the cache costs about a token."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One continuation of a prompt.

    Attributes:
        ids: its token ids, without the one that ends it.
        ended: whether the model ended it; false: it was cut at the limit.
    """

    ids: list[int]
    ended: bool


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: limit of an answer.
        stop_ids: tokens that end one.
        temperature: 0: the likeliest token; above: sampled from the distribution at this temperature.
        num_samples: answers per prompt.
        seed: of the sampling.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 0.0
    num_samples: int = 1
    seed: int = 0


@torch.no_grad()
def answer(model: Any, prompts: Sequence[list[int]], decoding: Decoding, device: torch.device) -> list[list[Answer]]:
    """Continue one batch of prompts.

    Args:
        model: a causal language model of transformers, in evaluation mode, with its own attention.
        prompts: token ids, none empty. Of different lengths only where padding on the left is exact (attention).

    Returns:
        for each prompt its `num_samples` answers.
    """
    cache, mask_RT, logits_RV = _read(model, prompts, device)
    rows = _Rows(cache, mask_RT, decoding.num_samples)
    found: list[list[int]] = [[] for _ in range(len(prompts) * decoding.num_samples)]
    generator = torch.Generator(device).manual_seed(decoding.seed)
    stop_ids = torch.tensor(sorted(decoding.stop_ids), device=device)
    logits_RV = logits_RV.repeat_interleave(decoding.num_samples, dim=0)
    for number in range(decoding.max_new_tokens):
        next_R = _choose(logits_RV, decoding.temperature, generator)
        rows.take(next_R, torch.isin(next_R, stop_ids), found)
        if not rows.alive or number + 1 == decoding.max_new_tokens:
            break
        logits_RV = rows.advance(model)
    answers = [_answer(ids, decoding.stop_ids) for ids in found]
    return [answers[first : first + decoding.num_samples] for first in range(0, len(answers), decoding.num_samples)]


def _read(model: Any, prompts: Sequence[list[int]], device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """Cache after the prompts, mask (R, T) of the places in it, and (R, V) logits of what comes next.

    What all prompts begin with, such as a system prompt, is computed once; what is left is padded in front.
    """
    shared = _shared_length(prompts)
    cache = None
    if shared:
        shared_ids_1T = torch.tensor([prompts[0][:shared]], device=device)
        cache = model(input_ids=shared_ids_1T, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    ids_RT, own_mask_RT = _left_padded([prompt[shared:] for prompt in prompts], device)
    mask_RT = torch.cat([own_mask_RT.new_ones(len(prompts), shared), own_mask_RT], dim=1)
    positions_RT = (mask_RT.cumsum(-1) - 1).clamp(min=0)[:, shared:]
    out = model(
        input_ids=ids_RT,
        attention_mask=mask_RT,
        position_ids=positions_RT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.past_key_values, mask_RT, out.logits[:, -1]


def _shared_length(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with, the last token of each left out; 0 for a single prompt."""
    if len(prompts) == 1:
        return 0
    first, last = min(prompts), max(prompts)  # what the extremes share, all share
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _answer(ids: list[int], stop_ids: frozenset[int]) -> Answer:
    return Answer(ids[:-1], ended=True) if ids[-1] in stop_ids else Answer(ids, ended=False)


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, T) ids, padded on the left with 0, and the mask of what is no padding."""
    size = max(map(len, prompts))
    ids = [[0] * (size - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _choose(logits_RV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(R,) next tokens."""
    if temperature == 0:
        return logits_RV.argmax(-1)
    cumulative_RV = (logits_RV.float() / temperature).softmax(-1).cumsum(-1)
    # One draw per row; torch.multinomial draws a number per token of the vocabulary, a fifth of the time on a CPU.
    draws_R1 = torch.rand(len(logits_RV), 1, generator=generator, device=logits_RV.device)
    return torch.searchsorted(cumulative_RV, draws_R1 * cumulative_RV[:, -1:])[:, 0]


class _Rows:
    """The answers of a batch that are still being written: cache, mask, and which answer each row is."""

    def __init__(self, cache: Any, mask_RT: Tensor, num_samples: int) -> None:
        self._cache, self._mask_RT = cache, mask_RT.repeat_interleave(num_samples, dim=0)
        if num_samples > 1:
            cache.batch_repeat_interleave(num_samples)
        self._answers = list(range(len(self._mask_RT)))
        self._ended = [False] * len(self._answers)
        self._next_R = self._mask_RT[:, 0]

    @property
    def alive(self) -> bool:
        """Whether any answer goes on."""
        return not all(self._ended)

    def take(self, next_R: Tensor, stops_R: Tensor, found: list[list[int]]) -> None:
        """Add a token to each answer that goes on; note which ones it ended."""
        self._next_R = next_R
        for row, (token, stops) in enumerate(zip(next_R.tolist(), stops_R.tolist(), strict=True)):
            if not self._ended[row]:
                found[self._answers[row]].append(token)
                self._ended[row] = stops

    def advance(self, model: Any) -> Tensor:
        """(R, V) logits after the tokens taken last."""
        if sum(self._ended) >= max(1.0, _COMPACT_AT * len(self._ended)):
            self._compact()
        ones_R1 = torch.ones_like(self._mask_RT[:, :1])
        self._mask_RT = torch.cat([self._mask_RT, ones_R1], dim=1)
        out = model(
            input_ids=self._next_R[:, None],
            attention_mask=self._mask_RT,
            position_ids=self._mask_RT.sum(-1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.logits[:, -1]

    def _compact(self) -> None:
        """Leave out the rows whose answers have ended."""
        kept = [row for row, ended in enumerate(self._ended) if not ended]
        index = torch.tensor(kept, device=self._mask_RT.device)
        self._cache.batch_select_indices(index)
        self._mask_RT, self._next_R = self._mask_RT[index], self._next_R[index]
        self._answers = [self._answers[row] for row in kept]
        self._ended = [False] * len(kept)
