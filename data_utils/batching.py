"""From tokenized pairs to micro-batches of tensors. The layouts are `PairBatch`'s; both give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain

import torch

from data_utils.schema import Layout, PairBatch, PairColumns, Spans, TokenizedPair


def collate(pairs: Sequence[TokenizedPair], layout: Layout, pad_token_id: int) -> PairBatch:
    """One micro-batch of whole pairs: all the chosen sequences, then all the rejected ones.

    One pair of prompt [1, 2], chosen [3, 4] and rejected [5] gives, packed,

        input_ids_RT       [[1, 2, 3, 4, 1, 2, 5]]
        position_ids_RT    [[0, 1, 2, 3, 0, 1, 2]]
        attention_mask_RT  None
        score_positions_N  [1, 2, 5]
        labels_N           [3, 4, 5]
        sequence_of_N      [0, 0, 1]

    and padded, with pad_token_id 0,

        input_ids_RT       [[1, 2, 3, 4],  position_ids_RT [[0, 1, 2, 3],  attention_mask_RT [[1, 1, 1, 1],
                            [1, 2, 5, 0]]                   [0, 1, 2, 0]]                     [1, 1, 1, 0]]
        score_positions_N  [1, 2, 5]
        labels_N           [3, 4, 5]
        sequence_of_N      [0, 0, 1]

    Both have sequence_lengths (4, 3) and response_lengths_S [2, 1]. Of a response of several turns only the scored
    spans count: with rejected [5, 6, 7] and rejected_scored ((0, 1), (2, 3)) the labels would be [3, 4, 5, 7].
    """
    prompts = [pair.prompt_ids for pair in pairs] * 2
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    spans = [_scored(pair.chosen_scored, pair.chosen_ids) for pair in pairs]
    spans += [_scored(pair.rejected_scored, pair.rejected_ids) for pair in pairs]
    num_scored = [sum(end - start for start, end in scored) for scored in spans]
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    lengths = tuple(map(len, sequences))
    if layout == "packed":
        offsets = list(accumulate(lengths[:-1], initial=0))
        input_ids, position_ids, attention_mask = _packed_rows(sequences)
    else:
        offsets = [row * max(lengths) for row in range(len(sequences))]
        input_ids, position_ids, attention_mask = _padded_rows(sequences, pad_token_id)
    return PairBatch(
        input_ids_RT=input_ids,
        position_ids_RT=position_ids,
        attention_mask_RT=attention_mask,
        sequence_lengths=lengths,
        score_positions_N=_score_positions(offsets, prompts, spans),
        labels_N=_labels(responses, spans),
        sequence_of_N=torch.repeat_interleave(torch.tensor(num_scored)),
        response_lengths_S=torch.tensor(num_scored, dtype=torch.float32),
        **_columns([pair.columns for pair in pairs]),
        index_B=tuple(pair.index for pair in pairs),
        sources=tuple(pair.columns.source for pair in pairs),
        layout=layout,
    )


def _packed_rows(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, None]:
    input_ids = torch.tensor(list(chain.from_iterable(sequences)))
    position_ids = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    return input_ids[None], position_ids[None], None


def _padded_rows(
    sequences: list[list[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    lengths_R1 = torch.tensor([[len(sequence)] for sequence in sequences])
    longest = int(lengths_R1.max())
    input_ids = torch.tensor([sequence + [pad_token_id] * (longest - len(sequence)) for sequence in sequences])
    places_T = torch.arange(longest)
    is_real_RT = places_T < lengths_R1
    attention_mask = None if bool(is_real_RT.all()) else is_real_RT.long()
    return input_ids, places_T * is_real_RT, attention_mask


def _scored(spans: Spans | None, response: list[int]) -> Spans:
    return ((0, len(response)),) if spans is None else spans


def _score_positions(offsets: list[int], prompts: list[list[int]], spans: list[Spans]) -> torch.Tensor:
    """(N,) the position before each scored token: the last prompt token predicts the first one of the response."""
    before = [offset + len(prompt) - 1 for offset, prompt in zip(offsets, prompts, strict=True)]
    places = zip(before, spans, strict=True)
    return torch.cat([torch.arange(o + start, o + end) for o, scored in places for start, end in scored])


def _labels(responses: list[list[int]], spans: list[Spans]) -> torch.Tensor:
    """(N,) the scored tokens."""
    both = zip(responses, spans, strict=True)
    return torch.tensor([id for response, scored in both for start, end in scored for id in response[start:end]])


def _columns(columns: list[PairColumns]) -> dict[str, torch.Tensor]:
    def tensor_B(values: list[float | None], absent: float) -> torch.Tensor:
        return torch.tensor([absent if value is None else value for value in values], dtype=torch.float32)

    return {
        "weight_B": tensor_B([pair.weight for pair in columns], 1.0),
        "beta_B": tensor_B([pair.beta for pair in columns], math.nan),
        "margin_B": tensor_B([pair.margin for pair in columns], math.nan),
        "label_B": tensor_B([pair.label for pair in columns], math.nan),
    }


def idle_batch(layout: Layout, pad_token_id: int) -> PairBatch:
    """One tiny pair of index -1 and weight 0, with which a rank short of work keeps in step with the others."""
    pad = [pad_token_id]
    pair = TokenizedPair(pad, pad, pad, PairColumns(weight=0.0), where="idle", index=-1)
    return collate([pair], layout, pad_token_id)


def pack(pairs: Sequence[TokenizedPair], layout: Layout, tokens_per_micro_batch: int) -> list[list[TokenizedPair]]:
    """Split pairs into micro-batches of at most `tokens_per_micro_batch` token slots (padding included).

    A pair larger than the budget is a micro-batch of its own. Deterministic; every pair comes exactly once.
    """
    if layout == "packed":
        return _pack_best_fit(pairs, tokens_per_micro_batch)
    return _pack_by_length(pairs, tokens_per_micro_batch)


def _pack_best_fit(pairs: Sequence[TokenizedPair], budget: int) -> list[list[TokenizedPair]]:
    """Best-fit decreasing: longest first, each into the fullest micro-batch that still has room."""
    batches: list[list[TokenizedPair]] = []
    rooms: list[int] = []
    for pair in sorted(pairs, key=lambda pair: -sum(pair.sequence_lengths)):
        cost = sum(pair.sequence_lengths)
        fitting = [number for number, room in enumerate(rooms) if room >= cost]
        if fitting:
            number = min(fitting, key=rooms.__getitem__)
            batches[number].append(pair)
            rooms[number] -= cost
        else:
            batches.append([pair])
            rooms.append(budget - cost)
    return batches


def _pack_by_length(pairs: Sequence[TokenizedPair], budget: int) -> list[list[TokenizedPair]]:
    """Neighbors in length share a micro-batch; the first of each is the longest and sets its width."""
    batches: list[list[TokenizedPair]] = []
    for pair in sorted(pairs, key=lambda pair: -max(pair.sequence_lengths)):
        if batches and 2 * (len(batches[-1]) + 1) * max(batches[-1][0].sequence_lengths) <= budget:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return batches
