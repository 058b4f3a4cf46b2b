"""Named ranges in torch's profiler traces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_OFF: AbstractContextManager[Any] = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """Return a context that a running profiler records as a range of this name; without one it costs a quarter of a
    microsecond.

    The range of its backward is added to the trace later, see training/trace.py.
    """
    return torch.profiler.record_function(name) if torch._C._autograd._profiler_enabled() else _OFF
