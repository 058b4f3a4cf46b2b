"""Every supported family in one process: found, equal to transformers, counted, balanced, its bias in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.family_table import (
    DOCUMENT,
    HOLDS_BIAS,
    NOT_LANGUAGE_ONLY,
    UNSUPPORTED,
    biased_folders_without_language_model,
    moe_language_models,
    sources,
    written,
)
from support.tiny_families import (
    COMMON,
    FAMILIES,
    batch,
    biases,
    expected_load,
    family_config,
    family_model,
    logits_weights_ids,
    set_biases,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name

from alfb_dist import Balancer, parallelize
from alfb_dist.moe.families.blocks import ADDED_BIAS, moe_blocks
from alfb_dist.moe.families.experts import family_mlp
from alfb_dist.moe.gate import BalancedGate
from alfb_dist.moe.routing import BiasedFamilyRouter

RATE = 0.01
BIASED = sources(HOLDS_BIAS)
ADDED = sorted(f for f in FAMILIES if model_type_to_module_name(f) not in BIASED)


def pair(family: str, seed: int = 0, shift: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The family's model and the same one parallelised, with random biases where it has biases."""
    plain, ours = family_model(family, seed), family_model(family, seed)
    set_biases(plain, seed, shift), set_biases(ours, seed, shift)
    return plain, parallelize(ours, ep_degree=1)


@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient_equal_the_family_s(family: str, shift: float) -> None:
    """Also where all biased scores are negative, in which families differ."""
    plain, ours = pair(family, shift=shift)
    assert len(list(moe_blocks(ours))) == len(list(moe_blocks(plain))) > 0
    expected, got = plain(**batch(1)), ours(**batch(1))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    expected.loss.backward(), got.loss.backward()
    parameters = {n: p for n, p in plain.named_parameters() if "bias" not in n or p.requires_grad}
    assert dict(ours.named_parameters()).keys() == parameters.keys()
    for name, p in ours.named_parameters():
        theirs = parameters[name].grad
        if theirs is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert not theirs[len(p) :].any(), name  # rows of LongCat's experts without weights, which are not kept
            torch.testing.assert_close(p.grad, theirs[: len(p)], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_bias_is_a_float32_buffer_in_the_state_dict_whatever_the_model_is_cast_to(family: str) -> None:
    plain, ours = pair(family)
    exact = [b.clone() for b in biases(ours)]
    names = {f"{b.name}.{b.bias_name}" for b in moe_blocks(ours) if b.holder is b.module}
    ours.to(torch.bfloat16)
    assert all(b.dtype == torch.float32 and torch.equal(b, e) for b, e in zip(biases(ours), exact, strict=True))
    held = {id(b) for b in biases(ours)}
    kept = {n for n, b in ours.named_buffers() if id(b) in held}
    assert len(kept) == len(exact) and names <= kept <= ours.state_dict().keys()
    added = {n for n in kept if n.endswith(ADDED_BIAS)}
    assert ours.state_dict().keys() - added == plain.state_dict().keys()
    if family != "inkling2_text":  # its own gate needs weights in float32: neither model runs when cast as a whole
        ours(**batch(3)).loss.backward()
    assert all(b.grad is None and not b.requires_grad for b in biases(ours))


SOFTMAX_OF_CHOSEN = ["aria_text", "cohere2_moe", "gpt_oss"]
SOFTMAX_OF_CHOSEN += ["granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"]


def family_weights(family: str, gate: Any, logits: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
    """The family's weights of the chosen experts, written out."""
    chosen = scores.gather(-1, ids)
    if family in SOFTMAX_OF_CHOSEN:
        return logits.gather(-1, ids).softmax(-1)
    if family == "llama4_text":
        return logits.gather(-1, ids).sigmoid()
    if family == "gemma4_text":
        return chosen / chosen.sum(-1, keepdim=True) * gate.per_expert_scale[ids]
    return chosen / chosen.sum(-1, keepdim=True) if gate.spec.normalize else chosen * gate.spec.scaling


@pytest.mark.parametrize("family", ADDED)
def test_added_bias_decides_the_choice_and_not_the_weights(family: str) -> None:
    model = parallelize(family_model(family), ep_degree=1).eval()
    set_biases(model, 7)
    gate = next(m for m in model.modules() if isinstance(m, BalancedGate))
    seen: list[tuple[Tensor, ...]] = []
    gate.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(**batch(7))
    logits, weights, ids = logits_weights_ids(seen[0])
    scores = {"flint": logits.sigmoid(), "gemma4_text": logits}.get(family, logits.softmax(-1))  # Gemma gives scores
    by_rank = (scores + gate.bias_E).argsort(-1, descending=True)[:, : ids.shape[1]]
    assert torch.equal(ids.sort(-1)[0], by_rank.sort(-1)[0])
    assert not torch.equal(ids.sort(-1)[0], scores.topk(ids.shape[1])[1].sort(-1)[0])
    torch.testing.assert_close(weights, family_weights(family, gate, logits, scores, ids))


@pytest.mark.parametrize("family", ["cohere2_moe", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe"])
def test_a_token_may_go_to_one_expert_whose_weight_is_1(family: str) -> None:
    model = parallelize(family_model(family, num_experts_per_tok=1), ep_degree=1)
    balancer = Balancer(model, rate=RATE)
    model(**batch(4)).loss.backward()
    balancer.step()
    assert set(balancer.load_LE.sum(1).tolist()) == {batch(4)["input_ids"].numel()} and balancer.bias_LE.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_leaves_the_load_of_a_gate_with_the_bias_in_its_block_unchanged(reentrant: bool) -> None:
    plain, ours = pair("afmoe")
    balancer = Balancer(ours, rate=RATE)
    ours.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    ours(**batch(4)).loss.backward()
    balancer.step()
    assert torch.equal(balancer.load_LE, expected_load(plain, batch(4)))


@pytest.mark.parametrize("family", ["hy_v3", "longcat_flash", "mixtral", "nemotron_h"])
def test_copy_has_its_own_bias_and_experts(family: str) -> None:
    _, ours = pair(family)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for p in [*twin.parameters(), *biases(twin)]:
            p.zero_()
    assert all(b.any() for b in biases(ours)) or family == "mixtral"
    assert not any(gate.bias_E.any() for gate in twin.modules() if isinstance(gate, BalancedGate))
    assert not twin(**batch(5)).logits.any() and ours(**batch(5)).logits.any()


FILLED = [(0, 0), (0, 1), (2, 1), (3, 0), (4, 0), (4, 1)]
"""(row, slot) of the slots in the test below that are not empty."""

DBRX = {
    "n_heads": 2,
    "n_layers": 1,
    "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4},
    "ffn_config": {"moe_num_experts": 8},
}


@pytest.mark.parametrize("take", [lambda model: parallelize(model, ep_degree=1), Balancer], ids=["sharded", "balanced"])
@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_family_is_refused_with_its_reason_and_unchanged(family: str, take: Any) -> None:
    sizes = {**COMMON, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 1 if family == "zaya" else 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(DBRX if family == "dbrx" else sizes)))
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} \({family}\) cannot be balanced: ") as error:
        take(model)
    assert str(error.value).endswith(UNSUPPORTED[family])
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("family", ["ernie4_5_moe", "hunyuan_v1_moe", "longcat_flash", "minimax_m2", "mixtral"])
def test_auxiliary_loss_of_a_gate_with_known_scores_reaches_the_router(family: str) -> None:
    gradients = []
    for alpha in (0.0, 1.0):
        model = parallelize(family_model(family), ep_degree=1, sequence_loss_alpha=alpha)
        model(**batch(6)).loss.backward()
        gate = next(m for m in model.modules() if isinstance(m, BalancedGate))
        gradients.append(gate.get_parameter(gate.weight_name).grad)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("family", ["axk2", "deepseek_v4", "inkling_text", "kolibri1", "lfm2_moe"])
def test_auxiliary_loss_of_a_gate_with_other_scores_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"auxiliary losses need the scores of the gate, which .*Router does not show"):
        parallelize(family_model(family), ep_degree=1, sequence_loss_alpha=0.1)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["deepseek_v4", "nemotron_h"])
