"""The experts that replace a model's: sharded over ranks, called by the family's own block as before."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.distributed.topology import Grid, grid_ranks
from alfb_dist.moe.chunked import in_chunks
from alfb_dist.moe.dispatch import Sent, combine, receive, send
from alfb_dist.moe.experts import expert_mlp
from alfb_dist.moe.families.experts import activation, count_experts, expert_rows, family_mlp, is_swiglu, part_of
from alfb_dist.moe.frozen_experts import allow_frozen_experts
from alfb_dist.moe.sharding import Sharding
from alfb_dist.moe.shared_overlap import OverlappedSharedExperts
from alfb_dist.profiling import span


class ShardedExperts(AutoEPMoELayer):
    """This rank's shard of a block's experts, behind transformers' experts interface.

    DeepSpeed's engine treats parameters as experts' (averaged over the expert-data group only, each counted once in
    the clip norm) if they are in a layer class that it knows. Of AutoEPMoELayer only the name is used: neither its
    constructor nor its forward runs.
    """

    def __init__(self, experts: Any, grid: Grid | None, exchange: Exchange | None, sharding: Sharding) -> None:
        nn.Module.__init__(self)
        self.exchange, self.sharding = exchange, sharding
        self.shared: tuple[nn.Module, str] | None = None
        """The block, and the name of its shared experts, if they can run during the exchange."""
        self.num_experts: int = count_experts(experts)
        self.grid = grid
        self.ep_size = 1 if grid is None else grid.ep_degree
        self.ep_rank = 0 if grid is None else grid.ep_rank
        self.num_local_experts: int = self.num_experts // self.ep_size
        self.ep_group_name = f"ep_size_{self.ep_size}"
        swiglu = is_swiglu(experts)
        for name, child in experts.named_children():
            self.add_module(name, child)
        if swiglu:
            self.act_fn: Any = activation(experts)
        full = expert_rows(experts)
        self.unread_rows = {name: p.shape[0] - self.num_experts for name, p in full.items()}
        """Rows at the end of a family's parameter that belong to no expert with weights, and are not kept here."""
        for name, p in full.items():
            self.register_parameter(name, self._shard(p))
        part = None if swiglu else part_of(experts, self, self.num_local_experts)
        object.__setattr__(self, "part", part)  # not a submodule: it reads this module's parameters

    def _shard(self, full: nn.Parameter) -> nn.Parameter:
        first = self.ep_rank * self.num_local_experts
        local = full.detach()[first : first + self.num_local_experts]
        whole = local.shape == full.shape
        shard = nn.Parameter(local if whole else local.clone(), requires_grad=full.requires_grad)
        shard.allreduce = False  # type: ignore[attr-defined]
        shard.group_name = self.ep_group_name  # type: ignore[attr-defined]
        return shard

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of each token's experts, on whichever rank: (T, D); collective over the EP group.

        An id beyond the experts with weights is an identity expert (LongCat), applied on this rank. Without ids,
        hidden_states are (E T, D), the rows of one expert after the other, and so is the output.
        """
        if top_k_index is None or top_k_weights is None:
            return self._rows_by_expert(hidden_states)
        identity_TK = top_k_index >= self.num_experts if any(self.unread_rows.values()) else None
        if identity_TK is not None:
            top_k_index = top_k_index.masked_fill(identity_TK, self.num_experts)
        inputs = (hidden_states, top_k_index, top_k_weights)
        if self.sharding.max_rows:
            out_TD = in_chunks(self.sharding.max_rows, self._compute, *inputs, self.num_local_experts, self.exchange)
        else:
            out_TD = self._compute(*inputs)
        if identity_TK is not None:
            out_TD = out_TD + hidden_states * (top_k_weights * identity_TK).sum(-1, keepdim=True).to(out_TD.dtype)
        return out_TD

    def _compute(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        with span("dispatch"):
            sent = send(x_TD, expert_ids_TK, weights_TK, self.num_local_experts, self.exchange)
        try:
            self._run_shared(x_TD, sent)
        finally:
            with span("dispatch"):
                rows_RD, ids_RK, weights_RK = receive(sent)
        with span("experts"):
            if self.part is None:
                num_slots = None if sent.slot_counts is None else sum(sent.slot_counts)
                weights = (self.gate_up_proj, self.down_proj)
                out_RD = expert_mlp(rows_RD, ids_RK, weights_RK, *weights, self.act_fn, num_places=num_slots)
            else:
                out_RD = family_mlp(self.part, rows_RD, ids_RK, weights_RK)
        with span("combine"):
            return combine(out_RD, sent.route)

    def _run_shared(self, x_TD: Tensor, sent: Sent) -> None:
        """Run the block's shared experts if rows are being exchanged."""
        if sent.route is not None and self.shared is not None:
            block, name = self.shared
            shared = getattr(block, name)
            if isinstance(shared, OverlappedSharedExperts):
                with span("shared"):
                    shared.run_early(x_TD)

    def _rows_by_expert(self, rows_ED: Tensor) -> Tensor:
        """Return each expert's output for its own rows. A row of zeros means that the expert was not chosen (Llama 4);
        it is not sent, since its output is zeros."""
        chosen_S = rows_ED.detach().any(-1).nonzero().flatten()
        ids_S1 = (chosen_S // (rows_ED.shape[0] // self.num_experts))[:, None]
        out_SD = self(rows_ED.index_select(0, chosen_S), ids_S1, torch.ones_like(ids_S1, dtype=torch.float32))
        return torch.zeros_like(rows_ED).index_copy(0, chosen_S, out_SD)

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Register our process groups with DeepSpeed, which calls this before it makes the optimizer. Its own groups
        would have a timeout of 30 minutes."""
        allow_frozen_experts()
        if use_data_before_expert_parallel_ or folding_group_handles is not None:
            raise ValueError("alfb_dist places ranks expert-parallel first and supports no tensor-parallel folding")
        if self.grid is None:
            raise RuntimeError("initialise torch.distributed before parallelize: DeepSpeed needs the groups made there")
        name, rank, world = self.ep_group_name, self.grid.world_group.rank(), self.grid.world_group.size()
        ep, data = grid_ranks(world, self.ep_size)
        if name not in groups._EXPERT_PARALLEL_GROUP:
            groups._EXPERT_PARALLEL_GROUP[name] = self.grid.ep_group
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = ep[rank // self.ep_size]
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = self.grid.expert_data_group
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = data[rank % self.ep_size]

    def extra_repr(self) -> str:
        """Return which experts are on this rank."""
        first = self.ep_rank * self.num_local_experts
        return f"experts {first} to {first + self.num_local_experts - 1} of {self.num_experts}"


def sharded_experts(model: nn.Module) -> list[tuple[str, ShardedExperts]]:
    """Return the sharded experts of a model with their names, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, ShardedExperts)]
