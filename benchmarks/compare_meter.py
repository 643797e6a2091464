"""Counts what a training step does, with torch's own instruments, and hands out steps one at a time.

A trainer calls `Meter.start` before its first step and `Meter.step_done` after each; between them it waits for a
command: count the next step, time it, or stop. So steps of several trainers can alternate, each in its own process,
without any of them being rewritten.
"""

from __future__ import annotations

import json
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

SYNCS = {
    torch.ops.aten._local_scalar_dense.default: "item",
    torch.ops.aten.nonzero.default: "nonzero",
    torch.ops.aten.masked_select.default: "masked_select",
    torch.ops.aten.equal.default: "equal",
    torch.ops.aten.repeat_interleave.Tensor: "repeat_interleave",
}
"""Operators whose result, or the size of it, the host has to wait for. Copies from a device to the host cannot be told
apart on a CPU and are not counted."""
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


def _addmm_flops(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Of a product that is added in place, which torch's counter does not know: shapes (M, K) and (K, N)."""
    return 2 * left[0] * left[1] * right[1]


class Finished(BaseException):
    """The parent wants no further step; not an Exception, so that no trainer handles it."""


class Live:
    """Bytes of distinct storages that are alive, and the most there were."""

    def __init__(self) -> None:
        self._users: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def add(self, key: int, size: int) -> None:
        """One more user of a storage."""
        self._users[key] += 1
        if self._users[key] == 1:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def remove(self, key: int, size: int) -> None:
        """One user less."""
        self._users[key] -= 1
        if self._users[key] == 0:
            self.bytes -= size


class _Operators(TorchDispatchMode):
    """Counts synchronizing operators, and bytes of the storages that operators allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.syncs_count = True
        self.live = Live()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.syncs_count:
            self._count_syncs(func, args)
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given and storage.nbytes():
                self._note(storage)
        return result

    def _count_syncs(self, func: Any, args: Any) -> None:
        if func in SYNCS:
            self.syncs[SYNCS[func]] += 1
        elif func in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.syncs["boolean index"] += 1

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.live.add(key, size)
        weakref.finalize(storage, self.live.remove, key, size).atexit = False


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Saved:
    """A tensor that autograd keeps for the backward pass; counted while it is kept."""

    def __init__(self, tensor: Tensor, live: Live) -> None:
        self.tensor, self._live = tensor, live
        storage = tensor.untyped_storage()
        self._key, self._size = storage.data_ptr(), storage.nbytes()
        live.add(self._key, self._size)

    def __del__(self) -> None:
        self._live.remove(self._key, self._size)


class Count:
    """What one step did.

    Attributes:
        flops: floating-point operations by operator, of those that torch's counter knows (matrix products; attention
            on a CPU is none of them).
        layer_passes: forward passes through attention modules, with and without grad; recomputing counts as with grad.
        collectives: calls of functions that talk to other ranks, by name; a single process returns at once from them.
        saved: bytes that autograd kept for the backward pass, weights left out.
        operators: synchronizing operators, and the bytes of all tensors that the step allocated.
    """

    def __init__(self, weights: set[int], talkers: dict[type, tuple[str, ...]]) -> None:
        self._weights, self._talkers = weights, talkers
        self._flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
        self.layer_passes: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.saved = Live()
        self.operators = _Operators()

    def enter(self, stack: ExitStack) -> None:
        """Count until `stack` closes."""
        hook = nn.modules.module.register_module_forward_pre_hook(self._pass)
        stack.callback(hook.remove)
        for owner, names in self._talkers.items():
            for name in names:
                stack.enter_context(_counted(owner, name, self.collectives))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        stack.enter_context(self.operators)
        stack.enter_context(self._flops)

    def _pass(self, module: nn.Module, inputs: Any) -> None:
        if type(module).__name__.endswith("Attention"):  # inside what is checkpointed, unlike the layer itself
            self.layer_passes["with grad" if torch.is_grad_enabled() else "without grad"] += 1

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        return tensor if tensor.untyped_storage().data_ptr() in self._weights else _Saved(tensor, self.saved)

    def _unpack(self, packed: Tensor | _Saved) -> Tensor:
        return packed.tensor if isinstance(packed, _Saved) else packed

    def result(self) -> dict[str, Any]:
        """For the parent."""
        by_operator = {str(name): count for name, count in self._flops.get_flop_counts()["Global"].items()}
        return {
            "flops": self._flops.get_total_flops(),
            "flops_by_operator": by_operator,
            "layer_passes": dict(self.layer_passes),
            "collectives": dict(self.collectives),
            "syncs": dict(self.operators.syncs),
            "saved_bytes": self.saved.peak,
            "peak_bytes": self.operators.live.peak,
        }


@contextmanager
def _counted(owner: type, name: str, calls: Counter[str]) -> Iterator[None]:
    original: Callable[..., Any] = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[f"{owner.__name__}.{name}"] += 1
        return original(*args, **kwargs)

    setattr(owner, name, counting)
    yield
    setattr(owner, name, original)


class Meter:
    """A trainer's end of the conversation; one JSON object per line in each direction.

    Args:
        commands, answers: the parent's lines, and ours.
        talkers: methods that are collectives when there are several ranks.
        extras: what else the parent may ask for by name, between steps.
    """

    def __init__(self, commands: IO[str], answers: IO[str], talkers: dict[type, tuple[str, ...]]) -> None:
        self._commands, self._answers, self.talkers = commands, answers, talkers
        self.extras: dict[str, Callable[[], dict[str, Any]]] = {}
        self._weights: set[int] = set()
        self._stack = ExitStack()
        self._count: Count | None = None
        self._reset()

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._tokens = self._slots = 0

    def start(self, models: list[nn.Module], facts: dict[str, Any]) -> None:
        """Say that everything is set up; returns when the first step is wanted."""
        self._weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        self._say(facts)
        self._since, self._wall_since = time.process_time(), time.perf_counter()
        self._obey()

    def micro_step(self, loss: Tensor, tokens: int, slots: int) -> None:
        """Note a micro-step: its share of the step's loss, its real tokens, and all places that the model computed."""
        self._losses.append(loss.detach())
        self._tokens += tokens
        self._slots += slots

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While a trainer makes its batches on the host, whose tensors synchronize with nothing."""
        if self._count is None:
            yield
            return
        self._count.operators.syncs_count = False
        yield
        self._count.operators.syncs_count = True

    def step_done(self) -> None:
        """Report the step; returns when the next one is wanted. CPU-seconds run from one report to the next, so that
        what a trainer prepares in advance is paid for too; waiting costs none. On a GPU the host waits here for all
        that the step has queued, so that seconds are those of the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, wall = time.process_time(), time.perf_counter()
        self._stack.close()
        answer = {
            "cpu_seconds": now - self._since,
            "seconds": wall - self._wall_since,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            "loss": float(torch.stack(self._losses).double().sum()),
            "micro_steps": len(self._losses),
            "tokens": self._tokens,
            "slots": self._slots,
        }
        self._say(answer | ({} if self._count is None else self._count.result()))
        self._count = None
        self._reset()
        self._since, self._wall_since = time.process_time(), time.perf_counter()
        self._obey()

    def _obey(self) -> None:
        while True:
            line = self._commands.readline().strip()
            if line in self.extras:
                before, wall_before = time.process_time(), time.perf_counter()
                self._say(self.extras[line]())
                self._since += time.process_time() - before
                self._wall_since += time.perf_counter() - wall_before
                continue
            if line == "count":
                self._count = Count(self._weights, self.talkers)
                self._count.enter(self._stack)
            elif line != "time":
                raise Finished
            return

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)
