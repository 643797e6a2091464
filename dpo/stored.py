"""The stored reference: log-probs looked up by content, and computed live only where they are missing.

Before each step a rank looks its pairs up. How many forwards it needs for those that are missing travels with the
exchange that ranks make anyway (`agree`), so that under sharding all make the same number of them, and a frozen copy is
loaded by all at the same moment, with the first pair that is missing anywhere. The missing pairs are packed into
micro-batches of their own. What was computed reaches the store when the device has it ready; nothing waits for it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_utils.batching import collate, idle_batch, pack
from data_utils.schema import Layout, PairBatch, Step, TokenizedPair
from dpo.config import Config
from dpo.engine import Scorer
from dpo.gates import STEP0_TOLERANCE, GateError
from dpo.identity import Facts, identity_of, reference_facts, weights_sha
from dpo.logps import Observer
from dpo.pretrained import Pretrained
from dpo.reference import Reference
from dpo.steps import FILLER_ID, AgreedStep
from dpo.store import Store, default_store, own_folder
from dpo.store_blocks import pair_key
from dpo.store_index import keep_about, keep_making, why_elsewhere, why_missing
from dpo.world import World

CHECKED_PAIRS = 4
"""Stored pairs of each rank that are held against the live reference when it is first run."""


@dataclass(frozen=True)
class OpenStore:
    """A store, and what the token ids of this run's pairs are made with."""

    store: Store
    making: Facts


def open_store(
    config: Config,
    source: Pretrained,
    making: Facts,
    dtype: torch.dtype,
    world: World,
    say: Callable[[str], None],
) -> OpenStore:
    """The part of the store that holds the numbers of this reference; says what else there is when it holds none.

    Args:
        source: the reference.
        making: `making_facts` of this run.

    Raises:
        ConfigError: on every rank, when the folder or the weights' files cannot be used.
    """
    root = Path(config.reference.store) if config.reference.store else default_store()
    world.together(lambda: own_folder(root))
    facts = reference_facts(source, dtype, world.device, config.model.attn_implementation)
    sha = world.together(lambda: weights_sha(source, root) if world.is_main else "")
    facts = world.gather_objects(facts | {"weights": sha})[0]
    identity = identity_of(facts)
    store = world.together(lambda: Store(root / identity))
    if world.is_main:
        with contextlib.suppress(OSError):
            keep_about(store, facts, source.path)
        for line in [] if len(store) else why_elsewhere(root, identity, facts):
            say(f"reference  {line}, which is not used")
    return OpenStore(store, making)


@dataclass
class _Lookup:
    """What the store knows of a step.

    Attributes:
        keys, found: of each micro-batch's pairs: `pair_key`, and (B, 2) log-probs, NaN where they are missing.
        packed: micro-batches of what the live reference has to score: missing pairs, and stored ones to check.
        key_of: keys of those by identity of the pair.
        checked: log-probs of the stored ones among them by key.
        place_of: where the log-probs of chosen and rejected are in what was computed, by key.
    """

    keys: list[list[int]]
    found: list[np.ndarray]
    packed: list[list[TokenizedPair]]
    key_of: dict[int, int]
    checked: dict[int, np.ndarray]
    place_of: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pending:
    """Log-probs (S,) of a live micro-batch on their way to the host."""

    keys: list[int]
    logps_S: Tensor
    ready: torch.cuda.Event | None


