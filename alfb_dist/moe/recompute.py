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
    """Return torch.topk's arguments, however they were given."""
    return input, k, dim % input.dim(), largest, sorted


@dataclass
class Recording:
    """The batch and the choices of a layer's first run."""

    batch: tuple[Any, ...]  # a snapshot
    ids: list[Tensor] = field(default_factory=list)  # of each top-k of its gates, in the order of the calls
    position: int = 0  # of the next call in `ids`

    def next_ids(self, find: Callable[[], Tensor]) -> Tensor:
        """Return the ids that this top-k had in the first run; the first run finds them."""
        if self.position == len(self.ids):
            self.ids.append(find())
        self.position += 1
        return self.ids[self.position - 1]


class ReplayedTopK(TorchFunctionMode):
    """Context in which top-ks over the experts return the ids of the layer's first run, and the values there.

    Both runs take the same steps, as torch's checkpoint demands.
    """

    def __init__(self, recording: Recording, num_experts: int) -> None:
        super().__init__()
        self.recording, self.num_experts = recording, num_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replay top-ks over the experts and call every other function."""
        if func in (torch.topk, Tensor.topk):
            values, k, dim, largest, in_order = top_k_arguments(*args, **(kwargs or {}))
            if dim == values.dim() - 1 and values.shape[-1] == self.num_experts:
                ids = self.recording.next_ids(lambda: values.detach().topk(k, largest=largest, sorted=in_order)[1])
                return torch.return_types.topk((values.gather(-1, ids), ids))
        return func(*args, **(kwargs or {}))


class ReplayedCheckpoint:
    """A layer's checkpoint function under which every run of the layer sees the batch of the first.

    batch: the `Batch` of the model's gates, which find the recording of the current layer in it.
    """

    def __init__(self, inner: Callable[..., Any], batch: Any) -> None:
        self.inner, self.batch = inner, batch

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint the layer."""
        recording = Recording(self.batch.snapshot())

        def run_layer(*args: Any, **kwargs: Any) -> Any:
            with self._replayed(recording):
                return layer(*args, **kwargs)

        return self.inner(run_layer, *args, **kwargs)

    @contextmanager
    def _replayed(self, recording: Recording) -> Iterator[None]:
        before, outer = self.batch.snapshot(), self.batch.recording
        self.batch.restore(recording.batch)
        self.batch.recording, recording.position = recording, 0
        try:
            yield
        finally:
            self.batch.restore(before)
            self.batch.recording = outer


def replay_checkpoints(module: Any, batch: Any) -> None:
    """Replace the checkpoint function of a module that is checkpointed. Called before each forward, since
    checkpointing may be turned on at any time."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    if function is not None and module.gradient_checkpointing:
        inner = function.inner if isinstance(function, ReplayedCheckpoint) else function
        module._gradient_checkpointing_func = ReplayedCheckpoint(inner, batch)
