"""The products of gemm.h against float64: all forms of factors and results, at sizes around those of a tile."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alfb_dist import cpu
from alfb_dist.cpu import build

HEADER = build.SOURCES / "gemm.h"
SOURCE = """
{first}
#include "{header}"
void multiply_any(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_width, const int32_t *a_index, int64_t a_t,
                  const float *b, int64_t b_width, const int32_t *b_index, int64_t b_t,
                  float *c, int64_t c_width, const int32_t *c_index, int64_t add) {{
    multiply(m, n, k, (matrix_t){{a, a_width, a_index, a_t}}, (matrix_t){{b, b_width, b_index, b_t}},
             (result_t){{c, c_width, c_index, add}});
}}
"""
pytestmark = pytest.mark.skipif(not cpu.has_kernels(), reason="no C compiler")
Multiply = Callable[..., None]


@pytest.fixture(scope="module", params=["this processor's vectors", "vectors of 8"])
def multiply(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Multiply:
    """Return `multiply` on tensors, also in the narrow form of processors without AVX-512."""
    first = "" if request.param.startswith("this") else "#undef __AVX512F__"
    source = tmp_path_factory.mktemp("gemm") / "any.c"
    source.write_text(SOURCE.format(first=first, header=HEADER))
    library = build.load(source)
    assert library is not None

    def call(m: int, n: int, k: int, *rest: Tensor | int | None) -> None:
        passed = [t.data_ptr() if isinstance(t, Tensor) else t for t in rest]
        kinds = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        library.multiply_any.argtypes = [ctypes.c_int64] * 3 + kinds * 3
        library.multiply_any(m, n, k, *passed)

    return call


def rows(index: Tensor | None, stored: Tensor) -> Tensor:
    return stored if index is None else stored[index.long()]


SIZES = [(1, 1, 1), (6, 64, 16), (7, 65, 17), (13, 31, 5), (5, 128, 130), (29, 100, 600), (64, 63, 513)]


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize(("a_t", "b_t", "add", "indexed"), list(itertools.product([0, 1], repeat=4)))
def test_products_of_every_form(
    multiply: Multiply, m: int, n: int, k: int, a_t: int, b_t: int, add: int, indexed: int
) -> None:
    generator = torch.Generator().manual_seed(m * n + k)

    def made(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    def picks(count: int, of: int) -> Tensor | None:
        return torch.randint(of, (count,), generator=generator, dtype=torch.int32) if indexed else None

    # with a few rows and columns that the product does not use
    a_index, b_index = (picks(m, m + 3) if not a_t else None), (picks(k, k + 2) if not b_t else None)
    a = made(k, m + 5) if a_t else made(m + 3, k + 5)
    b = made(n, k + 1) if b_t else made(k + 2, n + 1)
    c = made(m + 4, n + 2)
    c_index = torch.randperm(m + 4, generator=generator)[:m].int() if indexed else None
    expected = c.double()
    left = a[:, :m].T if a_t else rows(a_index, a)[:m, :k]
    right = b[:, :k].T if b_t else rows(b_index, b)[:k, :n]
    where = torch.arange(m) if c_index is None else c_index.long()
    expected[where, :n] = left.double() @ right.double() + (expected[where, :n] if add else 0)
    multiply(m, n, k, a, a.shape[1], a_index, a_t, b, b.shape[1], b_index, b_t, c, c.shape[1], c_index, add)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5 * k**0.5)  # the rest is unchanged


def test_a_row_that_the_index_names_twice_is_added_twice(multiply: Multiply) -> None:
    a, b, c = torch.ones(9, 3), torch.ones(3, 70), torch.zeros(2, 70)
    index = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 0], dtype=torch.int32)
    multiply(9, 70, 3, a, 3, None, 0, b, 70, None, 0, c, 70, index, 1)
    assert torch.equal(c, torch.tensor([18.0, 9.0])[:, None].expand(2, 70))


@pytest.mark.parametrize("b_t", [0, 1])
def test_a_row_does_not_depend_on_other_rows(multiply: Multiply, b_t: int) -> None:
    """To the last bit, whatever their number and order."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 700, generator=generator), torch.randn(700, 90, generator=generator)
    stored = b.T.contiguous() if b_t else b

    def product(a: Tensor) -> Tensor:
        c = torch.empty(len(a), 90)
        multiply(len(a), 90, 700, a, 700, None, 0, stored, stored.shape[1], None, b_t, c, 90, None, 0)
        return c

    whole, order = product(a), torch.randperm(50, generator=generator)
    assert torch.equal(product(a[order].contiguous()), whole[order])
    for count in range(1, 14):
        assert torch.equal(product(a[:count].contiguous()), whole[:count])


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize(("m", "n", "k"), [(700, 40, 100), (50, 200, 300), (333, 130, 90)])
def test_the_number_of_threads_changes_no_bit(multiply: Multiply, m: int, n: int, k: int, threads: int) -> None:
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    results = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            results.append(torch.ones(m, n))
            multiply(m, n, k, a, k, None, 0, b, n, None, 0, results[-1], n, None, 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), a.double() @ b.double() + 1, rtol=1e-5, atol=1e-4)