class StoredReference(Reference):
    """A reference behind a store.

    Attributes:
        store: what it reads and adds to.
        layout: of the batches that the live reference gets.

    Args:
        open_scorer: makes the live reference; every rank calls it at the same moment.
        say: shows people a line.
    """

    def __init__(
        self,
        open_scorer: Callable[[], Scorer],
        opened: OpenStore,
        world: World,
        *,
        layout: Layout,
        tokens_per_micro_batch: int,
        dtype: torch.dtype,
        steps_per_epoch: int,
        say: Callable[[str], None],
    ) -> None:
        self.num_forwards = 0
        self.store, self._making = opened.store, opened.making
        self.remedy = f"{self.store.folder} is not what this model computes: remove that folder, and it is made again"
        self._open_scorer, self._world, self._say = open_scorer, world, say
        self.layout: Layout = layout
        self._budget, self._dtype, self._steps_per_epoch = tokens_per_micro_batch, dtype, steps_per_epoch
        self._live: Scorer | None = None
        self._is_checked = False
        self._has_told = self._has_told_problem = self._has_kept = False
        self._epoch = -1
        self._lookup = _Lookup([], [], [], {}, {})
        self._pending: deque[_Pending] = deque()

    def logps(self, batch: PairBatch, observe: Observer | None = None) -> Tensor:
        """See `Reference`; they came with the batch, and nothing else did."""
        assert batch.reference_logps_S is not None and observe is None
        return batch.reference_logps_S

    # ---- before a step

    def look_up(self, step: Step) -> int:
        """See `Reference`."""
        self._drain()
        keys = [[pair_key(pair) for pair in pairs] for pairs in step.pairs]
        found = self._find(keys, step.epoch)
        pairs = dict(zip(chain.from_iterable(keys), chain.from_iterable(step.pairs), strict=True))
        values = dict(zip(chain.from_iterable(keys), chain.from_iterable(found), strict=True))
        missing = [key for key, logps in values.items() if np.isnan(logps[0])]
        checked = {}
        if missing and not self._is_checked:
            stored = [key for key in values if not np.isnan(values[key][0])]
            checked = {key: values[key] for key in stored[:CHECKED_PAIRS]}
        scored = {key: pairs[key] for key in (*missing, *checked)}
        packed = pack(list(scored.values()), self.layout, self._budget)
        key_of = {id(pair): key for key, pair in scored.items()}
        self._lookup = _Lookup(keys, found, packed, key_of, checked)
        if missing and not self._has_told:
            self._tell(len(missing), len(values))
        return len(packed)

    def _find(self, keys: list[list[int]], epoch: int) -> list[np.ndarray]:
        """(B, 2) per micro-batch; what other processes have written since is read only where something is missing."""
        found = [self.store.look_up(batch_keys) for batch_keys in keys]
        is_new, self._epoch = epoch != self._epoch, epoch
        if any(np.isnan(logps).any() for logps in found):
            if is_new:
                self.store.refresh()
            if is_new or self.store.refresh_if_due():
                found = [self.store.look_up(batch_keys) for batch_keys in keys]
        return found

    def _tell(self, num_missing: int, num_pairs: int) -> None:
        self._has_told = True
        if len(self.store):
            why = why_missing(self.store, self._making)
            text = f"{num_missing} of the first {num_pairs} pairs are not among the {len(self.store):,} stored: {why}"
            self._say(f"reference  {text}")

    # ---- computing what is missing

    def complete(self, step: AgreedStep) -> AgreedStep:
        """See `Reference`.

        Raises:
            GateError: on every rank, when the store's numbers are not the live reference's.
        """
        lookup, computed_S = self._lookup, None
        if step.num_reference_forwards:
            computed_S = self._compute(lookup, step.num_reference_forwards)
            self._check(lookup, computed_S)
        if (step.number + 1) % self._steps_per_epoch == 0:  # other ranks may get these pairs in the next epoch
            self._drain(wait=True)
            self.store.flush()
        batches = [
            replace(batch, reference_logps_S=self._values(lookup, number, computed_S))
            if number < len(lookup.keys)
            else replace(batch, reference_logps_S=torch.zeros(2))
            for number, batch in enumerate(step.micro_batches)
        ]
        return replace(step, micro_batches=batches)

    def _compute(self, lookup: _Lookup, num_forwards: int) -> Tensor:
        """Log-probs of all that is packed, on the device; `place_of` says which is where."""
        if self._live is None:
            devices = [self._world.device] if self._world.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # a model that is loaded later must not move what is drawn
                self._live = self._open_scorer()
        parts: list[Tensor] = []
        offset = 0
        for number in range(num_forwards):
            pairs = lookup.packed[number] if number < len(lookup.packed) else []
            batch = collate(pairs, self.layout, FILLER_ID) if pairs else idle_batch(self.layout, FILLER_ID)
            logps_S = self._live(batch.to(self._world.device)).float()
            self.num_forwards += 1
            parts.append(logps_S)
            keys = [lookup.key_of[id(pair)] for pair in pairs]
            lookup.place_of |= {key: (offset + b, offset + len(keys) + b) for b, key in enumerate(keys)}
            offset += len(logps_S)
            if keys:
                self._send(keys, logps_S)
                self._drain()
        return torch.cat(parts)

    def _values(self, lookup: _Lookup, number: int, computed_S: Tensor | None) -> Tensor:
        """(S,) of a micro-batch: from the store on the host, or put together on the device."""
        known_S = torch.from_numpy(lookup.found[number].T.reshape(-1).copy())
        if self._world.device.type == "cuda":
            known_S = known_S.pin_memory()
        places_B2 = [lookup.place_of.get(key, (-1, -1)) for key in lookup.keys[number]]
        if computed_S is None or all(place == (-1, -1) for place in places_B2):
            return known_S
        places_S = torch.tensor(places_B2).T.reshape(-1).to(computed_S.device)
        known_S = known_S.to(computed_S.device, non_blocking=True)
        return torch.where(known_S.isnan(), computed_S[places_S.clamp(min=0)], known_S)

    def _check(self, lookup: _Lookup, computed_S: Tensor) -> None:
        """Hold stored pairs against the live reference, once."""
        if self._is_checked:
            return
        self._is_checked = True
        gap = 0.0
        if lookup.checked:
            live = computed_S.cpu().numpy()
            lengths = {key: _num_scored(pair) for pair in chain(*lookup.packed) for key in [lookup.key_of[id(pair)]]}
            for key, stored in lookup.checked.items():
                difference = np.abs(live[list(lookup.place_of[key])] - stored) / lengths[key]
                gap = max(gap, float(np.nan_to_num(difference, nan=np.inf).max()))
        worst, allowed = max(self._world.gather_objects(gap)), STEP0_TOLERANCE[self._dtype]
        if worst > allowed:
            raise GateError(
                f"reference.store: stored log-probs are {worst:.2g} nats per token off the reference (allowed"
                f" {allowed:g}): {self.remedy}"
            )

    # ---- to the store

    def _send(self, keys: list[int], logps_S: Tensor) -> None:
        """Start the copy of a live micro-batch's log-probs to the host."""
        if logps_S.device.type != "cuda":
            self._pending.append(_Pending(keys, logps_S.clone(), None))
            return
        host_S = torch.empty(logps_S.shape, pin_memory=True).copy_(logps_S, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._pending.append(_Pending(keys, host_S, ready))

    def _drain(self, wait: bool = False) -> None:
        """Give the store what has arrived; `wait`: all of it."""
        while self._pending and (wait or _has_arrived(self._pending[0])):
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()
            self.store.append(pending.keys, pending.logps_S.numpy().reshape(2, -1).T)
            if not self._has_kept:
                self._has_kept = True
                with contextlib.suppress(OSError):  # a full disk, which the store finds out as well
                    keep_making(self.store, self._making)
        self.store.flush_if_due()
        if self.store.problem is not None and not self._has_told_problem:
            self._has_told_problem = True
            self._say(f"warning: {self.store.problem}")

    def close(self) -> None:
        """Store what is still on its way."""
        self._drain(wait=True)
        self.store.close()


def _has_arrived(pending: _Pending) -> bool:
    return pending.ready is None or pending.ready.query()


def _num_scored(pair: TokenizedPair) -> np.ndarray:
    """(2,) scored tokens of chosen and rejected."""
    sides: Iterable = ((pair.chosen_scored, pair.chosen_ids), (pair.rejected_scored, pair.rejected_ids))
    return np.array([len(ids) if spans is None else sum(end - start for start, end in spans) for spans, ids in sides])
