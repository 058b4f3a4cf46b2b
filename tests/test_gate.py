"""A counted gate: each token once per optimizer step whatever happens around it, and a bias that keeps its bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    GROUP_LIMITED,
    biases,
    expected_load,
    gate_outputs,
    gates,
    random_biases,
    set_biases,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter

from alfb_dist.balancer import Balancer
from alfb_dist.gate import AuxLosses, BalancedGate, Batch, balance_gate, measure_loads
from alfb_dist.router import RouterSpec
from alfb_dist.sharding import padding_mask, parallelize, watch
from alfb_dist.trial import find_spec

TOP_K = 4
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def counted_model(seed: int = 0, *, checkpointing: str = "none", **overrides: Any) -> nn.Module:
    model = tiny_model(seed, **overrides)
    set_biases(model, random_biases(model, seed))
    if CHECKPOINTING[checkpointing] is not None:
        model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    watch(model)
    return model


def plain_model(seed: int = 0, **overrides: Any) -> nn.Module:
    """transformers' own, with the same weights and biases."""
    model = tiny_model(seed, **overrides)
    set_biases(model, random_biases(model, seed))
    return model


def train_on(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()


def pending(model: nn.Module) -> Tensor:
    """The loads that wait for the next update, zeros where a gate has seen none."""
    zero = torch.zeros(gates(model)[0].bias_E.numel(), dtype=torch.int64)
    loads = [zero if g.pending_load_E is None else g.pending_load_E for g in gates(model)]
    assert all(load_E.dtype == torch.int64 for load_E in loads)
    return torch.stack(loads)


# Each token counts exactly once.


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("overrides", [{}, GROUP_LIMITED], ids=["plain", "group limit"])
def test_load_equals_the_choices_counted_one_by_one(overrides: dict[str, int], checkpointing: str) -> None:
    model, batch = counted_model(1, checkpointing=checkpointing, **overrides), tiny_batch(1, 3, 7)
    train_on(model, batch)
    expected = expected_load(plain_model(1, **overrides), batch)
    assert torch.equal(pending(model), expected)
    assert pending(model).sum(1).tolist() == [21 * TOP_K] * 2
    assert not torch.equal(expected[0], expected[1])  # the layers are told apart


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


def test_only_a_two_dimensional_mask_says_what_is_padding() -> None:
    assert padding_mask(None) is None
    assert padding_mask(torch.ones(2, 3)) is None
    assert padding_mask(torch.ones(2, 1, 3, 3).tril()) is None
    assert padding_mask(object()) is None
    for dtype in (torch.int64, torch.bool, torch.float32):
        mask = padding_mask(torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=dtype))
        assert mask is not None and mask.tolist() == [[True, True, False], [True, False, False]]


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
def test_measured_loads_are_the_evaluations_and_wait_for_no_update(checkpointing: str) -> None:
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


class SharedGate(nn.Module):
    """Two depths of MoE blocks that share one gate of 4 experts, top 1; token i goes to expert i of its one-hot row."""

    def __init__(self) -> None:
        super().__init__()
        config = tiny_config(hidden_size=4, n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=2)
        self.first, self.second = DeepseekV3MoE(config), DeepseekV3MoE(config)
        self.second.gate = self.first.gate
        with torch.no_grad():
            self.first.gate.weight.copy_(5 * torch.eye(4))
            for block in (self.first, self.second):
                for p in block.experts.parameters():
                    nn.init.normal_(p, generator=torch.Generator().manual_seed(0))

    def forward(self, first_SD: Tensor, second_SD: Tensor) -> Tensor:
        return self.first(first_SD[None]).sum() + self.second(second_SD[None]).sum()


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


# The gate stays the family's.


def test_outputs_and_gradients_stay_the_same_to_the_bit() -> None:
    model, plain, batch = counted_model(7, **GROUP_LIMITED), plain_model(7, **GROUP_LIMITED), tiny_batch(7, 3, 7)
    ours, theirs = model(**batch), plain(**batch)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    ours.loss.backward(), theirs.loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        assert torch.equal(p.grad, q.grad), name


def test_state_dict_is_transformers() -> None:
    model, plain = counted_model(8), plain_model(8)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in theirs)
    fresh = tiny_model(9)
    watch(fresh)
    fresh.load_state_dict(theirs, strict=True)
    assert torch.equal(biases(fresh), biases(plain))


