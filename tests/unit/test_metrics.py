"""What is counted: parameters, floating-point operations."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo.gates import probe_batch
from dpo.logps import LogitTransform
from dpo.metrics import model_flops
from dpo.policy import Policy, Sizes
from tests.tiny import tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_tell_body_from_embedding_and_head(tmp_path: Path, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, tied=tied))
    sizes = Sizes.of(Policy(model, LogitTransform(), "padded"))
    vocabulary = model.config.vocab_size * model.config.hidden_size
    assert sizes.all == sizes.trained == model.num_parameters()
    assert sizes.head == sizes.head_trained == vocabulary
    assert sizes.body == sizes.body_trained == sizes.all - vocabulary * (1 if tied else 2)


def test_model_flops_are_what_torch_counts(tmp_path: Path) -> None:
    """torch's counter knows neither norms (no matrix product) nor attention on CPU nor `addmm_`, with which the
    head's weight gradient is added up; it does count the head's logits that the backward pass forms once more."""
    policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path)), LogitTransform(), "packed")
    batch = probe_batch(policy.causal_lm.config.vocab_size, "packed")
    sizes, num_scored = Sizes.of(policy), batch.labels_N.numel()
    with FlopCounterMode(display=False) as counter:
        policy(batch)[0].sum().backward()
    weight_gradient = again = 2 * sizes.head * num_scored
    norms = 6 * 5 * policy.causal_lm.config.hidden_size * batch.num_tokens
    expected = model_flops(sizes, batch.num_tokens, num_scored) - norms - weight_gradient + again
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
