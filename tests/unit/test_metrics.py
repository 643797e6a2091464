"""What is counted: parameters, floating-point operations, tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from data_utils.batching import collate, idle_batch
from data_utils.schema import Layout
from dpo.gates import probe_batch
from dpo.logps import LogitTransform
from dpo.metrics import Throughput, model_flops
from dpo.policy import Policy, Sizes
from dpo.world import World
from tests.numerics.tiny_models import random_pairs
from tests.tiny import tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_tell_body_from_embedding_and_head(tmp_path: Path, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, tied=tied))
    sizes = Sizes.of(Policy(model, LogitTransform(), "padded"))
    vocabulary = model.config.vocab_size * model.config.hidden_size
    assert sizes.all == sizes.trained == model.num_parameters()
    assert sizes.head == sizes.head_trained == vocabulary
    assert sizes.body == sizes.body_trained == sizes.all - vocabulary * (1 if tied else 2)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_model_flops_are_what_torch_counts(tmp_path: Path, layout: Layout) -> None:
    """torch's counter knows neither norms (no matrix product) nor attention on CPU nor `addmm_`, with which the
    head's weight gradient is added up; it does count the head's logits that the backward pass forms once more."""
    policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path)), LogitTransform(), layout)
    batch = probe_batch(policy.causal_lm.config.vocab_size, layout)
    sizes, num_scored = Sizes.of(policy), batch.labels_N.numel()
    with FlopCounterMode(display=False) as counter:
        policy(batch)[0].sum().backward()
    weight_gradient = again = 2 * sizes.head * num_scored
    norms = 6 * 5 * policy.causal_lm.config.hidden_size * batch.num_tokens
    expected = model_flops(sizes, batch.num_tokens, num_scored) - norms - weight_gradient + again
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("layout", "prompts"), [("shared", 1), ("packed", 2), ("padded", 2)])
def test_no_more_tokens_are_computed_and_counted_than_there_are(tmp_path: Path, layout: Layout, prompts: int) -> None:
    """Tokens per pair: P + C + R in a shared row, in every layer, which runs once; idle batches count for nothing."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path))
    policy = Policy(model, LogitTransform(), layout)
    pairs = random_pairs(5)
    batch = collate(pairs, layout, pad_token_id=0)
    computed: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0][..., 0].numel()))
    policy(batch)
    expected = sum(prompts * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    assert computed == [batch.num_slots] * 2
    assert (computed[0] == expected) == (layout != "padded")
    throughput = Throughput(World(0, 1, 0, torch.device("cpu"), None), Sizes.of(policy), None)
    throughput.add(batch)
    throughput.add(idle_batch(layout, 0))
    assert (throughput.tokens, throughput.slots) == (expected, computed[0])
    assert throughput.scored == sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