def test_general_path_leaves_empty_slots_out_under_any_implementation(family: str, implementation: str) -> None:
    model = parallelize(family_model(family, experts_implementation=implementation), ep_degree=1)
    experts = next(iter(moe_blocks(model))).module.experts
    x = torch.randn(5, experts.down_proj.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([[0, 3], [8, 8], [8, 1], [2, 8], [7, 6]])  # 8: empty
    weights = torch.tensor([[0.5, 0.2], [0.0, 0.0], [0.0, 0.7], [0.3, 0.0], [0.1, 0.9]], requires_grad=True)
    got = family_mlp(experts.part, x, ids, weights)
    one_by_one = [
        experts.part(x[i : i + 1], ids[i : i + 1, k : k + 1], weights[i : i + 1, k : k + 1]) for i, k in FILLED
    ]
    expected = torch.zeros_like(x).index_add(0, torch.tensor([i for i, _ in FILLED]), torch.cat(one_by_one))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    inputs = [x, weights, *experts.parameters()]
    for ours, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (got, expected))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not got[1].any()
    empty = family_mlp(experts.part, x[:0], ids[:0], weights[:0])
    assert all(not g.any() for g in torch.autograd.grad(empty.sum(), inputs))


def test_experts_with_a_parameter_that_they_share_are_refused() -> None:
    model = family_model("deepseek_v4")
    next(iter(moe_blocks(model))).module.experts.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"DeepseekV4Experts\) have parameters that do not hold one row for each"):
        parallelize(model, ep_degree=1)


def test_model_without_memory_is_parallelised() -> None:
    for family in ("afmoe", "gpt_oss", "llama4_text", "mixtral", "nemotron_h"):
        with torch.device("meta"):
            model = parallelize(AutoModelForCausalLM.from_config(family_config(family)), ep_degree=1)
        gate = next(m for m in model.modules() if isinstance(m, BalancedGate))
        assert gate.spec is not None or isinstance(gate.router, BiasedFamilyRouter)
        assert all(b.is_meta for b in biases(model)) and len(biases(model)) > 0


def test_document_lists_every_family_of_the_installed_transformers() -> None:
    """A new family is in the table of supported families, or in that of unsupported ones."""
    assert moe_language_models() == set(FAMILIES) | set(UNSUPPORTED)
    assert not set(FAMILIES) & set(UNSUPPORTED)
    assert biased_folders_without_language_model() == set(NOT_LANGUAGE_ONLY)
    assert written(DOCUMENT.read_text()) == DOCUMENT.read_text(), "cd tests; python -m support.family_table"
