"""Micro-batches on the device one ahead of the one that is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from data_utils.schema import PairBatch


def on_device(batches: Iterable[PairBatch], device: torch.device) -> Iterator[PairBatch]:
    """The batches with their tensors on `device`, each sent before the one ahead of it is computed.

    On CUDA the copies, from pinned memory, run on a stream of their own: the host waits for nothing, and the device
    only for a copy that has not ended when its batch is due.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    waiting: _Sent | None = None
    for batch in batches:
        sent = _send(batch, device, stream)
        if waiting is not None:
            yield waiting.arrived()
        waiting = sent
    if waiting is not None:
        yield waiting.arrived()


@dataclass(frozen=True, slots=True)
class _Sent:
    """A batch on its way; `copied` marks the end of its copies."""

    batch: PairBatch
    copied: torch.cuda.Event | None

    def arrived(self) -> PairBatch:
        """The batch, for what is computed on the current stream from now on."""
        if self.copied is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self.copied)
            for item in fields(self.batch):
                if isinstance(tensor := getattr(self.batch, item.name), Tensor):
                    tensor.record_stream(current)  # so that its memory is not given away while it is read
        return self.batch


def _send(batch: PairBatch, device: torch.device, stream: torch.cuda.Stream | None) -> _Sent:
    if stream is None:
        return _Sent(batch.to(device), None)
    stream.wait_stream(torch.cuda.current_stream(device))  # what a stored reference has put on the device
    with torch.cuda.stream(stream):
        sent, copied = batch.to(device), torch.cuda.Event()
        copied.record()
    return _Sent(sent, copied)
