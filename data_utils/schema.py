"""The three shapes that data takes on its way to the model: a pair of texts, of token ids, a micro-batch of tensors.

Shape suffixes (one legend for the repository): B pairs, S = 2B sequences (chosen first, then rejected), R rows,
T tokens of a row, N scored (response) tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]
Tool = dict[str, Any]
Text = str | list[Message]
Layout = Literal["padded", "packed", "shared"]
Spans = tuple[tuple[int, int], ...]


class DataError(ValueError):
    """The user's data cannot be used; the message is one line: where (file:line), what, what to do."""


class RowError(DataError):
    """One row cannot be used.

    Attributes:
        where: "file:line" of the row.
        cause: a short stable word to count by, such as `empty_response` or `malformed_json`.
    """

    def __init__(self, where: str, cause: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where = where
        self.cause = cause
        self._arguments = where, cause, message

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str]]:
        """Pickled as it was made: the ranks show each other their errors."""
        return type(self), self._arguments


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Optional per-pair columns, carried all the way to the loss; None where a row does not have one."""

    weight: float | None = None
    beta: float | None = None
    margin: float | None = None
    label: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One row of a shard: a prompt and two responses, as plain strings or as message lists.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        family: what kind of row it was converted from, such as "HH transcripts"; empty where nothing was converted.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    columns: PairColumns
    where: str
    tools: tuple[Tool, ...] = ()
    family: str = ""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair in token ids. `prompt_ids` is common to both sequences; each response is non-empty and ends in EOS
    unless it was truncated.

    Attributes:
        chosen_scored, rejected_scored: half-open spans of the response's ids that are scored, ascending and apart:
            the assistant's turns of a response of several turns. None: all of them.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    columns: PairColumns
    where: str
    index: int
    chosen_scored: Spans | None = None
    rejected_scored: Spans | None = None

    @property
    def sequence_lengths(self) -> tuple[int, int]:
        """Tokens of prompt + chosen and of prompt + rejected."""
        return len(self.prompt_ids) + len(self.chosen_ids), len(self.prompt_ids) + len(self.rejected_ids)


@dataclass(frozen=True, slots=True)
class PairBatch:
    """One micro-batch of B whole pairs, in any layout.

    Sequence s < B is pair s's prompt + chosen, sequence B + s its prompt + rejected. All layouts read alike: the
    hidden state at flat position `score_positions_N[n]` predicts token `labels_N[n]`, which belongs to sequence
    `sequence_of_N[n]`, so that `logps_S = zeros(S).index_add(0, sequence_of_N, token_logps_N)`.

    Attributes:
        input_ids_RT: (R, T) token ids. padded: R = S rows, padded on the right; packed: R = 1, sequences end to end;
            shared: R = 1, prompt, chosen and rejected of each pair end to end.
        position_ids_RT: (R, T) places within the sequence: 0 at its start and on padding; in a shared row the rejected
            response goes on from the prompt, as the chosen one does.
        attention_mask_RT: (R, T) of 0/1, or None where there is no padding.
        sequence_lengths: tokens of each of the S sequences, in the order in which they lie in a packed row.
        prompt_lengths: tokens of each of the B prompts.
        score_positions_N, labels_N, sequence_of_N: (N,) see above; sequence by sequence. In a shared row the last token
            of a prompt predicts the first one of both responses, so its position comes twice.
        response_lengths_S: (S,) scored tokens of each sequence, float32.
        weight_B: (B,) float32, 1 where the row names none, 0 in an idle batch.
        beta_B, margin_B, label_B: (B,) float32, NaN where the row names none.
        index_B: the pairs' global row numbers; -1 in an idle batch.
        sources: the pairs' source names.
        layout: "padded", "packed" or "shared".
        reference_logps_S: (S,) float32, log-probs under the reference, where they are known before any model is run.
        tail_weight: what a scored token counts that lies beyond the length of the pair's shorter response.
    """

    input_ids_RT: torch.Tensor
    position_ids_RT: torch.Tensor
    attention_mask_RT: torch.Tensor | None
    sequence_lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    score_positions_N: torch.Tensor
    labels_N: torch.Tensor
    sequence_of_N: torch.Tensor
    response_lengths_S: torch.Tensor
    weight_B: torch.Tensor
    beta_B: torch.Tensor
    margin_B: torch.Tensor
    label_B: torch.Tensor
    index_B: tuple[int, ...]
    sources: tuple[str, ...]
    layout: Layout
    reference_logps_S: torch.Tensor | None = None
    tail_weight: float = 1.0

    @property
    def num_pairs(self) -> int:
        """B, idle pairs included."""
        return len(self.index_B)

    @property
    def is_idle(self) -> bool:
        """Whether this batch only keeps a rank in step with the others and counts for nothing."""
        return self.index_B == (-1,)

    @property
    def num_tokens(self) -> int:
        """Real tokens that the model computes, without padding; a shared row holds each prompt once."""
        return sum(self.sequence_lengths) - (sum(self.prompt_lengths) if self.layout == "shared" else 0)

    @property
    def num_slots(self) -> int:
        """Token positions that the model computes, padding included."""
        return self.input_ids_RT.numel()

    @property
    def documents(self) -> tuple[tuple[int, int], ...]:
        """(tokens, prefix) of each document of the one row that a packed or shared batch is, in order.

        A document of prefix n goes on from the first n tokens of the document before it, and sees them as well as
        itself: in a shared row (P + C, 0) and (R, P) for each pair, in a packed one (length, 0) for each sequence.
        """
        assert self.layout != "padded"
        if self.layout == "packed":
            return tuple((length, 0) for length in self.sequence_lengths)
        halves = self.sequence_lengths[: self.num_pairs], self.sequence_lengths[self.num_pairs :]
        pairs = zip(self.prompt_lengths, *halves, strict=True)
        return tuple(
            document for prompt, chosen, rejected in pairs for document in ((chosen, 0), (rejected - prompt, prompt))
        )

    def to(self, device: torch.device) -> PairBatch:
        """The same batch with its tensors on `device` (asynchronously from pinned memory)."""
        moved = {
            item.name: value.to(device, non_blocking=True)
            for item in fields(self)
            if hasattr(value := getattr(self, item.name), "to")
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's share of one optimizer step.

    Attributes:
        number: 0-based step.
        epoch: 0-based epoch that the window lies in.
        micro_batches: this rank's pairs; ranks with fewer than others add idle ones.
        pairs: the pairs of each micro-batch in token ids.
        num_pairs: pairs in `micro_batches` (rows of the window that were skipped are not among them).
        skipped: why this rank's other rows of the window were left out.
    """

    number: int
    epoch: int
    micro_batches: list[PairBatch]
    num_pairs: int
    skipped: tuple[RowError, ...]
    pairs: list[list[TokenizedPair]] = field(default_factory=list)
