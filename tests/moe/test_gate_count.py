"""Each token counts exactly once per optimizer step, whatever happens around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from support.tiny import (
    CHECKPOINTING,
    GROUP_LIMITED,
    TOP_K,
    SharedGate,
    counted_model,
    expected_load,
    gate_outputs,
    gates,
    pending,
    plain_model,
    tiny_batch,
    tiny_config,
    tiny_model,
    train_on,
)
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from alfb_dist.engine.balancer import Balancer
from alfb_dist.moe.batch import Batch
from alfb_dist.moe.batch_hooks import padding_mask
from alfb_dist.moe.gate import AuxLosses, balance_gate, measure_loads
from alfb_dist.moe.parallelize import parallelize


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("overrides", [{}, GROUP_LIMITED], ids=["plain", "group limit"])
def test_load_equals_the_choices_counted_one_by_one(overrides: dict[str, int], checkpointing: str) -> None:
    model, batch = counted_model(1, checkpointing=checkpointing, **overrides), tiny_batch(1, 3, 7)
    train_on(model, batch)
    expected = expected_load(plain_model(1, **overrides), batch)
    assert torch.equal(pending(model), expected)
    assert pending(model).sum(1).tolist() == [21 * TOP_K] * 2
    assert not torch.equal(expected[0], expected[1])  # the layers differ


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_padding_does_not_count(checkpointing: str) -> None:
    """10 tokens of which 2 are padding: the counts sum to 8 K."""
    model, batch = counted_model(2, checkpointing=checkpointing), tiny_batch(2, 2, 5, padding=[0, 2])
    train_on(model, batch)
    assert pending(model).sum(1).tolist() == [8 * TOP_K] * 2
    assert torch.equal(pending(model), expected_load(plain_model(2), batch))


def test_padding_on_the_left_does_not_count() -> None:
    model, batch = counted_model(2), tiny_batch(2, 2, 5, padding=[1, 2])
    batch = {name: x.flip(1) for name, x in batch.items()}
    train_on(model, batch)
    assert pending(model).sum(1).tolist() == [7 * TOP_K] * 2
    assert torch.equal(pending(model), expected_load(plain_model(2), batch))


def test_mask_passed_by_position_counts_the_same() -> None:
    model, batch = counted_model(2), tiny_batch(2, 2, 5, padding=[0, 2])
    model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss.backward()
    assert pending(model).sum(1).tolist() == [8 * TOP_K] * 2


def test_embeddings_instead_of_ids_count_the_same() -> None:
    model, batch = counted_model(2), tiny_batch(2, 2, 5, padding=[0, 2])
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    model(inputs_embeds=embedded, **batch).loss.backward()
    assert pending(model).sum(1).tolist() == [8 * TOP_K] * 2


def test_padding_of_one_batch_is_forgotten_in_the_next() -> None:
    model = counted_model(2)
    train_on(model, tiny_batch(2, 2, 5, padding=[0, 2]))
    train_on(model, tiny_batch(3, 2, 5))
    train_on(model, tiny_batch(4, 1, 3))
    assert pending(model).sum(1).tolist() == [(8 + 10 + 3) * TOP_K] * 2


def test_only_a_two_dimensional_mask_marks_padding() -> None:
    assert padding_mask(None) is None
    assert padding_mask(torch.ones(2, 3)) is None
    assert padding_mask(torch.ones(2, 1, 3, 3).tril()) is None
    assert padding_mask(object()) is None
    for dtype in (torch.int64, torch.bool, torch.float32):
        mask = padding_mask(torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=dtype))
        assert mask is not None and mask.tolist() == [[True, True, False], [True, False, False]]
        last = padding_mask(torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=dtype), positions=2)
        assert last is not None and last.tolist() == [[True, True], [False, True]]


def test_the_last_columns_of_a_mask_that_covers_a_cache_or_prefix_count() -> None:
    """As in the continuation of a cached prompt, or with peft's prefix tuning."""
    whole, (model, plain) = tiny_batch(2, 2, 7), (counted_model(2), plain_model(2))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        cache = plain(input_ids=whole["input_ids"][:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    rest = {"input_ids": whole["input_ids"][:, 3:], "labels": whole["labels"][:, 3:], "attention_mask": mask}
    name = next(n for n in ("cache", "past_key_values") if n in signature(plain.forward).parameters)  # 5.24 renames it
    model(**rest, **{name: copy.deepcopy(cache)}).loss.backward()
    ids = [output[2][mask[:, 3:].flatten() != 0] for output in gate_outputs(plain, {**rest, name: cache})]
    assert torch.equal(pending(model), torch.stack([torch.bincount(x.flatten(), minlength=8) for x in ids]))
    assert pending(model).sum(1).tolist() == [7 * TOP_K] * 2


PACKED: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])},
    "lengths": {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 10], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 3, 5, 10], dtype=torch.int32),
        "max_length_q": 5,
        "max_length_k": 5,
    },
    "4-D mask": {"attention_mask": torch.block_diag(*(torch.ones(n, n).tril() for n in (3, 2, 5)))[None, None].log()},
    "labels": {"labels": torch.tensor([[-100, -100, 7, -100, 7, -100, -100, -100, 7, -100]])},
}


