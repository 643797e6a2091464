"""The model that is trained: loading, LoRA, and one module whose forward returns log-probs.

`Policy` wraps a causal language model so that every engine sees a single root module: hidden states, scored positions
and the head all lie inside its forward, where the hooks of FSDP2 and ZeRO-3 gather weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from data_utils.batching import sequence_places
from data_utils.schema import Layout, PairBatch
from dpo import attention
from dpo.adapters import fuse
from dpo.config import Config, ConfigError, LoraSection, ModelSection
from dpo.layers import compile_layers, recompute_layers
from dpo.logps import HeadStatistic, LogitTransform, Observer, ScoringHead, sum_by_sequence, tail_weights
from dpo.offload import Offload
from dpo.quantize import Quantization, adopt, dequantize, num_weights
from dpo.quantize import empty as empty_quantized
from dpo.routers import Routers, wants_logits

_STATELESS_LAYERS = {"full_attention", "sliding_attention"}
_LAYER_KEYS = ("layer_types", "layers_block_type", "block_types")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model on disk or on a hub, described by its configuration; no weights are read yet.

    Attributes:
        config: its configuration with every dropout at 0.
        dropouts: the dropout settings as published, which an export restores.
        key: the config key that names it, for messages.
        quantization: how the weights are kept, where not as they are.
    """

    path: str
    config: PretrainedConfig
    dropouts: dict[str, float]
    trust_remote_code: bool
    key: str = "model.path"
    quantization: Quantization | None = None

    @staticmethod
    def of(model: ModelSection) -> Pretrained:
        """The model that the config's section names, quantized as it says."""
        opened = Pretrained.open(model.path, model.attn_implementation, model.trust_remote_code)
        if model.quantization == "none":
            return opened
        return replace(opened, quantization=Quantization(model.quantization, model.double_quantization))

    @staticmethod
    def open(
        path: str, attn_implementation: str | None = None, trust_remote_code: bool = False, key: str = "model.path"
    ) -> Pretrained:
        """Read the configuration of `path`, which `key` of the config names.

        Raises:
            ConfigError: there is no such model, it needs code that is not trusted, or it is quantized already.
        """
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_dir()
        if looks_local and not (Path(path) / "config.json").is_file():
            raise ConfigError(
                f"{key}={path}: no config.json there; give a folder written by save_pretrained or a hub name"
            )
        if looks_local and not trust_remote_code and not any(Path(path).glob("*.safetensors")):
            raise ConfigError(f"{key}={path}: no *.safetensors there; convert its weights with save_pretrained")
        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **extra)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                remedy = "read it, then set --model.trust_remote_code true to run it"
                raise ConfigError(f"{key}={path}: needs Python code that comes with it: {remedy}") from error
            raise ConfigError(f"{key}={path}: {_first_line(error)}") from error
        if method := getattr(config, "quantization_config", None):
            name = method.get("quant_method") if isinstance(method, dict) else type(method).__name__
            raise ConfigError(
                f"{key}={path}: its weights are quantized already ({name}): give the model in 16 or 32 bits, and set"
                " --model.quantization nf4"
            )
        text_config = config.get_text_config()
        dropouts = {
            key: value for key, value in vars(text_config).items() if "drop" in key and isinstance(value, float)
        }
        for name in dropouts:
            setattr(text_config, name, 0.0)
        return Pretrained(path, config, dropouts, trust_remote_code, key)

    def restore_dropouts(self, config: PretrainedConfig) -> None:
        """Put the published dropout settings back into a configuration that is to be saved."""
        for key, value in self.dropouts.items():
            setattr(config.get_text_config(), key, value)

    @property
    def text_config(self) -> PretrainedConfig:
        """The language model's part of the configuration."""
        return self.config.get_text_config()

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for, where its configuration says so."""
        return getattr(self.text_config, "max_position_embeddings", None)  # GPT-2 calls it n_positions

    @property
    def logit_transform(self) -> LogitTransform:
        """Scale and soft cap that this model applies to its head's output (the start-up check proves it)."""
        values = self.text_config.to_dict()
        scale = (values.get("logit_scale") or 1.0) / (values.get("logits_scaling") or 1.0)
        scale *= values.get("lm_head_multiplier") or 1.0
        softcap = values.get("final_logit_softcapping") or values.get("logits_soft_cap")
        return LogitTransform(float(scale), softcap)

    def has_vocabulary_of(self, other: Pretrained) -> bool:
        """Whether the two predict over equally many tokens."""
        return self.text_config.vocab_size == other.text_config.vocab_size

    def empty(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on the meta device: shapes without storage."""
        model = self._plain(dtype)
        return model if self.quantization is None else empty_quantized(model, self.quantization, dtype)

    def _plain(self, dtype: torch.dtype) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def load(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The model with its weights, on CPU (partitioned over the ranks inside a `zero.Init` context).

        Args:
            device: where quantized weights are quantized and kept; the CPU where not given.

        Raises:
            ConfigError: weights are missing, unreadable, or pickled and not trusted.
        """
        safetensors_only = None if self.trust_remote_code else True
        quantized: dict[str, Any] = {}
        if self.quantization is not None:
            settings = self.quantization.settings(self._plain(dtype), dtype)
            quantized = {"quantization_config": settings, "device_map": {"": str(device or "cpu")}}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=self.config,
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=safetensors_only,
                **quantized,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.key}={self.path}: {_first_line(error)}") from error
        return model if self.quantization is None else adopt(model, self.quantization, dtype)


