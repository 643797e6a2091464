"""Activations on the CPU between forward and backward (`train.activation_offload`).

What autograd keeps is copied out while the forward goes on, and back some way ahead of the backward pass. Storages, not
tensors, are moved: views of one storage, such as a layer's input that three projections keep, travel once. Weights stay
where they are, and so does what is too small to be worth a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEAST_BYTES = 2**20
"""Smaller storages stay on the device."""
BYTES_AHEAD = 256 * 2**20
"""So much is fetched ahead of its use in the backward pass."""


def _places(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in parameters}


class _Moved:
    """A storage's bytes on the host, and on the device again once they were asked for.

    On CUDA both copies run on a stream of their own between page-locked memory and the device. The allocator keeps the
    source until the copy out is done (`record_stream`), and the copy back waits for it on the same stream.
    """

    def __init__(self, storage: torch.UntypedStorage, stream: torch.cuda.Stream | None) -> None:
        self.device, self.size, self._stream = storage.device, storage.nbytes(), stream
        source = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        self._here: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self.host = torch.empty(self.size, dtype=torch.uint8, pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(source)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(source, non_blocking=True)
        source.record_stream(stream)

    def fetch(self) -> None:
        """Start the way back."""
        if self._here is not None:
            return
        if self._stream is None:
            self._here = self.host.clone()
            return
        self._here = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # whoever had this memory before
        with torch.cuda.stream(self._stream):
            self._here.copy_(self.host, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._here.record_stream(self._stream)

    def storage(self) -> torch.UntypedStorage:
        """The storage on the device, for whoever computes on the current stream."""
        self.fetch()
        assert self._here is not None
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
        return self._here.untyped_storage()


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor of a moved storage; `place` is its number in the order of packing."""

    moved: _Moved
    place: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offload:
    """Moves what autograd keeps while `active`, for the layers of one model.

    Attributes:
        bytes_out: bytes moved to the host so far.
    """

    def __init__(self, module: nn.Module, layers: Iterable[nn.Module]) -> None:
        layers = list(layers)
        inner = {id(part) for layer in layers for part in layer.modules()}
        self._outer = [part for part in module.modules() if id(part) not in inner]
        self._weights: set[int] = set()
        self._stream: torch.cuda.Stream | None = None
        self._moved: weakref.WeakKeyDictionary[torch.UntypedStorage, _Moved] = weakref.WeakKeyDictionary()
        self._order: list[weakref.ref[_Moved]] = []
        self._is_active = False
        self.bytes_out = 0
        for layer in layers:
            layer.register_forward_pre_hook(self._note_weights)

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """While it lasts, what autograd keeps is moved; nothing happens without grad."""
        if not torch.is_grad_enabled():
            yield
            return
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._order = [moved for moved in self._order if moved() is not None]
        self._weights = set().union(*(_places(part.parameters(recurse=False)) for part in self._outer))
        self._is_active = True
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._is_active = False
        self._moved.clear()

    def _note_weights(self, layer: nn.Module, _: object) -> None:
        """Where the layer's weights lie now: FSDP2 has gathered them into storages of their own."""
        if self._is_active:
            self._weights |= _places(layer.parameters())

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST_BYTES or storage.data_ptr() in self._weights:
            return tensor
        moved = self._moved.get(storage)
        if moved is None:
            moved = self._moved[storage] = _Moved(storage, self._stream)
            self._order.append(weakref.ref(moved))
            self.bytes_out += moved.size
        place = len(self._order) - 1
        return _View(moved, place, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: Tensor | _View) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        storage = kept.moved.storage()
        self._fetch_ahead(kept.place)
        tensor = torch.empty(0, dtype=kept.dtype, device=storage.device)
        return tensor.set_(storage, kept.offset, kept.shape, kept.stride)

    def _fetch_ahead(self, place: int) -> None:
        """Backward asks for what was packed last first."""
        ahead = 0
        for number in range(min(place, len(self._order)) - 1, -1, -1):
            if (moved := self._order[number]()) is not None:
                if ahead > BYTES_AHEAD:
                    return
                moved.fetch()
                ahead += moved.size