def test_parallelised_state_dict_has_transformers_names_and_shapes() -> None:
    ours = parallelize(tiny_model(8), ep_degree=1).state_dict()
    theirs = tiny_model(8).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_gate_is_still_an_instance_of_the_familys() -> None:
    gate = gates(counted_model())[0]
    assert isinstance(gate, DeepseekV3TopkRouter) and isinstance(gate, BalancedGate)
    assert type(gate).__name__ == "BalancedDeepseekV3TopkRouter"


def test_router_logits_are_still_recorded() -> None:
    model, plain, batch = parallelize(plain_model(9), ep_degree=1), plain_model(9), tiny_batch(9, 2, 5)
    ours = model(**batch, output_router_logits=True).router_logits
    theirs = plain(**batch, output_router_logits=True).router_logits
    assert len(ours) == len(theirs) == 2
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])  # behind experts that sum in another order


def test_watching_twice_counts_once() -> None:
    model, batch = counted_model(10), tiny_batch(10, 2, 5)
    classes = [type(g) for g in gates(model)]
    assert watch(model) == watch(model) == gates(model)
    assert [type(g) for g in gates(model)] == classes
    train_on(model, batch)
    assert torch.equal(pending(model), expected_load(plain_model(10), batch))


def test_aux_losses_cannot_be_added_to_a_watched_model() -> None:
    model = counted_model()
    with pytest.raises(ValueError, match="before a Balancer is made"):
        parallelize(model, ep_degree=1, sequence_loss_alpha=1e-4)


def test_model_without_gates_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert watch(model) == []
    assert model(torch.ones(2, 3)).shape == (2, 3)


def test_copy_counts_for_itself() -> None:
    model = counted_model(11)
    train_on(model, tiny_batch(11, 2, 5, padding=[0, 2]))
    twin = copy.deepcopy(model)
    for gate in gates(twin):
        gate.pending_load_E = None
    batch = tiny_batch(12, 2, 5, padding=[4, 0])
    train_on(twin, batch)
    assert torch.equal(pending(twin), expected_load(plain_model(11), batch))  # its own padding, not the original's
    assert pending(model).sum(1).tolist() == [8 * TOP_K] * 2
    set_biases(twin, torch.ones(2, 8))
    assert torch.equal(biases(model), random_biases(model, 11))


