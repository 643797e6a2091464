"""The model that is trained: LoRA, and one module whose forward returns log-probs.

`Policy` wraps a causal language model so that every engine sees a single root module: hidden states, scored positions
and the head all lie inside its forward, where the hooks of FSDP2 and ZeRO-3 gather weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_utils.batching import sequence_places
from data_utils.schema import Layout, PairBatch
from dpo import attention
from dpo.adapters import fuse
from dpo.config import Config, ConfigError, LoraSection
from dpo.layers import compile_layers, recompute_layers
from dpo.logps import HeadStatistic, LogitTransform, Observer, ScoringHead, sum_by_sequence, tail_weights
from dpo.offload import Offload
from dpo.pretrained import Pretrained, first_line
from dpo.quantize import num_weights
from dpo.routers import Routers, wants_logits


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
        raise ConfigError(f"lora.target_modules={' '.join(targets)}: {first_line(error)}") from error
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
