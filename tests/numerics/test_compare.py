"""The benchmark against TRL: FLOPs that may not grow, counts that are right, and the whole of it on a tiny case."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.compare_case import TINY, Case, CaseError, case_of_files, case_of_lengths, load_case
from benchmarks.compare_meter import Count, Finished, Live, Meter
from benchmarks.compare_report import plot, table
from benchmarks.flop_gate import LIMIT, MEMBERS, count_step, gate_case, name_of, off_record, recorded
from benchmarks.length_models import LENGTH_MODELS, drawn_pairs
from tests.tiny import tiny_pairs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return gate_case(tmp_path_factory.mktemp("gate") / "case")


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: name_of(*member))
def test_flops_per_pair_are_those_of_the_record(case: Case, tmp_path: Path, member: tuple[str, str, str]) -> None:
    counted = count_step(case, tmp_path, *member)
    assert not off_record({name_of(*member): counted["flops"] / case.size.pairs}, recorded())
    if member[1] != "padded":  # where transformers asks the mask whether anything is padded
        assert counted["syncs"] == {}, "a micro-step must not wait for the device"
    assert counted["collectives"] == {"World.exchange": 1}, "ranks agree once per step, on the CPU"


def test_the_gate_notices_three_percent_both_ways() -> None:
    record = {"full/auto/live": 100.0}
    assert off_record({"full/auto/live": 100 * (1 + LIMIT - 1e-9)}, record) == []
    assert "+3.1%" in off_record({"full/auto/live": 103.1}, record)[0]
    assert "-3.1%" in off_record({"full/auto/live": 96.9}, record)[0]
    assert "not in the record" in off_record({"lora/auto/live": 1.0}, record)[0]


class Attention(nn.Module):
    """Named as the meter expects; one product of (4, 8) by (8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).square()


def step(layer: Attention, meter: Meter) -> None:
    with meter.aside():
        assert torch.ones(1).item() == 1
    x = torch.ones(4, 8)
    with torch.no_grad():
        layer(x)
    loss = layer(x).sum()
    loss.backward()
    assert loss.item() == 4 * 8 * 64
    assert len(x[x > 0]) == 32
    meter.micro_step(loss, tokens=3, slots=4)
    meter.step_done()


def test_a_meter_counts_what_a_step_does() -> None:
    layer, answers = Attention(), io.StringIO()
    meter = Meter(io.StringIO("count\ntime\nstop\n"), answers, {})
    meter.start([layer], {"ready": True})
    step(layer, meter)
    with pytest.raises(Finished):
        step(layer, meter)
    ready, counted, timed = map(json.loads, answers.getvalue().splitlines())
    assert ready == {"ready": True}
    product = 2 * 4 * 8 * 8
    assert counted["flops"] == 3 * product, "twice forward, once for the weight's gradient; the input needs none"
    assert counted["layer_passes"] == {"without grad": 1, "with grad": 1}
    assert counted["syncs"] == {"item": 1, "boolean index": 1}
    assert counted["saved_bytes"] == 2 * 4 * 8 * 4, "the input and what is squared; not the weight"
    assert counted["tokens"] == 3 and counted["slots"] == 4
    assert "flops" not in timed and timed["loss"] == counted["loss"]


def test_products_that_are_added_in_place_are_counted_too() -> None:
    """The gradient of a trained head's weight, and LoRA's second product."""
    count = Count(set(), {})
    with ExitStack() as stack:
        count.enter(stack)
        torch.zeros(2, 5).addmm_(torch.ones(2, 3), torch.ones(3, 5))
    assert count.result()["flops"] == 2 * 2 * 3 * 5


def test_live_bytes_count_a_storage_once() -> None:
    live = Live()
    live.add(1, 10)
    live.add(1, 10)
    live.add(2, 5)
    live.remove(1, 10)
    assert live.bytes == 15
    live.remove(1, 10)
    assert (live.bytes, live.peak) == (5, 15)


