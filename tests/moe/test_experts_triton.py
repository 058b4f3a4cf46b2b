"""The Triton kernels: in Triton's interpreter against the reference, and through its compiler for real devices.

Triton comes with torch for CUDA, not with torch for CPU; without it (pip install triton) the tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which torch for CPU does not include")
if torch.cuda.is_available():
    pytest.skip("test_experts_cuda.py runs the kernels on this device", allow_module_level=True)

from support.grouped_cases import CASES, NAMES, TOLERANCE, assert_equals_reference, outcome, rounded
from test_experts_cuda import DTYPES, grouped_mlp, poison  # noqa: F401

from alfb_dist.moe.experts import grouped, torch_kernels, triton_kernels


@pytest.fixture(autouse=True)
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "kernels", lambda _: triton_kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str, dtype: torch.dtype, poison: None) -> None:  # noqa: F811
    case = rounded(CASES[name](), dtype)
    assert_equals_reference(outcome(grouped_mlp, case), case, dtype)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    ours = outcome(grouped_mlp, case)
    monkeypatch.setattr(grouped, "kernels", lambda _: torch_kernels)
    plain = outcome(grouped_mlp, case)
    for result in NAMES:
        error = (ours[result] - plain[result]).norm()
        assert error <= TOLERANCE[torch.float32] * plain[result].norm(), result


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from alfb_dist.moe.experts import triton_kernels as kernels

def make(kernel, **types):
    types |= {"ROWS": "constexpr", "COLUMNS": "constexpr"}
    source = ASTSource(kernel, signature=types, constexprs={"ROWS": kernels.ROWS, "COLUMNS": kernels.MAX_COLUMNS})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))

half, index, size, weight = "*bf16", "*i32", "i32", "*fp32"
make(kernels._gather_rows, x=half, slot=index, end=index, out=half, width=size, num_slots=size)
make(kernels._combine_rows, y=half, place=index, out=half, num_rows=size, width=size, num_slots=size)
make(kernels._swiglu, gate_up=half, weights=weight, slot=index, end=index, h=half, width=size)
make(kernels._swiglu_backward, gate_up=half, grad_h=half, weights=weight, slot=index, end=index, h=half,
     grad_gate_up=half, grad_weights=weight, width=size)
"""


def test_kernels_compile_without_the_device(tmp_path: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [int(line) > 0 for line in done.stdout.split()] == [True] * 4
