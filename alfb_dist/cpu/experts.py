"""The experts' compute on a CPU in float32, compiled (csrc/experts.c)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alfb_dist.cpu import allocator as arena
from alfb_dist.cpu.build import load

PIECE_ROWS = 512
"""Rows of one expert that are worked on at once: enough to make a weight worth packing, few enough for the cache."""


PAD = 16
"""As in csrc/experts.c."""


@functools.cache
def torch_blas() -> int | None:
    """The address of the float32 product in torch's own BLAS, or None if it does not show one."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


_ARGUMENTS = {
    "sort_slots": (2, 3),
    "forward": (6, 9),
    "backward": (6, 13),
    "shared_forward": (4, 7),
    "shared_backward": (4, 10),
    "linear_backward": (3, 5),
}
"""What the kernels take: so many numbers, then so many pointers."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    lib = load(Path(__file__).parent / "csrc" / "experts.c")
    for name, (numbers, pointers) in _ARGUMENTS.items() if lib else ():
        getattr(lib, name).argtypes = [ctypes.c_int64] * numbers + [ctypes.c_void_p] * pointers
        getattr(lib, name).restype = ctypes.c_int64 if name == "sort_slots" else None
    return lib


SILU = ("SiLU", "SiLUActivation")
"""Names of the classes of the activation that the kernels know."""


def readable(*tensors: Tensor) -> bool:
    """Whether there are kernels, and these are float32 in this machine's memory: of no class that keeps them elsewhere
    or only traces them."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 for t in tensors)
    return plain and library() is not None


def traced() -> bool:
    """Whether torch records or transforms what runs, which it cannot do with a kernel, or casts on the way."""
    transformed = torch._C._are_functorch_transforms_active()
    return transformed or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


def supported(x_RD: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, act: Any) -> bool:
    """Whether `NativeMLP` can take these: float32 on a CPU, SiLU, fewer than 2^31 slots, kernels at hand."""
    return (
        readable(x_RD, weights_RK, gate_up_e2FD, down_eDF) and type(act).__name__ in SILU and weights_RK.numel() < 2**31
    )


def call(name: str, *arguments: Tensor | int | None) -> Any:
    """What a kernel returns: tensors go as the address of their data."""
    passed = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return getattr(library(), name)(*passed)


class NativeMLP(torch.autograd.Function):
    """`expert_mlp` on rows; keeps the first product for the backward, (S, 2F)."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, expert_ids_RK: Tensor
    ) -> Tensor:
        x_RD, weights_RK, ids_RK = x_RD.contiguous(), weights_RK.contiguous(), expert_ids_RK.contiguous()
        gate_up_e2FD, down_eDF = gate_up_e2FD.contiguous(), down_eDF.contiguous()
        num_experts, width_D, width_F = down_eDF.shape
        sizes = torch.empty(num_experts + 1, dtype=torch.int64)
        slots = torch.empty(ids_RK.numel(), dtype=torch.int32)
        num_rows = call("sort_slots", ids_RK.numel(), num_experts, ids_RK, sizes, slots)
        if num_rows < 0:
            raise IndexError(f"expert ids must be in [0, {num_experts}], got {ids_RK.min()} to {ids_RK.max()}")
        piece = min(PIECE_ROWS, max(1, num_rows))
        kept_S2F = arena.empty((num_rows, 2 * width_F), x_RD)
        out_RD = arena.empty(x_RD.shape, x_RD)
        scratch = arena.empty((piece * (width_D + width_F + 2 * PAD + 2),), x_RD)
        shape = (len(x_RD), num_experts, ids_RK.shape[1], width_D, width_F, piece)
        tensors = (sizes, slots, weights_RK, x_RD, gate_up_e2FD, down_eDF, kept_S2F)
        call("forward", *shape, *tensors, out_RD, scratch)
        ctx.save_for_backward(*tensors)
        ctx.shape = shape
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors
        _, _, weights_RK, x_RD, gate_up_e2FD, down_eDF, _ = tensors
        *_, width_D, width_F, piece = ctx.shape
        needs = zip((x_RD, gate_up_e2FD, down_eDF), (ctx.needs_input_grad[i] for i in (0, 2, 3)))
        grad_x_RD, grad_gate_up_e2FD, grad_down_eDF = (arena.empty(t.shape, t) if need else None for t, need in needs)
        grad_weights_RK = torch.empty_like(weights_RK)
        scratch = arena.empty((piece * (width_D + 4 * width_F + 2 * PAD + 3),), x_RD)
        made = (grad_x_RD, grad_weights_RK, grad_gate_up_e2FD, grad_down_eDF, scratch)
        call("backward", *ctx.shape, *tensors, grads[0].contiguous(), *made)
        return grad_x_RD, grad_weights_RK, grad_gate_up_e2FD, grad_down_eDF, None
