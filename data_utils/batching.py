"""From tokenized pairs to micro-batches of tensors. The layouts are `PairBatch`'s; all give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch

from data_utils.schema import Layout, PairBatch, PairColumns, Spans, TokenizedPair


def collate(pairs: Sequence[TokenizedPair], layout: Layout, pad_token_id: int) -> PairBatch:
    """One micro-batch of whole pairs; its sequences are all the chosen ones, then all the rejected ones.

    One pair of prompt [1, 2], chosen [3, 4] and rejected [5, 6] gives, shared,

        input_ids_RT       [[1, 2, 3, 4, 5, 6]]
        position_ids_RT    [[0, 1, 2, 3, 2, 3]]
        attention_mask_RT  None
        score_positions_N  [1, 2, 1, 4]
        documents          ((4, 0), (2, 2))

    packed,

        input_ids_RT       [[1, 2, 3, 4, 1, 2, 5, 6]]
        position_ids_RT    [[0, 1, 2, 3, 0, 1, 2, 3]]
        attention_mask_RT  None
        score_positions_N  [1, 2, 5, 6]
        documents          ((4, 0), (4, 0))

    and padded, with pad_token_id 0 and only [5] for the rejected response,

        input_ids_RT       [[1, 2, 3, 4],  position_ids_RT [[0, 1, 2, 3],  attention_mask_RT [[1, 1, 1, 1],
                            [1, 2, 5, 0]]                   [0, 1, 2, 0]]                     [1, 1, 1, 0]]
        score_positions_N  [1, 2, 5]

    The first two have sequence_lengths (4, 4), prompt_lengths (2,), labels_N [3, 4, 5, 6], sequence_of_N [0, 0, 1, 1]
    and response_lengths_S [2, 2]; the last one (4, 3), (2,), [3, 4, 5], [0, 0, 1] and [2, 1]. Of a response of several
    turns only the scored spans count: with rejected_scored ((1, 2),) the labels would be [3, 4, 6].
    """
    prompts = [pair.prompt_ids for pair in pairs]
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    sequences = [prompt + response for prompt, response in zip(prompts * 2, responses, strict=True)]
    spans = [_scored(pair.chosen_scored, pair.chosen_ids) for pair in pairs]
    spans += [_scored(pair.rejected_scored, pair.rejected_ids) for pair in pairs]
    num_scored = [sum(end - start for start, end in scored) for scored in spans]
    lengths, prompt_lengths = tuple(map(len, sequences)), tuple(map(len, prompts))
    places = sequence_places(layout, lengths, prompt_lengths)
    input_ids, position_ids, attention_mask = _rows(layout, sequences, places, pad_token_id)
    return PairBatch(
        input_ids_RT=input_ids,
        position_ids_RT=position_ids,
        attention_mask_RT=attention_mask,
        sequence_lengths=lengths,
        prompt_lengths=prompt_lengths,
        score_positions_N=_score_positions(places, prompt_lengths * 2, spans),
        labels_N=_labels(responses, spans),
        sequence_of_N=torch.repeat_interleave(torch.tensor(num_scored)),
        response_lengths_S=torch.tensor(num_scored, dtype=torch.float32),
        **_columns([pair.columns for pair in pairs]),
        index_B=tuple(pair.index for pair in pairs),
        sources=tuple(pair.columns.source for pair in pairs),
        layout=layout,
    )


def sequence_places(
    layout: Layout, sequence_lengths: Sequence[int], prompt_lengths: Sequence[int]
) -> list[torch.Tensor]:
    """Where the tokens of each of the S sequences lie in the flat batch: S int64 tensors, each ascending."""
    if layout == "shared":
        return _shared_places(sequence_lengths, prompt_lengths)
    if layout == "packed":
        offsets = list(accumulate(sequence_lengths[:-1], initial=0))
    else:
        offsets = [row * max(sequence_lengths) for row in range(len(sequence_lengths))]
    starts = zip(offsets, sequence_lengths, strict=True)
    return [torch.arange(offset, offset + length) for offset, length in starts]


def _shared_places(sequence_lengths: Sequence[int], prompt_lengths: Sequence[int]) -> list[torch.Tensor]:
    """Pair by pair: prompt and chosen are contiguous, the rejected response lies behind them."""
    chosen_places, rejected_places = [], []
    offset, num_pairs = 0, len(prompt_lengths)
    halves = sequence_lengths[:num_pairs], sequence_lengths[num_pairs:]
    for prompt, chosen, rejected in zip(prompt_lengths, *halves, strict=True):
        branch, end = offset + chosen, offset + chosen + rejected - prompt
        chosen_places.append(torch.arange(offset, branch))
        rejected_places.append(torch.cat([torch.arange(offset, offset + prompt), torch.arange(branch, end)]))
        offset = end
    return chosen_places + rejected_places


def _rows(
    layout: Layout, sequences: list[list[int]], places: list[torch.Tensor], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Token ids, positions and attention mask; what two sequences share is written twice, alike."""
    flat = torch.cat(places)
    longest = max(map(len, sequences))
    shape = (len(sequences), longest) if layout == "padded" else (1, int(flat.max()) + 1)
    input_ids, position_ids, is_real = torch.full(shape, pad_token_id), torch.zeros(shape).long(), torch.zeros(shape)
    input_ids.view(-1)[flat] = torch.tensor(list(chain.from_iterable(sequences)))
    position_ids.view(-1)[flat] = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    is_real.view(-1)[flat] = 1
    return input_ids, position_ids, None if bool(is_real.all()) else is_real.long()


def _scored(spans: Spans | None, response: list[int]) -> Spans:
    return ((0, len(response)),) if spans is None else spans


def _score_positions(places: list[torch.Tensor], prompt_lengths: Sequence[int], spans: list[Spans]) -> torch.Tensor:
    """(N,) the position before each scored token: the last prompt token predicts the first one of the response."""
    sequences = zip(places, prompt_lengths, spans, strict=True)
    return torch.cat(
        [place[prompt - 1 + start : prompt - 1 + end] for place, prompt, scored in sequences for start, end in scored]
    )


def _labels(responses: list[list[int]], spans: list[Spans]) -> torch.Tensor:
    """(N,) the scored tokens."""
    both = zip(responses, spans, strict=True)
    return torch.tensor([id for response, scored in both for start, end in scored for id in response[start:end]])


def _columns(columns: list[PairColumns]) -> dict[str, Any]:
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
    if layout == "padded":
        return _pack_by_length(pairs, tokens_per_micro_batch)
    return _pack_best_fit(pairs, layout, tokens_per_micro_batch)


def _cost(pair: TokenizedPair, layout: Layout) -> int:
    """Tokens of a pair in one row: 2P + C + R packed, P + C + R shared."""
    return sum(pair.sequence_lengths) - (len(pair.prompt_ids) if layout == "shared" else 0)


def _pack_best_fit(pairs: Sequence[TokenizedPair], layout: Layout, budget: int) -> list[list[TokenizedPair]]:
    """Best-fit decreasing: longest first, each into the fullest micro-batch that still has room."""
    batches: list[list[TokenizedPair]] = []
    rooms: list[int] = []
    for pair in sorted(pairs, key=lambda pair: -_cost(pair, layout)):
        cost = _cost(pair, layout)
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
