"""Which shared experts take the compiled form, and when they go back to the family's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny_families import family_model
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MLP

from alfb_dist import parallelize
from alfb_dist.moe import shared_experts
from alfb_dist.moe.gate import mix
from alfb_dist.moe.shared_experts import CompiledShared, is_shared_swiglu


def family() -> DeepseekV3MLP:
    torch.manual_seed(0)
    return DeepseekV3MLP(DeepseekV3Config(hidden_size=20, intermediate_size=12))


class _Wrapped(nn.Module):
    """As peft wraps a Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 1


def hook(module: Any) -> None:
    module.gate_proj.register_forward_hook(lambda m, inputs, out: out + 1)


def wrap(module: Any) -> None:
    module.down_proj = _Wrapped(module.down_proj)


def add_bias(module: Any) -> None:
    module.up_proj.bias = nn.Parameter(torch.ones(12))


def replace_forward(module: Any) -> None:
    module.up_proj.forward = lambda x: x[..., :12]


def replace_activation(module: Any) -> None:
    module.act_fn = nn.GELU()


@pytest.mark.parametrize("change", [hook, wrap, add_bias, replace_forward, replace_activation])
def test_a_changed_linear_is_called(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = family(), torch.randn(5, 20)
    mixed: Any = copy.deepcopy(module)
    mix(mixed, CompiledShared)
    calls: list[int] = []
    monkeypatch.setattr(shared_experts.cpu, "shared_mlp", lambda *_: calls.append(1))
    assert torch.equal(mixed(x), module(x)) and len(calls) == 1  # None: the family's own
    change(module)
    change(mixed)
    assert torch.equal(mixed(x), module(x)) and len(calls) == 1


class _Clamped(DeepseekV3MLP):
    most = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=self.most)


class _Dropping(DeepseekV3MLP):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), training=self.training)


def test_only_plain_swiglu_is_accepted() -> None:
    assert is_shared_swiglu(family())
    config = DeepseekV3Config(hidden_size=20, intermediate_size=12)
    for most in (1, 1000, 1e5):
        module = _Clamped(config)
        module.most = most
        assert not is_shared_swiglu(module)
    dropping = _Dropping(config).eval()
    assert not is_shared_swiglu(dropping) and not dropping.training and not dropping.act_fn.training
    config.hidden_act = "gelu"
    assert not is_shared_swiglu(DeepseekV3MLP(config))
    biased = family()
    add_bias(biased)
    assert not is_shared_swiglu(biased)
    assert not is_shared_swiglu(nn.Linear(3, 3))
    with torch.device("meta"):
        assert is_shared_swiglu(DeepseekV3MLP(DeepseekV3Config(hidden_size=20, intermediate_size=12)))


@pytest.mark.parametrize("has_kernels", [True, False])
def test_parallelize_marks_shared_experts_and_keeps_their_names(
    has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_experts.cpu, "has_kernels", lambda: has_kernels)
    model = family_model("deepseek_v3")
    names = list(model.state_dict())
    parallelize(model, ep_degree=1)
    marked = [m for m in model.modules() if isinstance(m, CompiledShared)]
    assert list(model.state_dict()) == names
    shared = [name for name, _ in model.named_modules() if name.endswith("shared_experts")]
    assert len(marked) == len(shared) * has_kernels and shared