def plain_base(model: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    """The base model in stock layers: as published, or what its quantized weights stand for."""
    if model.quantization == "none":
        trust = model.trust_remote_code
        return AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, trust_remote_code=trust)
    computed = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    return dequantize(Pretrained.of(model).load(computed)).to(dtype)  # type: ignore[return-value]


def can_pack(model: PreTrainedModel) -> bool:
    """Whether all layers are attention that can keep the documents of a row apart (no state, no chunks).

    Such layers can also share prompts: a token's keys and values depend on nothing but the tokens before it, so they
    serve both responses. A state-space, linear attention or convolution layer would have to fork its state.
    """
    values = model.config.get_text_config().to_dict()
    layers = {layer for key in _LAYER_KEYS for layer in values.get(key) or []}
    return layers <= _STATELESS_LAYERS and model._supports_attention_backend


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def add_lora(model: PreTrainedModel, lora: LoraSection, seed: int) -> PeftModel:
    """The model with fp32 LoRA adapters that start as the identity; everything else is frozen.

    The adapters' random half is drawn from `seed`, so that all ranks and engines start alike.

    Raises:
        ConfigError: the targets match no module.
    """
    targets = list(lora.target_modules)
    torch.manual_seed(seed)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={' '.join(targets)}: {_first_line(error)}") from error
    assert isinstance(adapted, PeftModel)
    return adapted


