"""One rank's steps: from the rows of a window to micro-batches, prepared ahead of training in a thread, and with
`num_workers` also in other processes."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from queue import Full, Queue
from typing import Literal

import torch

from data_utils.batching import collate, pack
from data_utils.order import Order
from data_utils.reader import StepReader, TokenizedStep
from data_utils.schema import Layout, PairBatch, Step, TokenizedPair
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from data_utils.workers import Workers

PREFETCHED_STEPS = 2
POLL_S = 0.1


@dataclass(frozen=True)
class StepLoader:
    """Makes the steps of one rank; a pure function of its fields and the step, so any step can be made again.

    Attributes:
        order: the windows, made of `shards.parts`.
        tokens_per_micro_batch: the budget of `pack`.
        on_bad_row: "error" raises the RowError; "skip" leaves the row out and hands the error on with the step.
        pin_memory: put the tensors into page-locked memory, for asynchronous copies to a GPU.
        num_workers: processes that read and tokenize; 0: the thread that collates does it.
    """

    shards: ShardSet
    tokenizer: PairTokenizer
    order: Order
    rank: int
    world_size: int
    layout: Layout
    tokens_per_micro_batch: int
    pad_token_id: int
    on_bad_row: Literal["error", "skip"] = "error"
    pin_memory: bool = False
    num_workers: int = 0

    def steps(self, first: int, last: int) -> Generator[Step, None, None]:
        """Steps first, ..., last - 1, made up to `PREFETCHED_STEPS` ahead in a thread, and tokenized up to
        `num_workers` steps further ahead.

        Thread and workers start with the first `next` and end with the iterator, also when that is closed early.

        Raises:
            RowError, DataError: in place of the step that could not be made.
            OSError: the same, for a shard that went away and did not come back within some seconds.
        """
        ahead: Queue[Step | Exception | None] = Queue(maxsize=PREFETCHED_STEPS)
        workers = Workers(self.reader, self.num_workers, first, last)
        thread = threading.Thread(target=self._fill, args=(ahead, workers, first, last), name="steps", daemon=True)
        workers.start()
        thread.start()
        try:
            while (item := ahead.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            workers.close()
            thread.join()

    @property
    def reader(self) -> StepReader:
        """What makes this rank's steps, up to token ids."""
        return StepReader(self.shards, self.tokenizer, self.order, self.rank, self.world_size, self.on_bad_row)

    def _fill(self, ahead: Queue[Step | Exception | None], workers: Workers, first: int, last: int) -> None:
        """The thread: steps, then None or the exception that ended them."""
        try:
            for number in range(first, last):
                tokenized = workers.take(number)
                if tokenized is None or not _put(ahead, workers.closed, self._step(tokenized)):
                    return
        except Exception as error:
            _put(ahead, workers.closed, error)
        else:
            _put(ahead, workers.closed, None)

    def _step(self, tokenized: TokenizedStep) -> Step:
        packed = pack(tokenized.pairs, self.layout, self.tokens_per_micro_batch)
        batches = [self._collate(micro_batch) for micro_batch in packed]
        return Step(tokenized.number, tokenized.epoch, batches, len(tokenized.pairs), tokenized.skipped)

    def _collate(self, pairs: list[TokenizedPair]) -> PairBatch:
        batch = collate(pairs, self.layout, self.pad_token_id)
        return _pinned(batch) if self.pin_memory else batch


def _put(ahead: Queue[Step | Exception | None], closed: threading.Event, item: Step | Exception | None) -> bool:
    """Wait for room in the queue; whether there was any before the consumer closed it."""
    while not closed.is_set():
        try:
            ahead.put(item, timeout=POLL_S)
        except Full:
            continue
        return True
    return False


def _pinned(batch: PairBatch) -> PairBatch:
    tensors = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return replace(batch, **{name: x.pin_memory() for name, x in tensors.items() if isinstance(x, torch.Tensor)})