class JitteredRouter(DeepseekV3TopkRouter):
    """A gate whose routing none of our specs describes: it prefers the experts that the family would like least."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, _ = super().forward(hidden_states)
        scores = logits.neg().sigmoid()
        ids = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        return logits, scores.gather(1, ids), ids


@pytest.mark.parametrize("router", [DeepseekV3TopkRouter, JitteredRouter])
def test_gate_routes_as_its_family_does_known_or_not(router: type[DeepseekV3TopkRouter]) -> None:
    theirs, ours = router(tiny_config()), router(tiny_config())
    nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(theirs.e_score_correction_bias, std=0.2, generator=torch.Generator().manual_seed(1))
    ours.load_state_dict(theirs.state_dict())
    balance_gate(ours, "e_score_correction_bias", Batch(), AuxLosses())
    assert (ours.spec is None) == (router is JitteredRouter)
    x_TD = torch.randn(30, 24, generator=torch.Generator().manual_seed(2))
    for expected, got in zip(theirs(x_TD), ours(x_TD)):
        assert torch.equal(expected, got)
    ours(x_TD)[1].sum().backward()
    assert torch.equal(ours.pending_load_E, torch.bincount(theirs(x_TD)[2].flatten(), minlength=8))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, RouterSpec(4, scaling=2.5)),
        (GROUP_LIMITED, RouterSpec(4, num_groups=4, group_limit=2, scaling=2.5)),
        ({"norm_topk_prob": False, "routed_scaling_factor": 1.0}, RouterSpec(4, normalize=False)),
    ],
    ids=["plain", "group limit", "not normalised"],
)
def test_spec_of_a_family_is_found_whatever_its_weights_are(overrides: dict[str, Any], expected: RouterSpec) -> None:
    """Also where all weights are still 0 and the biases equal, in which every rule gives the same choice."""
    gate = DeepseekV3TopkRouter(tiny_config(**overrides))
    assert find_spec(gate, "e_score_correction_bias") == expected
    assert not gate.weight.any() and not gate.e_score_correction_bias.any()


def test_finding_the_spec_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    watch(tiny_model())
    assert torch.equal(torch.get_rng_state(), before)


# The bias keeps its bits.

ODD_BIASES = torch.tensor([[0.1, 1 / 3, -5.000001, 35.123456, 1e-8, -0.0, 2**-20, 0.5000001]] * 2)
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "there and back": lambda m: m.bfloat16().float().half().double().float(),
    "to(device)": lambda m: m.to("cpu"),
}


@pytest.mark.parametrize("cast", CASTS)
def test_bias_stays_float32_with_all_its_bits(cast: str) -> None:
    model = counted_model()
    set_biases(model, ODD_BIASES)
    CASTS[cast](model)
    for gate in gates(model):
        assert gate.e_score_correction_bias.dtype == gate.bias_E.dtype == torch.float32
        assert gate.state_dict()["e_score_correction_bias"].dtype == torch.float32
    assert torch.equal(biases(model).view(torch.int32), ODD_BIASES.view(torch.int32))


@pytest.mark.parametrize("cast", ["bfloat16()", "half()", "double()"])
def test_everything_else_is_cast(cast: str) -> None:
    model = CASTS[cast](counted_model())
    dtype = {"bfloat16()": torch.bfloat16, "half()": torch.float16, "double()": torch.float64}[cast]
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_bias_of_a_model_that_is_bfloat16_already_becomes_float32() -> None:
    model = tiny_model()
    set_biases(model, ODD_BIASES)
    model.bfloat16()
    watch(model)
    assert biases(model).dtype == torch.float32
    assert torch.equal(biases(model), ODD_BIASES.bfloat16().float())


def test_cast_bias_still_moves() -> None:
    """1,000 moves of 0.001 in a bfloat16 model end at 1, not at the 0.5 where bfloat16 stalls."""
    model = SharedGate()
    balancer = Balancer(model, rate=1e-3)
    model.bfloat16()
    for _ in range(1000):
        model.first.gate.add_load(torch.tensor([8, 0, 4, 4]))
        balancer.step()
    torch.testing.assert_close(balancer.bias_LE, torch.tensor([[-1.0, 1.0, 0.0, 0.0]]), rtol=1e-4, atol=0)


def test_bfloat16_model_routes_with_the_float32_bias() -> None:
    """Expert 1 leads by 2**-12 of bias alone, which bfloat16 would lose beside 5."""
    model = SharedGate()
    watch(model)
    model.bfloat16()
    model.first.gate.bias_E.copy_(torch.tensor([5.0, 5.0 + 2**-12, 0.0, 0.0]))
    model(torch.zeros(3, 4).bfloat16(), torch.zeros(2, 4).bfloat16()).backward()
    assert model.first.gate.pending_load_E.tolist() == [0, 5, 0, 0]


def test_bfloat16_model_trains_and_counts_as_transformers_routes() -> None:
    model, plain, batch = counted_model(13).bfloat16(), plain_model(13).bfloat16(), tiny_batch(13, 3, 7)
    for gate, bias in zip(gates(plain), random_biases(plain, 13)):
        gate.e_score_correction_bias = bias  # as transformers keeps it when it loads a model
    train_on(model, batch)
    assert torch.equal(pending(model), expected_load(plain, batch))
    for ours, theirs in zip(gate_outputs(model, batch), gate_outputs(plain, batch)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


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


def test_a_frozen_teachers_bias_stays_and_the_students_moves() -> None:
    teacher, student = parallelize(tiny_model(1), ep_degree=1), parallelize(tiny_model(2), ep_degree=1)
    teacher.requires_grad_(False)
    balancer, before = Balancer(student, rate=0.01), biases(teacher)
    batch = tiny_batch(0, 2, 8)
    for _ in range(3):
        with torch.no_grad():
            target = teacher(**batch).logits
        (student(**batch).logits - target).square().mean().backward()
        balancer.step()
    assert torch.equal(biases(teacher), before)
    assert balancer.bias_LE.abs().sum() > 0


def test_a_model_left_in_evaluation_mode_is_told_once() -> None:
    model = parallelize(tiny_model(), ep_degree=1).eval()
    balancer, batch = Balancer(model), tiny_batch(0, 2, 8)
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="no token was counted"):
        balancer.step()
    model(**batch).loss.backward()
    balancer.step()
    assert balancer.bias_LE.abs().sum() == 0