class Policy(nn.Module):
    """A causal language model that scores batches: forward(batch) -> summed log-probs per sequence.

    Attributes:
        model: the transformers model or the PeftModel around it; the one thing that is exported.
        layout: the layout its attention is set up for.
        offload: moves activations to the CPU between forward and backward; None: they stay.
        routers: of a mixture of experts whose load is to be balanced; else None.
        balance_B: (B,) load-balancing loss of the last batch that was trained on; None without `routers`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, transform: LogitTransform, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = layout
        self.offload: Offload | None = None
        self.routers: Routers | None = None
        self.balance_B: Tensor | None = None
        self.stock_attention = self.causal_lm.config._attn_implementation or "eager"
        ScoringHead.adopt(self.head, transform)
        self.use_layout(layout)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[return-value]

    @property
    def backbone(self) -> nn.Module:
        """Token ids to hidden states. (Llama 4 has it as `model`, but names itself as its base model.)"""
        base = self.causal_lm.base_model
        return base if base is not self.causal_lm else self.causal_lm.get_submodule("model")

    @property
    def head(self) -> nn.Module:
        """The output head."""
        head = self.causal_lm.get_output_embeddings()
        assert head is not None
        return head

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers: what engines shard, and what is compiled and recomputed, as one unit."""
        names = set(self.causal_lm._no_split_modules or ())
        return [module for module in self.modules() if {base.__name__ for base in type(module).__mro__} & names]

    @property
    def is_lora(self) -> bool:
        """Whether only adapters are trained."""
        return isinstance(self.model, PeftModel)

    def use_layout(self, layout: Layout) -> None:
        """Set up attention for a layout: ours for shared and packed rows, the model's own for padded ones."""
        self.layout = layout
        if layout != "padded":
            attention.register()
        self.causal_lm.set_attn_implementation(self.stock_attention if layout == "padded" else attention.DOCUMENTS)

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """The model's own attention, for what is not a batch of a layout of ours."""
        self.causal_lm.set_attn_implementation(self.stock_attention)
        with torch.compiler.set_stance("force_eager"):
            yield
        self.use_layout(self.layout)

    def adapter_off(self) -> Any:
        """A context in which the adapters do nothing: the model before training."""
        assert isinstance(self.model, PeftModel)
        return self.model.disable_adapter()

    def forward(
        self,
        batch: PairBatch,
        statistic: HeadStatistic | None = None,
        own_logits: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Score the responses of a batch.

        Args:
            batch: in this policy's layout.
            statistic: a head statistic to sum over each response as well.
            own_logits: take the model's own logits of each sequence by itself instead (the start-up check).
            observe: is shown what the scored positions predict.

        Returns:
            logps_S: (S,) summed log-probs of the responses, fp32. statistic_S: (S,) or None.
        """
        if own_logits:
            with self.own_attention():
                return self._score_by_own_logits(batch), None
        hidden_RTH = self._hidden(batch)
        scored_NH = hidden_RTH.flatten(0, 1)[batch.score_positions_N]
        token_logps_N, statistic_N = self.head(scored_NH, labels_N=batch.labels_N, statistic=statistic, observe=observe)
        num_sequences = 2 * batch.num_pairs
        if batch.tail_weight != 1:
            token_logps_N = token_logps_N * tail_weights(
                batch.response_lengths_S, batch.sequence_of_N, batch.tail_weight
            ).to(token_logps_N.dtype)
        logps_S = sum_by_sequence(token_logps_N, batch.sequence_of_N, num_sequences)
        if statistic_N is None:
            return logps_S, None
        return logps_S, sum_by_sequence(statistic_N, batch.sequence_of_N, num_sequences)

    def _hidden(self, batch: PairBatch) -> Tensor:
        """(R, T, H) final hidden states."""
        if batch.layout == "padded":
            inputs: dict[str, Any] = {"attention_mask": batch.attention_mask_RT}
        else:
            documents = attention.Documents.of(batch.documents, batch.input_ids_RT.device)
            inputs = {"position_ids": batch.position_ids_RT, "documents": documents}
        with nullcontext() if self.offload is None else self.offload.active(batch.input_ids_RT.device):
            if self.routers is not None and wants_logits(self):
                inputs["output_router_logits"] = True
            outputs = self.backbone(input_ids=batch.input_ids_RT, use_cache=False, **inputs)
        if "output_router_logits" in inputs and self.routers is not None:
            self.balance_B = self.routers.balance(outputs.router_logits, batch)
        return outputs.last_hidden_state

    def _score_by_own_logits(self, batch: PairBatch) -> Tensor:
        """(S,) log-probs from the model's own logits, one unpadded sequence at a time."""
        flat_ids = batch.input_ids_RT.flatten()
        logps = []
        places = sequence_places(batch.layout, batch.sequence_lengths, batch.prompt_lengths)
        for sequence, places_T in enumerate(place.to(flat_ids.device) for place in places):
            mine_N = batch.sequence_of_N == sequence
            logits_TV = self.model(input_ids=flat_ids[None, places_T], use_cache=False).logits[0]
            log_softmax_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)
            positions = torch.searchsorted(places_T, batch.score_positions_N[mine_N])
            logps.append(log_softmax_TV[positions, batch.labels_N[mine_N]].sum())
        return torch.stack(logps)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of parameters at their full shapes; a weight that embedding and head share counts once.

    Attributes:
        all, trained: of the whole model.
        body, body_trained: of what lies between embedding and head.
        head, head_trained: of the output head.
    """

    all: int
    trained: int
    body: int
    body_trained: int
    head: int
    head_trained: int

    @staticmethod
    def of(policy: Policy) -> Sizes:
        """Count a policy's parameters."""
        ends = {id(policy.causal_lm.get_input_embeddings().weight), id(policy.head.weight)}
        body = [parameter for parameter in policy.parameters() if id(parameter) not in ends]
        head = list(policy.head.parameters())
        groups = (list(policy.parameters()), body, head)
        packed = num_weights(policy)
        counts = [(_count(group, packed), _count((p for p in group if p.requires_grad), packed)) for group in groups]
        return Sizes(*(number for pair in counts for number in pair))


