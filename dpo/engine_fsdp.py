"""FSDP2: parameters, gradients and optimizer state sharded by `fully_shard`; replicated, hybrid or full."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dpo.engine import Build, Scorer, TorchEngine, make_scorer, share_buffers
from dpo.moving import MovingCopy, Part
from dpo.policy import Policy, frozen_policy, trained_policy
from dpo.pretrained import Pretrained
from dpo.slices import SliceReader
from dpo.world import World


def make_mesh(world: World, shard_size: int) -> DeviceMesh:
    """(world / shard_size) replicas of the weights, each sharded over `shard_size` ranks."""
    if shard_size == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // shard_size, shard_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(policy: Policy, mesh: DeviceMesh, dtype: torch.dtype, offload: OffloadPolicy) -> None:
    """`fully_shard` each decoder layer and the policy around them, in place.

    Embeddings, final norm and head stay in the root's group: tied embeddings are one parameter.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    settings = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for layer in policy.layers:
        fully_shard(layer, **settings)
    fully_shard(policy, **settings)


def fill(empty: Policy, full: Policy | None, device: torch.device, *, offload: bool = False) -> None:
    """Give a sharded policy on the meta device its weights from rank 0's full one: a tensor at a time, so that no
    other rank ever holds more than its shards.

    Args:
        device: where to compute, and so where buffers are; weights as well, unless `offload` keeps them on the CPU.
    """
    empty.to_empty(device="cpu" if offload else device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(empty, full.state_dict() if full is not None else {}, options=options)
    share_buffers(empty, full, device)


class FSDP2Engine(TorchEngine):
    """Sharded over `parallel.shard_size` ranks, replicated over the rest."""

    def __init__(self, build: Build) -> None:
        self.world, self.dtype, self.compiles = build.world, build.dtype, build.config.train.compile
        self.mesh = make_mesh(build.world, build.plan.shard_size)
        arguments = (build.source, build.config, build.layout, build.dtype)
        full = trained_policy(*arguments) if build.world.is_main else None
        policy = trained_policy(*arguments, empty=True)
        shard(policy, self.mesh, build.dtype, self._offload(build.config.parallel.offload))
        fill(policy, full, build.world.device, offload=build.config.parallel.offload)
        trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        super().__init__(policy, trainable, build.config.optim, build.world.device)

    def _offload(self, offload: bool) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if offload else OffloadPolicy()

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`. Reduce-scatter averages over ranks, so the loss is scaled back; replicas are only summed at
        the boundary."""
        assert isinstance(self.policy, FSDPModule)
        self.policy.set_requires_all_reduce(last)
        (loss * self.world.size).backward()

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        norm = super()._global_norm(gradients)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()

    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def frozen_scorer(self, source: Pretrained, offload: bool, moves: bool = False) -> Scorer:
        """See `Engine`."""
        arguments = (source, self.policy.layout, self.dtype)
        full = frozen_policy(*arguments) if self.world.is_main else None
        model = frozen_policy(*arguments, empty=True, compiled=self.compiles)
        shard(model, self.mesh, self.dtype, self._offload(offload))
        fill(model, full, self.world.device, offload=offload)

        @contextmanager
        def opened() -> Iterator[Part]:
            assert isinstance(model, FSDPModule)
            model.reshard()  # the root keeps its gathered weights after a forward without backward
            parameters = dict(model.named_parameters())
            yield lambda piece: self._local(parameters[piece.name]).detach().view(-1)

        if moves:
            self.moving = MovingCopy(self._weights(), opened)
        return make_scorer(model)

    @property
    def is_writer(self) -> bool:
        """See `Engine`: the first replica."""
        names = self.mesh.mesh_dim_names
        return names is None or "replicate" not in names or self.mesh.get_local_rank("replicate") == 0

    def _first_element(self, parameter: Tensor) -> int:
        assert isinstance(parameter, DTensor)
        _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        assert not any(offsets[1:]), "shards are rows"
        return offsets[0] * math.prod(parameter.shape[1:]) if offsets else 0

    def load(self, reader: SliceReader) -> None:
        """See `Engine`."""
        super().load(reader)
        # The root keeps its gathered weights after a forward without backward; they are older than what was loaded.
        assert isinstance(self.policy, FSDPModule)
        self.policy.reshard()

    def export_weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.policy.is_lora)
        weights: dict[str, Any] = get_model_state_dict(self.policy, options=options)
        # Tied weights of a frozen model come along all the same.
        wanted = self.parameters.keys() if self.policy.is_lora else weights.keys()
        return {name.removeprefix("model."): weights[name] for name in weights if name in wanted}
