"""The C compiler, and whether the compiled kernels agree with plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.device import uses_cuda
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem, warning

TOLERANCE = 1e-5  # of the largest value: float32 sums in another order


def judge_kernels(*, cuda: bool, off: bool, compiler: str | None, loaded: bool, difference: float | None) -> Result:
    """Judge the kernels. difference: from plain torch, as a fraction of the largest value; None if not loaded."""
    check = "compiled kernels"
    if cuda:
        return not_applicable(check, "used on CPU only")
    if off:
        return warning(check, "disabled by ALFB_NATIVE=0; plain torch is used, which is slower", "unset ALFB_NATIVE")
    if compiler is None:
        return warning(
            check,
            "no C compiler; plain torch is used, which is slower",
            "apt-get install gcc libc6-dev, or ignore this",
        )
    if not loaded:
        fix = "make ~/.cache writable, install libc6-dev, or set ALFB_NATIVE=0; logging at INFO shows the reason"
        return warning(check, f"{compiler} cannot compile them; plain torch is used, which is slower", fix)
    if difference is None or not difference <= TOLERANCE:
        found = f"compiled by {compiler}, they differ from plain torch by {difference} of the largest value"
        return problem(check, found, "set ALFB_NATIVE=0, and report the compiler's version")
    return ok(check, f"{compiler}; equal plain torch's results to {difference:.0e}")


def kernel_difference() -> float:
    """Return the kernels' largest error against plain torch, as a part of the largest value."""
    import torch
    from torch import Tensor

    from alfb_dist import cpu
    from alfb_dist.moe.experts.plain import plain_mlp

    generator = torch.Generator().manual_seed(0)
    x_RD, weights_RK = torch.randn(64, 32, generator=generator), torch.rand(64, 2, generator=generator)
    gate_up_e2FD, down_eDF = (torch.randn(4, *shape, generator=generator) for shape in ((96, 32), (32, 48)))
    ids_RK = torch.randint(0, 5, (64, 2), generator=generator)  # 4 experts; 4 marks an empty slot

    def results(native: bool) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x_RD, weights_RK, gate_up_e2FD, down_eDF)]
        x, weights, gate_up, down = inputs
        if native:
            out = cpu.expert_mlp(x, ids_RK, weights, gate_up, down)
            assert out is not None
        else:
            out = plain_mlp(x, ids_RK, weights, gate_up, down, torch.nn.SiLU())
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in inputs if t.grad is not None)]

    pairs = list(zip(results(True), results(False), strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def check_kernels(case: Case) -> Iterator[Result]:
    """The compiled kernels of this machine."""
    from alfb_dist import cpu

    cuda = uses_cuda()
    off, compiler = os.environ.get("ALFB_NATIVE") == "0", cpu.find_compiler()
    loaded = not (cuda or off or compiler is None) and bool(cpu.has_kernels())
    yield judge_kernels(
        cuda=cuda, off=off, compiler=compiler, loaded=loaded, difference=kernel_difference() if loaded else None
    )