@pytest.mark.parametrize("packing", PACKED)
def test_every_token_of_a_packed_or_partly_labelled_sequence_counts(packing: str) -> None:
    model, batch = counted_model(2), {**tiny_batch(2, 1, 10), **PACKED[packing]}
    train_on(model, batch)
    ids = [output[2] for output in gate_outputs(plain_model(2), batch)]
    assert torch.equal(pending(model), torch.stack([torch.bincount(x.flatten(), minlength=8) for x in ids]))
    assert pending(model).sum(1).tolist() == [10 * TOP_K] * 2


def test_mask_that_does_not_fit_the_tokens_is_refused() -> None:
    gate = balance_gate(DeepseekV3TopkRouter(tiny_config()), "e_score_correction_bias", Batch(), AuxLosses())
    gate.batch.mask_BS = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match=r"mask \(1, 3\) .* each of 4 tokens"):
        gate(torch.zeros(4, 24))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_micro_batches_sum(checkpointing: str) -> None:
    model, plain = counted_model(3, checkpointing=checkpointing), plain_model(3)
    batches = [tiny_batch(seed, 2, 4 + seed, padding=[seed, 0]) for seed in range(3)]
    for batch in batches:
        train_on(model, batch)
    assert torch.equal(pending(model), sum(expected_load(plain, batch) for batch in batches))
    assert pending(model).sum(1).tolist() == [(8 + 9 + 10) * TOP_K] * 2


def evaluate_no_grad(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**batch)


