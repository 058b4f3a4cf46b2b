"""Compiled and shared-memory forms, for CPUs, of what plain torch and the network do elsewhere.

Callers write `from alfb_dist import cpu`, call its functions and use the plain form where these return None: on other
devices and types, without a compiler, or with ALFB_NATIVE=0. Without this directory all functions return None.
"""

from __future__ import annotations

from alfb_dist.cpu.allocator import empty, peak_growth
from alfb_dist.cpu.attention import causal_attention, has_attention
from alfb_dist.cpu.build import find_compiler
from alfb_dist.cpu.experts import expert_mlp, has_kernels
from alfb_dist.cpu.gate import gate_logits
from alfb_dist.cpu.mailbox import Mailbox, board
from alfb_dist.cpu.permute import plan_rows, sum_rows
from alfb_dist.cpu.shared_experts import shared_mlp
from alfb_dist.cpu.shared_memory import Outbox, Outboxes, Peer, has_shared_memory, network_namespace

__all__ = [
    "Mailbox",
    "Outbox",
    "Outboxes",
    "Peer",
    "board",
    "causal_attention",
    "empty",
    "expert_mlp",
    "find_compiler",
    "gate_logits",
    "has_attention",
    "has_kernels",
    "has_shared_memory",
    "network_namespace",
    "peak_growth",
    "plan_rows",
    "shared_mlp",
    "sum_rows",
]
