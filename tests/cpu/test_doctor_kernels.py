"""Doctor's comparison of the compiled kernels with plain torch."""

from __future__ import annotations

from typing import Any

import pytest

from alfb_dist import cpu
from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.kernels import check_kernels
from alfb_dist.cpu.experts import EXPERTS

pytestmark = pytest.mark.skipif(not cpu.has_kernels(), reason="no C compiler")


def test_kernels_with_wrong_results_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALFB_NATIVE", raising=False)
    (right,) = check_kernels(Case())
    assert right.verdict == "ok"
    call = EXPERTS.call

    def inexact(name: str, *arguments: Any) -> Any:
        result = call(name, *arguments)
        if name == "backward":
            arguments[-2].mul_(1.001)  # the gradient of the second matrix
        return result

    monkeypatch.setattr(EXPERTS, "call", inexact)
    (wrong,) = check_kernels(Case())
    assert wrong.verdict == "problem"