def evaluate_mode(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.eval()
    model(**batch).loss.backward()  # even a backward: the model was not training
    model.train()


def evaluate_inference_mode(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.eval()
    with torch.inference_mode():
        model(**batch)
    model.train()


def forward_without_backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    assert model(**batch).loss.requires_grad


EVALUATIONS: dict[str, Callable[[nn.Module, dict[str, Tensor]], None]] = {
    "no_grad in training mode": evaluate_no_grad,
    "evaluation mode": evaluate_mode,
    "inference mode": evaluate_inference_mode,
    "forward without backward": forward_without_backward,
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of reentrant under no_grad
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_evaluation_in_between_does_not_count(evaluation: str, checkpointing: str) -> None:
    model, plain = counted_model(4, checkpointing=checkpointing), plain_model(4)
    first, second = tiny_batch(5, 2, 5, padding=[0, 1]), tiny_batch(6, 2, 5, padding=[3, 0])
    train_on(model, first)
    EVALUATIONS[evaluation](model, tiny_batch(7, 3, 6))
    train_on(model, second)
    EVALUATIONS[evaluation](model, tiny_batch(8, 3, 6, padding=[0, 0, 5]))
    assert torch.equal(pending(model), expected_load(plain, first) + expected_load(plain, second))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of reentrant under no_grad
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("evaluation", ["no_grad in training mode", "inference mode", "evaluation mode"])
def test_evaluation_between_forward_and_backward_does_not_change_the_count(evaluation: str, checkpointing: str) -> None:
    """A recomputation happens in the backward, when the evaluation's padding is the latest that the model has seen."""
    model, batch = counted_model(4, checkpointing=checkpointing), tiny_batch(5, 2, 5, padding=[0, 3])
    loss = model(**batch).loss
    EVALUATIONS[evaluation](model, tiny_batch(7, 2, 5, padding=[4, 0]))
    EVALUATIONS[evaluation](model, tiny_batch(7, 3, 6))
    loss.backward()
    assert torch.equal(pending(model), expected_load(plain_model(4), batch))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of reentrant under no_grad
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_measured_loads_are_the_evaluations_and_reach_no_update(checkpointing: str) -> None:
    model, plain = counted_model(4, checkpointing=checkpointing), plain_model(4)
    batch, evaluated = tiny_batch(5, 2, 5, padding=[0, 3]), [tiny_batch(7, 2, 5, padding=[4, 0]), tiny_batch(8, 3, 6)]
    loss = model(**batch).loss
    with measure_loads(gates(model)) as measured:
        for one, evaluation in zip(evaluated, ["no_grad in training mode", "inference mode"]):
            EVALUATIONS[evaluation](model, one)
        load_LE = measured()
    EVALUATIONS["inference mode"](model, evaluated[0])  # not measured any more
    loss.backward()
    assert torch.equal(load_LE, sum(expected_load(plain, one) for one in evaluated))
    assert torch.equal(pending(model), expected_load(plain, batch))


def test_second_backward_through_the_same_graph_brings_no_new_tokens() -> None:
    model, batch = counted_model(5), tiny_batch(5, 2, 5)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(pending(model), expected_load(plain_model(5), batch))


def freeze_routers(model: nn.Module) -> None:
    for gate in gates(model):
        gate.weight.requires_grad_(False)


def freeze_all_but_head(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")


def freeze_all_but_experts(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("experts" in name)


@pytest.mark.parametrize("freeze", [freeze_routers, freeze_all_but_head, freeze_all_but_experts])
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
def test_frozen_router_counts(checkpointing: str, freeze: Callable[[nn.Module], None]) -> None:
    model, batch = counted_model(6, checkpointing=checkpointing), tiny_batch(6, 2, 5, padding=[0, 2])
    freeze(model)
    train_on(model, batch)
    assert torch.equal(pending(model), expected_load(plain_model(6), batch))
    assert all(g.weight.grad is None for g in gates(model))


def test_shared_gate_counts_both_depths_and_moves_once() -> None:
    """[4, 0, 0, 0] + [0, 3, 1, 0] = [4, 3, 1, 0] moves the bias by [-u, -u, +u, +u]."""
    model, one_hot = SharedGate(), torch.eye(4)
    balancer = Balancer(model, rate=0.125)
    model(one_hot[[0, 0, 0, 0]], one_hot[[1, 1, 1, 2]]).backward()
    assert len(balancer.gates) == 1
    assert model.first.gate.pending_load_E.tolist() == [4, 3, 1, 0]
    assert balancer.step()
    assert balancer.load_LE.tolist() == [[4, 3, 1, 0]]
    assert balancer.bias_LE.tolist() == [[-0.125, -0.125, 0.125, 0.125]]


class Wrapped(nn.Module):
    """A user's module around the model, with a forward of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(**batch).loss


def test_padding_is_left_out_whichever_way_the_model_is_called() -> None:
    batch = tiny_batch(0, 4, 10, padding=[0, 2, 5, 3])
    unpadded = {k: v for k, v in batch.items() if k != "attention_mask"}
    model = parallelize(tiny_model(), ep_degree=1)
    model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.sum().backward()
    assert taken(model) == [30 * TOP_K] * 2
    model(**batch).loss.backward()
    assert taken(model) == [30 * TOP_K] * 2
    model.model(input_ids=unpadded["input_ids"]).last_hidden_state.sum().backward()  # no mask is left from before
    assert taken(model) == [40 * TOP_K] * 2
    wrapped = parallelize(Wrapped(tiny_model()), ep_degree=1, sequence_loss_alpha=0.1)
    wrapped(batch).backward()
    assert taken(wrapped) == [30 * TOP_K] * 2


def taken(model: nn.Module) -> list[int]:
    """How many slots each layer has counted; they start over."""
    loads = [gate.pending_load_E for gate in gates(model)]
    for gate in gates(model):
        gate.pending_load_E = None
    return [int(load_E.sum()) for load_E in loads]


def test_a_model_left_in_evaluation_mode_warns_once() -> None:
    model = parallelize(tiny_model(), ep_degree=1).eval()
    balancer, batch = Balancer(model), tiny_batch(0, 2, 8)
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="no token was counted"):
        balancer.step()
    model(**batch).loss.backward()
    balancer.step()
    assert balancer.bias_LE.abs().sum() == 0
