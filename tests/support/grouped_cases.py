"""Cases for the grouped experts' compute, and the comparison of its outcome with the reference's in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.moe.experts import expert_mlp_reference

ACT = nn.SiLU()
NAMES = ("out", "x_RD", "weights_RK", "gate_up_e2FD", "down_eDF")
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""The error that a result may have, as a share of its norm: a few roundings of the type."""


def make_case(
    seed: int, rows: int, experts: int, top_k: int, width: int, inner: int, *, hot: bool = False
) -> list[Tensor]:
    """Return x, ids, weights, gate_up and down in float32. Ids are distinct in a row, a third are empty.

    hot: each row has expert 0 alone.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_RK = torch.rand(rows, experts, generator=generator).argsort(1)[:, :top_k]
    empty_RK = torch.rand(rows, top_k, generator=generator) < 1 / 3
    if hot:
        ids_RK, empty_RK = torch.zeros_like(ids_RK), torch.arange(top_k)[None].expand(rows, top_k) > 0
    return [
        torch.randn(rows, width, generator=generator),
        ids_RK.masked_fill(empty_RK, experts),
        torch.rand(rows, top_k, generator=generator).masked_fill(empty_RK, 0),
        torch.randn(experts, 2 * inner, width, generator=generator) / width**0.5,
        torch.randn(experts, width, inner, generator=generator) / inner**0.5,
    ]


def _all_empty(case: list[Tensor]) -> list[Tensor]:
    return [case[0], torch.full_like(case[1], len(case[4])), torch.zeros_like(case[2]), *case[3:]]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "a third of the slots empty": lambda: make_case(0, 40, 6, 3, 32, 16),
    "one expert takes all": lambda: make_case(1, 90, 5, 2, 16, 24, hot=True),
    "experts without rows": lambda: make_case(2, 20, 48, 4, 16, 8),
    "all slots empty": lambda: _all_empty(make_case(3, 9, 4, 2, 16, 8)),
    "no rows": lambda: make_case(4, 0, 4, 2, 16, 8),
    "one row": lambda: make_case(5, 1, 4, 3, 16, 8),
    "top 1": lambda: make_case(6, 30, 4, 1, 16, 8),
    "one expert here": lambda: make_case(7, 30, 1, 1, 16, 8),
    "odd widths": lambda: make_case(8, 37, 5, 3, 13, 7),
    "odd inner width": lambda: make_case(9, 37, 5, 3, 16, 9),
    "wider than a tile": lambda: make_case(10, 21, 3, 2, 304, 264),
}


def rounded(case: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the case with rows and parameters in the type, and routing weights in float32."""
    x, ids, weights, *parameters = case
    return [x.to(dtype), ids, weights, *(p.to(dtype) for p in parameters)]


def in_float64(case: list[Tensor]) -> list[Tensor]:
    return [t if t.dtype == torch.int64 else t.double() for t in case]


def outcome(mlp: Callable[..., Tensor], case: list[Tensor], device: str = "cpu", **options: Any) -> dict[str, Tensor]:
    """Return the output and the gradients of a fixed projection of it, by name."""
    x, ids, *rest = (t.to(device) for t in case)
    leaves = [t.clone().requires_grad_() for t in (x, *rest)]
    out = mlp(leaves[0], ids, *leaves[1:], ACT, **options)
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(slope.to(out))
    return dict(zip(NAMES, [out.detach(), *(leaf.grad for leaf in leaves)]))  # type: ignore[arg-type]


def assert_equals_reference(got: dict[str, Tensor], case: list[Tensor], dtype: torch.dtype) -> None:
    """Assert that all results have their types and are within the type's rounding of float64's."""
    expected = outcome(expert_mlp_reference, in_float64(case))
    for name, value in expected.items():
        assert got[name].dtype == (torch.float32 if name == "weights_RK" else dtype), name
        filled = (
            case[1] < len(case[4]) if name == "weights_RK" else slice(None)
        )  # the reference's differ in empty slots
        error, norm = (got[name].cpu().double() - value)[filled].norm(), value[filled].norm()
        assert error <= TOLERANCE[dtype] * norm, f"{name}: off by {error / norm:.1e} of its norm"
    idle = [e for e in range(len(case[4])) if not (case[1] == e).any()]
    assert not got["gate_up_e2FD"][idle].any() and not got["down_eDF"][idle].any()
    assert not got["weights_RK"].cpu()[case[1] == len(case[4])].any()
