"""Layers that run twice, under activation checkpointing: the second run sees the batch and the choices of the first.

A recompute happens in the backward, when the model may have seen another batch since. And its scores may differ in the
last bit, by which a token between two experts would go to the other one, whose rank waits for the rows that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def top_k_arguments(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """torch.topk's arguments, however they were given."""
    return input, k, dim % input.dim(), largest, sorted


@dataclass
class Run:
    """What the first run of a layer saw and chose."""

    seen: tuple[Any, ...]
    chosen: list[Tensor] = field(default_factory=list)
    """The result of each of its gates' top-ks, in the order of their calls."""
    next: int = 0

    def choose(self, find: Callable[[], Tensor]) -> Tensor:
        """The ids of the same top-k in the first run, which is the one that finds them."""
        if self.next == len(self.chosen):
            self.chosen.append(find())
        self.next += 1
        return self.chosen[self.next - 1]


class SameChoice(TorchFunctionMode):
    """Within it, top-ks over the experts give the ids that they gave in the layer's first run, and the values there."""

    def __init__(self, run: Run, num_experts: int) -> None:
        super().__init__()
        self.run, self.num_experts = run, num_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function as it is, but for the top-k. Both runs take the same steps, as torch's checkpoint demands."""
        if func in (torch.topk, Tensor.topk):
            values, k, dim, largest, in_order = top_k_arguments(*args, **(kwargs or {}))
            if dim == values.dim() - 1 and values.shape[-1] == self.num_experts:
                ids = self.run.choose(lambda: values.detach().topk(k, largest=largest, sorted=in_order)[1])
                return torch.return_types.topk((values.gather(-1, ids), ids))
        return func(*args, **(kwargs or {}))


class SameRuns:
    """A layer's checkpoint function, of which every run of the layer sees the batch of the first.

    batch: has `noted()`, what gates know of the batch; `note(*noted)`; and `run`, which a gate finds its choices in.
    """

    def __init__(self, inner: Callable[..., Any], batch: Any) -> None:
        self.inner, self.batch = inner, batch

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the checkpoint function gives for the layer."""
        run = Run(self.batch.noted())

        def run_layer(*args: Any, **kwargs: Any) -> Any:
            with self._as_first(run):
                return layer(*args, **kwargs)

        return self.inner(run_layer, *args, **kwargs)

    @contextmanager
    def _as_first(self, run: Run) -> Iterator[None]:
        before, run.next = (self.batch.noted(), self.batch.run), 0
        self.batch.note(*run.seen)
        self.batch.run = run
        try:
            yield
        finally:
            self.batch.note(*before[0])
            self.batch.run = before[1]


def remember_runs(module: Any, batch: Any) -> None:
    """The module's checkpoint function, where it is checkpointed, is one of `SameRuns`; before each forward."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    if function is not None and module.gradient_checkpointing:
        inner = function.inner if isinstance(function, SameRuns) else function
        module._gradient_checkpointing_func = SameRuns(inner, batch)