def _count(parameters: Iterable[nn.Parameter], packed: Mapping[int, int]) -> int:
    return sum(packed.get(id(parameter), full_shape(parameter).numel()) for parameter in parameters)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter before any sharding (ZeRO-3 leaves an empty tensor that knows its `ds_shape`)."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape  # type: ignore[return-value]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without grad, dropout and checkpointing; then back to what it was."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        yield
    module.train(was_training)


def trained_policy(
    source: Pretrained,
    config: Config,
    layout: Layout,
    dtype: torch.dtype,
    *,
    empty: bool = False,
    keep_dtype: bool = False,
    device: torch.device | None = None,
) -> Policy:
    """The policy before training.

    Weights are read in the dtype of compute by every engine, so that all start alike and as the reference does; what is
    trained is then kept in fp32: the whole model, or LoRA adapters where `lora.r` > 0.

    Args:
        empty: all of it on the meta device, to be sharded before it is filled.
        keep_dtype: leave the whole model in `dtype` (an engine that makes its own fp32 weights).
        device: see `Pretrained.load`.
    """
    model: PreTrainedModel | PeftModel = source.empty(dtype) if empty else source.load(dtype, device)
    if config.lora.r:
        with torch.device("meta") if empty else nullcontext():
            model = add_lora(model, config.lora, config.train.seed)
    elif not keep_dtype:
        model = model.float()
    policy = Policy(model, source.logit_transform, layout).train()
    train = config.train
    if isinstance(model, PeftModel) and not train.compile and train.recompute == "full":
        fuse(model)  # the compiler does it by itself; selective recomputing has to see each product
    if (train.compile or train.gradient_checkpointing or train.activation_offload) and not policy.layers:
        options = "train.compile, train.gradient_checkpointing and train.activation_offload"
        raise ConfigError(f"{options} need a model that names its layers (_no_split_modules): drop them")
    if train.compile:
        compile_layers(policy.layers)
    if train.gradient_checkpointing:
        recompute_layers(policy.layers, train.recompute, with_dropout=config.lora.dropout > 0)
    if config.loss.router_aux_loss_coef:
        policy.routers = Routers.of(policy.causal_lm)
    if train.activation_offload:
        policy.offload = Offload(policy, policy.layers)
    return policy


def frozen_policy(
    source: Pretrained, layout: Layout, dtype: torch.dtype, *, empty: bool = False, compiled: bool = False
) -> Policy:
    """A model that only scores: every weight frozen and in `dtype`."""
    model = source.empty(dtype) if empty else source.load(dtype)
    policy = Policy(model, source.logit_transform, layout).requires_grad_(False).eval()
    if compiled:
        compile_layers(policy.layers)
    return policy
