"""What preflight makes of the facts of all ranks: pure functions from facts to rows of the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Facts = Sequence[Mapping[str, Any]]
MAX_SKEW_S = 2.0
MIN_OPEN_FILES = 1024
MIN_SHARED_MEMORY_GIB = 1.0
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    failed: bool
    found: str


def judge(facts: Facts, needed_bytes: int | None) -> list[Check]:
    """All rows.

    Args:
        facts: one mapping per rank, in the order of ranks, as `preflight_ranks.Ranks.facts` gathers them.
        needed_bytes: what checkpoints will take; None: unknown.
    """
    return [
        _nodes(facts),
        _same(facts, "devices", "device"),
        _same(facts, "drivers", "driver"),
        _all_reduce(facts),
        _same(facts, "code", "code"),
        _same(facts, "config", "config"),
        _same(facts, "packages", "packages"),
        _port(facts),
        _shared_files(facts),
        _disk(facts, needed_bytes),
        _clocks(facts),
        _limits(facts),
    ]


def by_node(facts: Facts) -> dict[str, list[Mapping[str, Any]]]:
    """The facts of each node's ranks."""
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for fact in facts:
        nodes.setdefault(fact["host"], []).append(fact)
    return nodes


def _named(nodes: Mapping[str, str]) -> str:
    """ "node: why" for each, in few words."""
    return "; ".join(f"{node}: {why}" for node, why in nodes.items())


def _nodes(facts: Facts) -> Check:
    counts = {node: len(ranks) for node, ranks in by_node(facts).items()}
    usual = Counter(counts.values()).most_common(1)[0][0]
    odd = {node: f"{number} ranks, others {usual}" for node, number in counts.items() if number != usual}
    return Check("nodes", bool(odd), _named(odd) or f"{len(counts)}, {usual} ranks each")


def _same(facts: Facts, name: str, key: str) -> Check:
    """All ranks have the value that most have."""
    usual = Counter(fact[key] for fact in facts).most_common(1)[0][0]
    odd = {fact["host"]: f"{fact[key]}, others {usual}" for fact in facts if fact[key] != usual}
    return Check(name, bool(odd), _named(odd) or str(usual))


def _all_reduce(facts: Facts) -> Check:
    wrong = {fact["host"]: f"rank {fact['rank']} got a wrong sum" for fact in facts if not fact["sum_is_right"]}
    rate = min(fact["bytes_per_s"] for fact in facts)
    found = "one rank" if len(facts) == 1 else f"sums are right; {rate / 1e9:.2f} GB/s per rank"
    return Check("all-reduce", bool(wrong), _named(wrong) or found)


def _port(facts: Facts) -> Check:
    busy = {fact["host"]: fact["busy_port"] for fact in facts if fact["busy_port"] is not None}
    named = {host: f"port {port} is in use by another process, set --master {host}:PORT" for host, port in busy.items()}
    return Check("port", bool(busy), _named(named) or "free")


def _shared_files(facts: Facts) -> Check:
    blind = {fact["host"]: f"does not see {fact['run_dir']}" for fact in facts if not fact["sees_run_dir"]}
    unwritable = {fact["host"]: fact["write_problem"] for fact in facts if fact["write_problem"]}
    return Check(
        "run.dir", bool(blind or unwritable), _named(unwritable | blind) or f"{facts[0]['run_dir']}, seen by all"
    )


def _disk(facts: Facts, needed_bytes: int | None) -> Check:
    free = facts[0]["free_bytes"]
    if needed_bytes is None:
        return Check("disk", False, f"{free / GIB:.0f} GiB free (the model's size is not known here)")
    found = f"{needed_bytes / GIB:.1f} GiB needed for checkpoints and export, {free / GIB:.1f} GiB free"
    return Check("disk", needed_bytes > free, found)


def _clocks(facts: Facts) -> Check:
    middle = median(fact["clock"] for fact in facts)
    skew = {fact["host"]: fact["clock"] - middle for fact in facts}
    odd = {node: f"{s:+.1f} s off: start a time service there" for node, s in skew.items() if abs(s) > MAX_SKEW_S}
    return Check("clocks", bool(odd), _named(odd) or f"within {max(map(abs, skew.values())):.2f} s")


def _limits(facts: Facts) -> Check:
    low: dict[str, str] = {}
    for fact in facts:
        if fact["buffers"]:
            low[fact["host"]] = fact["buffers"]
        elif fact["open_files"] < MIN_OPEN_FILES:
            low[fact["host"]] = f"{fact['open_files']} open files: raise it (ulimit -n {MIN_OPEN_FILES})"
        elif fact["needs_shared_memory"] and fact["shared_memory_bytes"] < MIN_SHARED_MEMORY_GIB * GIB:
            low[fact["host"]] = (
                f"{fact['shared_memory_bytes'] / GIB:.2f} GiB of shared memory: NCCL needs {MIN_SHARED_MEMORY_GIB:.0f}"
            )
        elif fact["needs_shared_memory"] and fact["locked_memory_bytes"] not in (-1,) and fact["has_infiniband"]:
            low[fact["host"]] = "locked memory is limited: InfiniBand needs ulimit -l unlimited"
    return Check("limits", bool(low), _named(low) or f"{min(fact['open_files'] for fact in facts)} open files or more")
