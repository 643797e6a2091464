"""Quantized base weights: what bitsandbytes makes of them, in layers of ours, and nothing left out silently."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from dpo.build import describe_quantized
from dpo.config import ConfigError, LoraSection, ModelSection, parse_config
from dpo.gates import probe_batch
from dpo.policy import Policy, Sizes, add_lora, evaluating, frozen_policy, trained_policy
from dpo.pretrained import Pretrained
from dpo.quantize import Coverage, Quantization, QuantizedLinear, dequantize
from tests.numerics import tiny_models
from tests.tiny import tiny_model

KINDS = [
    ("nf4", True, torch.float32),
    ("nf4", False, torch.float32),
    ("nf4", True, torch.bfloat16),
    ("int8", True, torch.float32),
    ("int8", True, torch.bfloat16),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("quantize") / "model")


def opened(model: Path, kind: str, double: bool = True) -> Pretrained:
    return Pretrained.of(ModelSection(str(model), quantization=kind, double_quantization=double))  # type: ignore[arg-type]


def config_of(model: Path, *flags: str):
    return parse_config(["--model.path", str(model), "--data.train", "d", "--run.dir", "r", "--lora.r", "4", *flags])


@pytest.mark.parametrize(("kind", "double", "dtype"), KINDS)
def test_layers_hold_what_bitsandbytes_makes_of_the_weights(
    model: Path, kind: str, double: bool, dtype: torch.dtype
) -> None:
    """Bit for bit as stock transformers dequantizes the same model, and an nf4 model gives the stock one's logits."""
    ours = opened(model, kind, double).load(dtype)
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=settings).train()
    ids = torch.arange(60).view(2, 30)
    if kind == "nf4":
        gap = (ours(ids).logits - stock(ids).logits).abs().max().item()
        assert gap < (1e-5 if dtype == torch.float32 else 0.1)
    stock = stock.dequantize(dtype=dtype)
    names = [name for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(names) == 14
    for name in names:
        layer = ours.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert layer.dequantized(layer.weight).equal(stock.get_submodule(name).weight)


@pytest.mark.parametrize(("kind", "double", "dtype"), KINDS)
def test_a_model_without_weights_has_the_shapes_of_one_with(
    model: Path, kind: str, double: bool, dtype: torch.dtype
) -> None:
    """Ranks that get their shards from rank 0 rely on it."""
    source = opened(model, kind, double)
    full, empty = source.load(dtype), source.empty(dtype)

    def facts(module: nn.Module) -> dict:
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return {name: (tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors}

    assert facts(full) == facts(empty)
    assert Coverage.of(full) == Coverage.of(empty) == Coverage(14, 2 * (32 * 32 * 3 + 32 * 48 * 3), {})


@pytest.mark.parametrize(("kind", "double", "dtype"), KINDS)
def test_the_reference_is_the_quantized_base_bit_for_bit(
    model: Path, kind: str, double: bool, dtype: torch.dtype
) -> None:
    """Adapter off, and adapter on before training, equal a frozen policy of the base; also when it has been trained."""
    source, layout = opened(model, kind, double), "shared"
    batch = probe_batch(300, layout)
    with torch.no_grad():
        base_S, _ = frozen_policy(source, layout, dtype)(batch)
    policy = trained_policy(source, config_of(model, "--model.quantization", kind), layout, dtype)
    logps_S, _ = policy(batch)
    assert logps_S.equal(base_S)
    logps_S.sum().backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter += 0.1 * parameter.grad.sign()
    with evaluating(policy):
        moved_S, _ = policy(batch)
        with policy.adapter_off():
            off_S, _ = policy(batch)
    assert off_S.equal(base_S) and (moved_S - base_S).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_those_of_the_dequantized_model(model: Path, kind: str) -> None:
    batch, gradients = probe_batch(300, "packed"), []
    for base in (opened(model, kind).load(torch.float32), dequantize(opened(model, kind).load(torch.float32))):
        transform = opened(model, kind).logit_transform
        policy = Policy(add_lora(base, LoraSection(r=4), seed=1), transform, "packed")
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.02)
        policy(batch)[0].sum().backward()
        gradients.append([p.grad for n, p in policy.named_parameters() if "lora_" in n])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_trained_and_what_is_quantized_is_counted_at_full_size(model: Path) -> None:
    source, config = opened(model, "nf4"), config_of(model, "--model.quantization", "nf4")
    policy = trained_policy(source, config, "packed", torch.float32)
    plain = Pretrained.open(str(model))
    assert Sizes.of(policy) == Sizes.of(trained_policy(plain, config_of(model), "packed", torch.float32))
    text = describe_quantized(policy, source, torch.float32)
    assert text == "15.4k weights of 14 linear layers in nf4; embeddings, head, norms in float32"
    assert describe_quantized(policy, plain, torch.float32) == ""
    policy.model.set_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer", nn.Linear(32, 48))
    with pytest.raises(AssertionError):
        describe_quantized(policy, source, torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_whose_layers_are_transposed_and_have_biases(tmp_path: Path, kind: str) -> None:
    tiny_models.tiny_model("gpt2", vocab_size=300).save_pretrained(tmp_path)
    source = opened(tmp_path, kind)
    model = source.load(torch.float32)
    assert source.quantization is not None
    assert all(layer.bias is not None for layer in model.modules() if isinstance(layer, QuantizedLinear))
    ids = torch.arange(40).view(2, 20)
    settings = (
        BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else source.quantization.settings(model, model.dtype)
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=settings)
    with torch.no_grad():
        expected = stock.dequantize(dtype=torch.float32).eval()(ids).logits
        assert (model.eval()(ids).logits - expected).abs().max() < 1e-4
        assert (dequantize(model)(ids).logits - expected).abs().max() < 1e-4


def test_a_model_whose_experts_would_stay_as_they_are_is_refused(tmp_path: Path) -> None:
    tiny_models.tiny_model("mixtral", vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model.quantization: .* weights are in no plain linear layer .*experts"):
        opened(tmp_path, "nf4").empty(torch.float32)


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path, model: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"its weights are quantized already \(bitsandbytes\)"):
        Pretrained.open(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lora.r", "0"], "model.quantization=nf4 freezes the base, but lora.r=0: set --lora.r 16"),
        (["--lora.use_dora", "true"], "lora.use_dora reads the base weights, which nf4 has packed"),
        (["--model.quantization", "int8", "--model.double_quantization", "false"], "double_quantization does nothing"),
    ],
)
def test_what_cannot_work_is_refused(model: Path, flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(model, "--model.quantization", "nf4", *flags)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("kind", "double", "bits"), [("nf4", True, 4.127), ("nf4", False, 4.5), ("int8", True, 8.01)])
def test_bytes_of_a_layer(kind: str, double: bool, bits: float) -> None:
    how = Quantization(kind, double)  # type: ignore[arg-type]
    statistics = how.statistics(4096 * 4096, 4096).values()
    num_bytes = how.weight_bytes(4096 * 4096) + sum(math.prod(shape) * dtype.itemsize for shape, dtype in statistics)
    assert num_bytes * 8 / 4096**2 == pytest.approx(bits, abs=0.01)
