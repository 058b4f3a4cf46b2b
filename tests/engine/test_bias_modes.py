"""What a Balancer does with the biases that it finds: train, freeze or recentre them, for all layers or by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import biases, set_biases, tiny_batch, tiny_config, tiny_model
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from alfb_dist.config import ConfigError, config_to_toml, load_config
from alfb_dist.engine.balancer import Balancer
from alfb_dist.engine.initialize import initialize
from alfb_dist.training.settings import balancing_of

RELEASED = torch.tensor([[5.001, 5.002, 5.003, 5.006], [35.5, 35.25, 35.125, 35.0]])
LOAD_LE = torch.tensor([[10, 0, 0, 0], [5, 4, 3, 4]])
MOVE = torch.tensor([[-0.5, 0.5, 0.5, 0.5], [-0.5, 0.0, 0.5, 0.0]])


def released() -> nn.Module:
    """Return two layers of four experts, with biases far from 0."""
    model = nn.ModuleList(DeepseekV3MoE(tiny_config(n_routed_experts=4)) for _ in range(2))
    set_biases(model, RELEASED)
    return model


def stepped(mode: str | Sequence[str]) -> tuple[Balancer, Tensor]:
    """Return a Balancer after one step, and the biases it began with."""
    balancer = Balancer(released(), rate=0.5, mode=mode)
    start = balancer.bias_LE
    for gate, load_E in zip(balancer.gates, LOAD_LE):
        gate.add_load(load_E)
    assert balancer.step() is True
    return balancer, start


def recentred(bias_LE: Tensor) -> Tensor:
    return torch.tensor([[b - sum(row) / len(row) for b in row] for row in bias_LE.double().tolist()])


def test_train_moves_the_biases_from_where_they_are() -> None:
    balancer, start = stepped("train")
    assert torch.equal(start, RELEASED) and torch.equal(balancer.bias_LE, RELEASED + MOVE)


def test_freeze_counts_and_reports_and_never_moves() -> None:
    balancer, start = stepped("freeze")
    assert torch.equal(start, RELEASED) and torch.equal(balancer.bias_LE, RELEASED)
    assert torch.equal(balancer.load_LE, LOAD_LE) and balancer.num_steps == 1


def test_recentre_subtracts_the_mean_once_and_trains() -> None:
    balancer, start = stepped("recentre")
    assert torch.equal(start, recentred(RELEASED)) and torch.equal(balancer.bias_LE, start + MOVE)
    assert start.dtype == torch.float32 and not start.double().mean(-1).abs().gt(1e-6).any()


def test_recentre_leaves_the_routing_as_it_was() -> None:
    model, batch = tiny_model(3), tiny_batch(1, 2, 6)
    set_biases(model, torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) + 8)
    with torch.no_grad():
        before = model(**batch).logits
        balancer = Balancer(model, mode="recentre")
        assert balancer.bias_LE.abs().max() < 1
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-5)


def test_modes_differ_by_layer() -> None:
    for first, second in (("freeze", "train"), ("recentre", "freeze"), ("train", "recentre")):
        balancer, start = stepped([first, second])
        for i, mode in enumerate((first, second)):
            assert torch.equal(start[i], recentred(RELEASED)[i] if mode == "recentre" else RELEASED[i])
            assert torch.equal(balancer.bias_LE[i], start[i] if mode == "freeze" else start[i] + MOVE[i])


def test_resumed_biases_are_not_recentred_again() -> None:
    first, _ = stepped("recentre")
    second = Balancer(released(), rate=0.5, mode="recentre")
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.bias_LE, first.bias_LE) and second.bias_LE.mean() != 0


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("frozen", "mode must be one of train, freeze, recentre, .* got 'frozen'"),
        (["train", "off"], "got 'off'"),
        (["train"], "each of the 2 MoE layers or for all, got 1"),
    ],
)
def test_mode_that_is_not_valid_is_refused(mode: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Balancer(released(), mode=mode)


def test_mode_is_refused_before_anything_is_built() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="got 'off'"):
        initialize(model, {"train_micro_batch_size_per_gpu": 1}, ep_degree=1, mode="off")
    assert type(model.model.layers[1].mlp.gate).__name__ == "DeepseekV3TopkRouter"


def test_teacher_never_moves_while_its_student_does() -> None:
    student = tiny_model(3)
    balancer = Balancer(student, rate=0.5)
    teacher = copy.deepcopy(student)
    before = biases(teacher)
    for step in range(2):
        batch = tiny_batch(step, 2, 6)
        with torch.no_grad():
            target = teacher(**batch).logits
        (student(**batch).logits - target).square().sum().backward()
        balancer.step()
        assert balancer.load_LE.sum(1).tolist() == [48, 48]
    assert biases(student).any() and torch.equal(biases(teacher), before)


# In a run's configuration.

TOML = """
[model]
{model}
[optimizer]
lr = 0.001
[data]
source = ["python-stdlib"]
sequence_length = 16
[train]
steps = 1
global_batch = 1
micro_batch = 1
"""


@pytest.fixture
def configured(tmp_path: Path) -> Any:
    tiny_config(vocab_size=320).save_pretrained(tmp_path / "released")

    def load(path: bool, *overrides: str) -> Any:
        model = f'path = "{tmp_path / "released"}"' if path else "config = {vocab_size = 320}"
        (tmp_path / "x.toml").write_text(TOML.format(model=model))
        return load_config(tmp_path / "x.toml", list(overrides))

    return load


def test_released_model_is_frozen_and_a_new_one_trains_by_default(configured: Any) -> None:
    assert balancing_of(configured(path=True)).mode == "freeze"
    assert balancing_of(configured(path=False)).mode == "train"


@pytest.mark.parametrize("mode", ["train", "freeze", "recentre"])
@pytest.mark.parametrize("path", [True, False])
def test_named_mode_is_used_for_any_model(configured: Any, path: bool, mode: str) -> None:
    assert balancing_of(configured(path, f"balance.mode={mode}")).mode == mode


def test_unknown_mode_is_named(configured: Any) -> None:
    with pytest.raises(ConfigError, match=r"balance.mode .*off"):
        configured(False, "balance.mode=off")


SIZES = ["model.config.num_hidden_layers=4", "model.config.first_k_dense_replace=2"]

SPARSE = ["model.family=exaone_moe", 'model.config.mlp_layer_types=["dense", "sparse", "sparse"]']
SPARSE += ["model.config.num_hidden_layers=3"]


@pytest.mark.parametrize("sizes", [SIZES, SPARSE])
def test_modes_by_layer_are_read_and_written(configured: Any, tmp_path: Path, sizes: list[str]) -> None:
    config = configured(False, *sizes, 'balance.mode=["freeze", "recentre"]')
    assert balancing_of(config).mode == ("freeze", "recentre")
    (tmp_path / "again.toml").write_text(config_to_toml(config))
    assert load_config(tmp_path / "again.toml", []) == config


def test_modes_by_layer_count_the_layers_of_a_released_model_too(configured: Any) -> None:
    assert balancing_of(configured(True, 'balance.mode=["train", "freeze"]')).mode == ("train", "freeze")
    with pytest.raises(ConfigError, match=r"balance.mode \(3 modes\) must have one mode for each of the 2 MoE"):
        configured(True, 'balance.mode=["train", "freeze", "train"]')


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("freze", r'balance.mode \("freze"\) must be .*; did you mean "freeze"\?'),
        ('["train", "auto"]', r'balance.mode \(\["train", "auto"\]\) must be .* a list of the latter three'),
        ("[]", r"balance.mode \(\[\]\) must be"),
        ("3", r"balance.mode \(3\) must be"),
        ('["train"]', r"balance.mode \(1 modes\) .* each of the 2 MoE layers: .*num_hidden_layers \(4\) minus"),
        ('["train", "train", "freeze"]', r"balance.mode \(3 modes\) .* each of the 2 MoE layers"),
    ],
)
def test_modes_that_are_not_valid_are_refused_before_anything_starts(configured: Any, mode: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        configured(False, *SIZES, f"balance.mode={mode}")


@pytest.mark.parametrize("freeze", ["mode", "no Balancer", "rate"])
def test_frozen_biases_keep_every_bit_while_all_else_trains(freeze: str) -> None:
    """Adam with weight decay trains all parameters."""
    model = tiny_model(3)
    set_biases(model, torch.tensor([[5.001, 35.123456, -2.5, 1e-8, 0.1, 1 / 3, 2**-20, 7.0]] * 2))
    before = biases(model)
    given: dict[str, Any] = {"mode": {"mode": "freeze"}, "rate": {"rate": 0.0}}.get(freeze, {})
    balancer = None if freeze == "no Balancer" else Balancer(model, **given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        model(**tiny_batch(step, 2, 6)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.step()
    assert torch.equal(biases(model).view(torch.int32), before.view(torch.int32))
