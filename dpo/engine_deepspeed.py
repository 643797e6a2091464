"""DeepSpeed ZeRO-1, -2 and -3. The JSON holds ZeRO knobs; batch size, precision and clipping come from the config."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data_utils.schema import PairBatch
from dpo.ds_json import complete_ds_json
from dpo.engine import Build, Scorer, StepResult, make_scorer, share_buffers
from dpo.logps import HeadStatistic, Observer
from dpo.moving import MovingCopy, Part
from dpo.nvme import largest_share, with_buffers
from dpo.optimizers import fresh_moments, make_optimizer, restore_step
from dpo.policy import Policy, frozen_policy, full_shape, trained_policy
from dpo.pretrained import Pretrained
from dpo.slices import Slice, SliceReader


def _join(build: Build) -> None:
    """Let DeepSpeed use the process group that is there."""
    # On CPU DeepSpeed would compile a shared-memory all-reduce (half a minute, needs a compiler, and a killed build
    # leaves a lock that blocks every later run); gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(build.world.local_rank))
    deepspeed.init_distributed(dist_init_required=False)


def _with_buffers(build: Build) -> dict[str, Any]:
    """The DeepSpeed JSON; where weights lie on a disk, with buffers that hold this model's.

    Raises:
        ConfigError: buffers that the file asks for do not fit model or machine.
    """
    assert build.ds_json is not None
    zero, world = build.ds_json["zero_optimization"], build.world
    if (zero.get("offload_param") or {}).get("device") != "nvme":
        return build.ds_json
    policy = trained_policy(build.source, build.config, build.layout, build.dtype, empty=True)
    share = largest_share(max(parameter.numel() for parameter in policy.parameters()), world.size)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    zero = with_buffers(zero, share, dtype_bytes=build.dtype.itemsize, ranks_here=ranks_here)
    return build.ds_json | {"zero_optimization": zero}


class DeepSpeedEngine:
    """The policy under a DeepSpeed engine; see `dpo.engine.Engine` for the verbs."""

    def __init__(self, build: Build) -> None:
        assert build.ds_json is not None
        _join(build)
        self.world, self.dtype, self.compiles = build.world, build.dtype, build.config.train.compile
        self.settings = complete_ds_json(
            _with_buffers(build),
            dtype="bfloat16" if build.dtype == torch.bfloat16 else "float32",
            world_size=build.world.size,
            max_grad_norm=build.config.optim.max_grad_norm,
        )
        self.stage: int = self.settings["zero_optimization"]["stage"]
        self.max_grad_norm = build.config.optim.max_grad_norm
        policy = self._held(
            build.source,
            self.settings,
            lambda empty: trained_policy(
                build.source, build.config, build.layout, build.dtype, empty=empty, keep_dtype=True
            ),
        )
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=make_optimizer(self.trained, build.config.optim), config=self.settings
        )
        self.policy: Policy = policy
        self.zero: Any = self.engine.optimizer
        self.moving: MovingCopy | None = None
        for partition in self._partitions():
            self.zero.optimizer.state[partition] = fresh_moments(partition)
            if build.config.optim.name == "cpu_adamw":  # counts in Python
                self._moments(partition)["step"] = 0

    def forward(
        self,
        batch: PairBatch,
        statistic: HeadStatistic | None = None,
        own_logits: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Engine`."""
        return self.engine(batch, statistic, own_logits, observe)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`. DeepSpeed averages over ranks, so the loss is scaled back."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size)
        if not last:
            self.engine.step()

    def step(self, learning_rate: float) -> StepResult:
        """See `Engine`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)
        skipped = torch.tensor(float(not self.engine.was_step_applied()), device=self.world.device)
        return StepResult(norm, skipped)

    def frozen_scorer(self, source: Pretrained, offload: bool, moves: bool = False) -> Scorer:
        """See `Engine`. Stages 1 and 2 replicate the policy's weights, so the copy is replicated as well."""
        # Plain stage 3, whatever the policy has: a second model with hpZ makes DeepSpeed fail.
        zero = {"stage": 3} | ({"offload_param": {"device": "cpu"}} if offload else {})
        settings, layout = self.settings | {"zero_optimization": zero}, self.policy.layout
        model: Any = self._held(
            source,
            settings,
            lambda empty: frozen_policy(source, layout, self.dtype, empty=empty, compiled=self.compiles),
        )
        if self.stage == 3:
            model, *_ = deepspeed.initialize(model=model, config=settings)
        else:
            model.to("cpu" if offload else self.world.device)
        if moves:
            opened = self._opened_partitions if self.stage == 3 else self._opened_replica
            self.moving = MovingCopy(self._slices(), lambda: opened(model))
        return make_scorer(model, self.world.device if offload and self.stage != 3 else None)

    @contextlib.contextmanager
    def _opened_partitions(self, frozen: Any) -> Iterator[Part]:
        """See `MovingCopy`: both models are partitioned alike."""
        held = frozen.optimizer
        held.partition_all_parameters()  # drop weights that are gathered: they are going to be older
        parameters = dict(frozen.module.named_parameters())
        yield lambda piece: parameters[piece.name].ds_tensor.narrow(0, 0, piece.tensors["weight"].numel())
        if held.persistent_parameters:
            held.persistent_parameters[0].all_gather(held.persistent_parameters)

    @contextlib.contextmanager
    def _opened_replica(self, frozen: Policy) -> Iterator[Part]:
        """See `MovingCopy`: a rank writes the elements whose fp32 weights it has, and gets the others'."""
        parameters = dict(frozen.named_parameters())
        places: dict[str, slice] = {}

        def part(piece: Slice) -> Tensor:
            places[piece.name] = slice(piece.start, piece.start + piece.tensors["weight"].numel())
            return parameters[piece.name].detach().view(-1)[places[piece.name]]

        yield part
        for name in self.trained:
            flat, mine = parameters[name].detach().view(-1), places.get(name, slice(0, 0))
            whole = torch.zeros(flat.shape, device=self.world.device)
            whole[mine] = flat[mine].to(whole)
            flat.copy_(self.world.sum_on_device(whole))

    def move_reference(self, share: float) -> None:
        """See `Engine`."""
        assert self.moving is not None
        self.moving.move(self._slices(), share)

    @property
    def is_writer(self) -> bool:
        """See `Engine`."""
        return True

    @property
    def num_updates(self) -> Tensor:
        """See `Engine`."""
        return torch.as_tensor(self._moments(self._partitions()[0])["step"], dtype=torch.float32)

    def load(self, reader: SliceReader) -> None:
        """See `Engine`."""
        reader.require({name: full_shape(parameter) for name, parameter in self.trained.items()})
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()  # drop weights that are gathered: they are older
        for piece in self.slices():
            reader.read(piece)
        for partition in self._partitions():
            restore_step(self.zero.optimizer, partition, reader.step)
        self._refresh()
        if self.moving is not None:
            self.moving.refresh(self._slices())

    def _partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that AdamW updates on this rank; each holds slices of many parameters, and padding."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.zero.param_groups]

    def _moments(self, partition: Tensor) -> dict[str, Any]:
        return self.zero.optimizer.state[partition]

    def slices(self) -> Iterator[Slice]:
        """See `Engine`: the slice of each trained parameter that this rank updates, where it has one."""
        return self._slices() if self.moving is None else self.moving.beside(self._slices())

    def _slices(self) -> Iterator[Slice]:
        for name, parameter in self.trained.items():
            place = self._place(parameter)
            if place is None:
                continue
            number, offset, start, num_elements = place
            partition = self._partitions()[number]
            moments = self._moments(partition)
            flat = {"weight": partition.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            tensors = {key: tensor.narrow(0, offset, num_elements) for key, tensor in flat.items()}
            yield Slice(name, tuple(full_shape(parameter)), start, tensors)

    def _place(self, parameter: Any) -> tuple[int, int, int, int] | None:
        """Where this rank has its slice of a parameter: number of the partition, offset in it, the slice's first
        element in the flattened parameter, and how many elements."""
        if self.stage == 3:  # each rank has an equal share of each parameter, padded at the end
            number, offset, share = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.world.rank * share
            num_elements = min(share, parameter.ds_numel - start)
            return (number, offset, start, num_elements) if num_elements > 0 else None
        mapping = parameter._hp_mapping  # parameters end to end, cut into equal partitions
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return mapping.param_group_index, there.start, here.start, here.numel

    def _refresh(self) -> None:
        """Give the model the fp32 weights, as after a step."""
        if self.stage != 3:
            self.zero.update_lp_params()
            return
        for number in range(len(self._partitions())):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        self.zero.checkpoint_event_epilogue()

    def export_weights(self) -> dict[str, Tensor]:
        """See `Engine`. A parameter is gathered at a time; adapters come from the fp32 weights of the optimizer."""
        parameters = dict(self.policy.model.named_parameters(remove_duplicate=False))
        if self.policy.is_lora:
            trained = {name: p for name, p in parameters.items() if p.requires_grad}
            full = {name: safe_get_full_fp32_param(p) for name, p in trained.items()}
            return {name: t.detach().cpu() for name, t in full.items() if t is not None} if self.world.is_main else {}
        weights = {}
        if self.stage == 3:
            self._release_buffers()
        for name, parameter in parameters.items():
            with self._gathered([parameter]):
                if self.world.is_main:
                    weights[name] = parameter.detach().cpu().clone()
        buffers = dict(self.policy.model.named_buffers())
        persistent = self.policy.model.state_dict().keys() & buffers.keys()
        return weights | {name: buffers[name].detach().cpu() for name in persistent} if self.world.is_main else {}

    def _release_buffers(self) -> None:
        """Drop what DeepSpeed has gathered, or read ahead from a disk, for a forward that does not come: it holds the
        buffers through which others pass."""
        parameters: list[Any] = list(self.policy.parameters())
        swapper = parameters[0].nvme_swapper
        if swapper is not None:
            self.zero.checkpoint_event_prologue()
            swapper.synchronize_reads()
            swapper.remove_partition_and_release_buffers([p for p in parameters if p.ds_id in swapper.available_params])

    def _held(self, source: Pretrained, settings: dict[str, Any], load: Callable[[bool], Policy]) -> Policy:
        """The policy that `load` makes (on the meta device, where it is given True); partitioned under stage 3.

        Quantized weights cannot be loaded into partitions. So rank 0 loads them, and gives each to the others, which
        keep their share before the next one comes.
        """
        if self.stage != 3 or source.quantization is None:
            with self._partitioned_load(settings):
                return load(False)
        policy = load(not self.world.is_main)
        if not self.world.is_main:
            policy.to_empty(device="cpu")  # pages that nobody writes to take no memory
            policy.causal_lm.tie_weights()  # to_empty has made two of one
        share_buffers(policy, policy if self.world.is_main else None, self.world.device)
        deepspeed.zero.Init(module=policy, config_dict_or_path=settings)
        return policy

    @contextlib.contextmanager
    def _partitioned_load(self, settings: dict[str, Any]) -> Iterator[None]:
        """Under stage 3 transformers loads each weight straight into its partition (zero.Init), on all ranks."""
        active = HfDeepSpeedConfig(settings) if self.stage == 3 else None
        yield
        if active is not None:
            unset_hf_deepspeed_config()

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        return deepspeed.zero.GatheredParameters(parameters) if self.stage == 3 else contextlib.nullcontext()
