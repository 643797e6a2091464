"""Log-probs of the scoring head: chunks, gradients, statistic, memory, precision, and no leak between sequences."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_utils.batching import collate
from data_utils.schema import Layout, TokenizedPair
from dpo import logps
from dpo.logps import LogitTransform, ScoringHead, chunk_rows, token_logps
from dpo.policy import Policy
from tests.numerics.tiny_models import VOCABULARY, described, random_pairs, tiny_model

HIDDEN = 8
TRANSFORMS = [LogitTransform(), LogitTransform(softcap=1.5), LogitTransform(scale=0.3), LogitTransform(2.0, 3.0)]


def random_head(rows: int, vocabulary: int, dtype: torch.dtype, with_bias: bool = False) -> tuple[Any, ...]:
    """(hidden_NH, weight_VH, bias_V or None, labels_N) whose logits have a deviation of about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight_VH = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype) if with_bias else None
    return hidden_NH, weight_VH, bias_V, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain_logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Tensor:
    """The same logits by the formula, differentiable."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V) * transform.scale
    return logits_NV if transform.softcap is None else transform.softcap * torch.tanh(logits_NV / transform.softcap)


def in_chunks_of(rows: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Make `chunk_rows` allow so many rows (half as many or so where there is a soft cap)."""
    monkeypatch.setattr(logps, "CHUNK_BYTES", rows * vocabulary * (4 if dtype == torch.float32 else 4 + dtype.itemsize))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(transform: LogitTransform, with_bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(3, 11, monkeypatch, torch.float64)
    hidden_NH, weight_VH, bias_V, labels_N = random_head(7, 11, torch.float64, with_bias)
    hidden_NH.requires_grad_()
    for parameter in (weight_VH, bias_V):
        if parameter is not None:
            parameter.requires_grad_(not frozen)

    def score(*inputs: Tensor | None) -> Tensor:
        hidden_NH, weight_VH, bias_V = inputs
        assert hidden_NH is not None and weight_VH is not None
        return token_logps(hidden_NH, weight_VH, bias_V, labels_N, transform)[0]

    assert torch.autograd.gradcheck(score, (hidden_NH, weight_VH, bias_V))
    expected_N = plain_logits(hidden_NH, weight_VH, bias_V, transform).log_softmax(-1)[range(7), labels_N]
    torch.testing.assert_close(score(hidden_NH, weight_VH, bias_V), expected_N)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_equal_one_chunk(transform: LogitTransform, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        hidden_NH, weight_VH, bias_V, labels_N = random_head(50, 97, torch.float32, with_bias=True)
        inputs = [hidden_NH] if frozen else [hidden_NH, weight_VH, bias_V]
        for tensor in inputs:
            tensor.requires_grad_()
        token_logps_N, statistic_N = token_logps(hidden_NH, weight_VH, bias_V, labels_N, transform, "log_sum_p2")
        assert statistic_N is not None
        upstream_N = torch.linspace(-1, 2, 50)
        return [token_logps_N, statistic_N, *torch.autograd.grad(token_logps_N, inputs, upstream_N)]

    assert chunk_rows(97, torch.float32) > 50
    whole = run()
    in_chunks_of(16, 97, monkeypatch, torch.float32)
    assert chunk_rows(97, torch.float32) == 16
    torch.testing.assert_close(run(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_log_sum_p2(transform: LogitTransform) -> None:
    hidden_NH, weight_VH, bias_V, labels_N = random_head(50, 97, torch.float32, with_bias=True)
    alone_N, nothing = token_logps(hidden_NH, weight_VH, bias_V, labels_N, transform)
    token_logps_N, statistic_N = token_logps(hidden_NH, weight_VH, bias_V, labels_N, transform, "log_sum_p2")
    log_probs_NV = plain_logits(hidden_NH, weight_VH, bias_V, transform).double().log_softmax(-1)
    expected_N = (2 * log_probs_NV).logsumexp(-1)
    assert nothing is None and statistic_N is not None and torch.equal(alone_N, token_logps_N)
    torch.testing.assert_close(statistic_N.double(), expected_N, rtol=1e-5, atol=1e-5)


def test_certain_and_impossible_tokens_stay_finite() -> None:
    hidden_NH = torch.tensor([[300.0], [300.0], [-300.0]], requires_grad=True)
    weight_VH = torch.tensor([[1.0], [-1.0]])
    token_logps_N, statistic_N = token_logps(
        hidden_NH, weight_VH, None, torch.tensor([0, 1, 1]), statistic="log_sum_p2"
    )
    token_logps_N.sum().backward()
    assert (
        token_logps_N.tolist() == [0.0, -600.0, 0.0] and statistic_N is not None and statistic_N.tolist() == [0, 0, 0]
    )
    assert hidden_NH.grad is not None and hidden_NH.grad.flatten().tolist() == [0.0, -2.0, 0.0]


def test_a_frozen_head_keeps_only_the_gradient_for_backward() -> None:
    hidden_NH, weight_VH, _, labels_N = random_head(20, 97, torch.float32)
    frozen_N, _ = token_logps(hidden_NH.requires_grad_(), weight_VH, None, labels_N)
    assert frozen_N.grad_fn is not None
    assert [saved.shape for saved in frozen_N.grad_fn.saved_tensors] == [hidden_NH.shape]  # type: ignore[attr-defined]


# ---- memory


@pytest.mark.parametrize("vocabulary", [50_000, 128_256, 262_144, 2**27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_softcap", [False, True])
def test_chunk_rows_stay_below_the_cap(vocabulary: int, dtype: torch.dtype, with_softcap: bool) -> None:
    bytes_per_row = vocabulary * ({torch.float32: 4, torch.bfloat16: 6}[dtype] + (4 if with_softcap else 0))
    rows = chunk_rows(vocabulary, dtype, with_softcap)
    assert rows == 1 or rows * bytes_per_row <= 128 * 2**20
    assert (rows + 1) * bytes_per_row > 128 * 2**20


class LiveLogits(TorchDispatchMode):
    """Notes the most bytes that tensors of a vocabulary's width occupy together (but for the weight transposed)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.peak_bytes = vocabulary, 0
        self._alive: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and tensor.ndim == 2
                and tensor.shape[1] == self.vocabulary
                and len(tensor) > HIDDEN
            ):
                storage = tensor.untyped_storage()
                self._alive.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        self._alive = [entry for entry in self._alive if entry[0]() is not None]
        self.peak_bytes = max(self.peak_bytes, sum({address: size for _, address, size in self._alive}.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS[:2], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_logits_alive_at_once_stay_below_the_cap(
    dtype: torch.dtype, transform: LogitTransform, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps, "CHUNK_BYTES", 2**18)
    hidden_NH, weight_VH, _, labels_N = random_head(300, 1024, dtype)
    weight_VH.requires_grad_(not frozen)
    with LiveLogits(1024) as live:
        token_logps_N, _ = token_logps(hidden_NH.requires_grad_(), weight_VH, None, labels_N, transform, "log_sum_p2")
        token_logps_N.sum().backward()
    assert 2**17 < live.peak_bytes <= 2**18


# ---- precision


def test_bf16_model_gives_fp32_sums() -> None:
    model = tiny_model("llama", max_position_embeddings=2048).bfloat16()
    tokens = torch.randint(0, VOCABULARY, (1810,), generator=torch.Generator().manual_seed(0)).tolist()
    pair = replace(random_pairs(1)[0], prompt_ids=tokens[:10], chosen_ids=tokens[10:1000], rejected_ids=tokens[1010:])
    batch = collate([pair], "packed", pad_token_id=0)
    policy = Policy(model, described(model).logit_transform, "packed").eval()
    with torch.no_grad():
        logps_S, _ = policy(batch)
        hidden_NH = policy._hidden(batch)[0, batch.score_positions_N]
        logits_NV = policy.head(hidden_NH)
    assert logits_NV.dtype == torch.bfloat16 and logps_S.dtype == torch.float32

    def sums(log_probs_NV: Tensor) -> Tensor:
        picked_N = log_probs_NV.gather(1, batch.labels_N[:, None]).squeeze(1)
        return torch.stack([picked_N[batch.sequence_of_N == sequence].sum() for sequence in (0, 1)]).double()

    exact_S = sums(logits_NV.double().log_softmax(-1))
    torch.testing.assert_close(logps_S.double(), exact_S, rtol=1e-6, atol=1e-3)
    assert ((sums(logits_NV.log_softmax(-1)) - exact_S).abs() > 1).all(), "a bf16 sum is off by whole nats"


# ---- leaks


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "phi3", "gpt_oss"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("response", ["chosen_ids", "rejected_ids"])
def test_a_changed_token_reaches_its_own_sequence_only(family: str, layout: Layout, response: str) -> None:
    model = tiny_model(family)
    policy = Policy(model, described(model).logit_transform, layout).eval()
    pairs = random_pairs(3)
    changed_ids = list(getattr(pairs[1], response))
    changed_ids[0] = (changed_ids[0] + 1) % VOCABULARY
    changed_pairs: list[TokenizedPair] = [pairs[0], replace(pairs[1], **{response: changed_ids}), pairs[2]]
    with torch.no_grad():
        before_S, _ = policy(collate(pairs, layout, pad_token_id=0))
        after_S, _ = policy(collate(changed_pairs, layout, pad_token_id=0))
    changed = [sequence for sequence in range(6) if before_S[sequence] != after_S[sequence]]
    assert changed == [1 if response == "chosen_ids" else 4]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_no_gradient_reaches_another_sequence_of_the_row(family: str, layout: Layout) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    policy = Policy(model, described(model).logit_transform, layout).eval()
    pair = replace(random_pairs(1)[0], prompt_ids=[1, 2, 3], chosen_ids=[4, 5, 6, 7], rejected_ids=[8, 9, 10])
    logps_S, _ = policy(collate([pair], layout, pad_token_id=0))
    logps_S[1].backward()
    gradient_VH = model.get_input_embeddings().weight.grad
    assert isinstance(gradient_VH, Tensor)
    touched = gradient_VH.abs().sum(1).nonzero().flatten().tolist()
    assert touched == [1, 2, 3, 8, 9], "the prompt and what the rejected response predicts from, not its last token"


def test_only_a_plain_linear_head_is_adopted() -> None:
    with pytest.raises(AssertionError):
        ScoringHead.adopt(nn.Bilinear(2, 2, 2), LogitTransform())
