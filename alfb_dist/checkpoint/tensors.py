"""The global tensors of a model: their keys in a save, the ranks that hold them, and the one that writes each.

A key is `<kind>/<parameter>` for dense parameters and `<kind>/<parameter>/<global expert>` for experts. The
parameter's name is the one in transformers' state dict; the kind is `weight` or a per-element state of the optimizer,
such as `exp_avg`. `bias/<buffer>` (float32) and `load/<buffer>` (int64) hold each gate's selection bias and last load,
`buffer/<buffer>` the other buffers of the state dict.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from alfb_dist.engine.balancer import Balancer
from alfb_dist.moe.sharded_experts import sharded_experts


@dataclass(frozen=True)
class GlobalTensor:
    """A dense parameter, or one expert's part of an expert parameter."""

    parameter: str
    expert: int | None
    shape: tuple[int, ...]
    position: int | None
    """The expert-parallel position of the ranks that hold it; None if all ranks do."""
    start: int
    """Its first element in the flattened parameter of those ranks."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def key(self, kind: str) -> str:
        """Return its key in a save, for a kind of tensor."""
        return f"{kind}/{self.parameter}" if self.expert is None else f"{kind}/{self.parameter}/{self.expert}"


def num_experts(model: nn.Module) -> dict[str, int]:
    """Return the number of global experts by experts module, in the model's order."""
    return {name: int(experts.num_experts) for name, experts in sharded_experts(model)}


def ep_degree(model: nn.Module) -> int:
    """Return the number of ranks over which the model's experts are sharded."""
    return next((experts.ep_size for _, experts in sharded_experts(model)), 1)


def global_tensors(model: nn.Module) -> list[GlobalTensor]:
    """Return every dense parameter and every expert of the model, in its order; the same list on every rank."""
    layers = dict(sharded_experts(model))
    found = []
    for name, parameter in model.named_parameters():
        experts = layers.get(name.rpartition(".")[0])
        if experts is None:
            found.append(GlobalTensor(name, None, tuple(parameter.shape), None, 0))
            continue
        shape, size = tuple(parameter.shape[1:]), parameter[0].numel()
        for expert in range(int(experts.num_experts)):
            position, local = divmod(expert, int(experts.num_local_experts))
            found.append(GlobalTensor(name, expert, shape, position, local * size))
    return found


def writers(tensors: Sequence[GlobalTensor], ep_degree: int, world_size: int) -> list[int]:
    """Return the rank that writes each tensor, one of those that hold it; the same list on every rank.

    Experts are dealt round the ranks of their expert-parallel position; dense tensors, the largest first, go to the
    rank with the fewest elements.
    """
    chosen, load, turn = [0] * len(tensors), [0] * world_size, [0] * ep_degree
    dense = []
    for i, tensor in enumerate(tensors):
        if tensor.position is None:
            dense.append(i)
            continue
        replica = turn[tensor.position] % (world_size // ep_degree)
        turn[tensor.position] += 1
        chosen[i] = tensor.position + ep_degree * replica
        load[chosen[i]] += tensor.numel
    ranks = [(size, rank) for rank, size in enumerate(load)]
    heapq.heapify(ranks)
    for i in sorted(dense, key=lambda i: -tensors[i].numel):
        size, chosen[i] = ranks[0]
        heapq.heapreplace(ranks, (size + tensors[i].numel, chosen[i]))
    return chosen


def gate_names(model: nn.Module, balancer: Balancer) -> list[str]:
    """Return the name of the selection bias of each of the balancer's gates, in its order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [f"{names[id(gate.bias_holder)]}.{gate.bias_name}" for gate in balancer.gates]


def buffers(model: nn.Module, balancer: Balancer) -> dict[str, Tensor]:
    """Return the buffers of the model's state dict, by key, without selection biases; they are equal on all ranks."""
    kept, biases = set(model.state_dict()), set(gate_names(model, balancer))
    return {f"buffer/{n}": b for n, b in model.named_buffers() if n in kept and n not in biases}


def balance_tensors(model: nn.Module, balancer: Balancer) -> dict[str, Tensor]:
    """Return copies of the selection bias, float32 (E,), and the last load, int64 (E,), of each gate, by key."""
    names = gate_names(model, balancer)
    bias = {f"bias/{name}": bias_E for name, bias_E in zip(names, balancer.bias_LE)}
    return bias | {f"load/{name}": load_E for name, load_E in zip(names, balancer.load_LE.clone())}