def test_a_case_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, same, other = (
        case_of_lengths(tmp_path / name, TINY, "tldr", seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one.ids_sha256 == same.ids_sha256 != other.ids_sha256
    assert load_case(one.folder) == one
    assert max(one.lengths) <= TINY.max_length
    weights = [(Path(case.model) / "model.safetensors").read_bytes() for case in (one, same)]
    assert weights[0] == weights[1]


def test_a_case_of_files_leaves_out_what_cannot_be_used(tmp_path: Path) -> None:
    shard = tiny_pairs(tmp_path / "pairs.jsonl", 30)
    bad = [
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]}
        | {"rejected": [{"role": "assistant", "content": "c"}]},
    ]
    shard.write_text(shard.read_text() + "".join(json.dumps(row) + "\n" for row in bad))
    case = case_of_files(tmp_path / "case", TINY, [str(shard)], seed=0)
    assert len(case.rows()) == TINY.pairs
    assert case.dropped == {"empty_response": 1, "other_kind_than_first": 1}
    tiny_pairs(shard, TINY.pairs - 1)
    with pytest.raises(CaseError, match=f"{TINY.pairs - 1} pairs can be used, but a step takes {TINY.pairs}"):
        case_of_files(tmp_path / "few", TINY, [str(shard)], seed=0)


@pytest.mark.parametrize(("name", "factor"), [("hh", 1.60), ("ultrafeedback", 1.17), ("tldr", 1.85)])
def test_length_models_have_the_known_factor(name: str, factor: float) -> None:
    assert LENGTH_MODELS[name].prompt_factor == pytest.approx(factor, abs=0.02)


@pytest.mark.parametrize("name", LENGTH_MODELS)
def test_drawn_lengths_follow_their_model(name: str) -> None:
    model = LENGTH_MODELS[name]
    draws = [model.draw(random.Random(seed), 100_000) for seed in range(2000)]
    for place, length in enumerate((model.prompt, model.chosen, model.rejected)):
        values = sorted(draw[place] for draw in draws)
        found = [values[round(q * (len(values) - 1))] for q in (0.1, 0.5, 0.9)]
        assert found == pytest.approx(length.percentiles, rel=0.12, abs=1)
    assert next(drawn_pairs(model, 1024, 512, 1)) == next(drawn_pairs(model, 1024, 512, 1))


@pytest.mark.slow
def test_the_whole_comparison_on_a_tiny_case(tmp_path: Path) -> None:
    record = tmp_path / "out.json"
    command = [
        sys.executable,
        "benchmarks/compare_trl.py",
        "--tiny",
        "--repeats",
        "1",
        "--tuned_micro_batch",
        "4",
        "--mode",
        "lora",
    ]
    command += ["--layout", "packed", "--json", str(record), "--record", str(tmp_path / "kept")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    document = json.loads(record.read_text())
    ratios = {(ratio["mode"], ratio["rival"]): ratio for ratio in document["ratios"]}
    assert len(ratios) == 2
    # Exact in this case, so known: unpadded rows against padded ones, and four forwards' worth against three;
    # TRL also forms the gradient of the frozen head's weight.
    assert ratios["lora", "trl-default"]["flops_ratio"] == pytest.approx(3.61, rel=0.03)
    assert ratios["lora", "trl-tuned"]["flops_ratio"] == pytest.approx(1.58, rel=0.03)
    rivals = [side for side in document["sides"] if side["trainer"] == "trl-default"]
    assert all(side["forwards_with_grad"] == 2 and side["forwards_without_grad"] == 1 for side in rivals)
    assert all(side["metric_collectives_per_micro_step"] == 15 for side in rivals)
    (kept,) = (tmp_path / "kept").glob("*.json")
    assert json.loads(kept.read_text()) == document
    assert kept.with_suffix(".svg").read_text() == plot(
        document["sides"], "hh: packed, reference live, one CPU thread, fp32"
    )
    assert table(document["sides"], document["ratios"]) in done.stdout


def test_layouts_that_the_config_does_not_know_are_refused() -> None:
    command = [sys.executable, "benchmarks/compare_trl.py", "--tiny", "--layout", "folded"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--batch.layout" in done.stderr and "'folded'" in done.stderr
