"""DeepSpeed's AutoEP with a Balancer: the bias, which AutoEP never updates, moves by the loads of AutoEP's routers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import gates, part, plain_step, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor, nn

from alfb_dist.engine.balancer import Balancer
from alfb_dist.engine.initialize import quiet, start_without_compiler
from alfb_dist.moe.gate import measure_loads

STEPS, RATE, LEARNING_RATE, TOP_K, TOKENS = 3, 0.05, 0.05, 4, 40


class Case(NamedTuple):
    ep: int
    stage: int
    micro_batches: int = 1
    checkpointing: bool | None = None  # use_reentrant
    evaluate: bool = False
    frozen_router: bool = False
    mode: str = "train"


CASES = [
    Case(1, 1),
    Case(2, 0, micro_batches=2, evaluate=True),
    Case(2, 1, micro_batches=2, checkpointing=True, evaluate=True),
    Case(2, 2, micro_batches=4, checkpointing=False),
    Case(2, 3, micro_batches=2, evaluate=True),
    Case(2, 1, frozen_router=True),
    Case(2, 2, mode="freeze"),
]


def global_batch(step: int) -> dict[str, Tensor]:
    """Return 8 sequences of 6 positions, the last of which is padding."""
    return tiny_batch(step, 8, 6, padding=[1] * 8)


def start_model(frozen_router: bool = False) -> nn.Module:
    model = tiny_model(3)
    set_biases(model, random_biases(model, 4))
    for gate in gates(model) if frozen_router else ():
        gate.weight.requires_grad_(False)
    return model


def autoep_engine(model: nn.Module, ep: int, stage: int, micro_batches: int, **expert_parallel: Any) -> Any:
    start_without_compiler()
    quiet(40)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "expert_parallel": {"enabled": True, "autoep_size": ep, "use_grouped_mm": False, **expert_parallel},
    }
    return deepspeed.initialize(model=model, config=config)[0]


def routers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]


def train(case: Case) -> dict[str, Any]:
    engine = autoep_engine(start_model(case.frozen_router), case.ep, case.stage, case.micro_batches)
    if case.checkpointing is not None:
        engine.module.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
        engine.module.enable_input_require_grads() if case.checkpointing else None
    balancer = Balancer(engine, rate=RATE, mode=case.mode)
    seen: dict[str, Any] = {"loads": [], "biases": [], "start": balancer.bias_LE, "acted": []}
    for step in range(STEPS):
        mine = part(global_batch(step), dist.get_rank(), dist.get_world_size())
        for i in range(case.micro_batches):
            engine.backward(engine(**part(mine, i, case.micro_batches)).loss)
            engine.step()
            if case.evaluate:
                engine.eval()
                with torch.no_grad():
                    engine(**tiny_batch(90 + step, 2, 5))
                engine.train()
            seen["acted"].append(balancer.step())
        seen["loads"].append(balancer.load_LE)
        seen["biases"].append(torch.stack([r.e_score_correction_bias.clone() for r in routers(engine.module)]))
    seen["dtypes"] = {r.e_score_correction_bias.dtype for r in routers(engine.module)}
    seen["layer"] = {type(m).__name__ for m in engine.module.modules() if hasattr(m, "tokens_per_expert")}
    return seen


def train_all() -> dict[Case, dict[str, Any]]:
    return {case: train(case) for case in CASES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, dict[str, Any]]]:
    return run_ranks(2, train_all, folder=tmp_path_factory.mktemp("ranks"))


@functools.cache
def plain_loop(frozen_router: bool = False, moves: bool = True) -> list[dict[str, Tensor]]:
    """Return the loads and biases of the same training of transformers' own model in one process."""
    model, rate = start_model(frozen_router), RATE if moves else 0.0
    return [plain_step(model, global_batch(i), learning_rate=LEARNING_RATE, rate=rate) for i in range(STEPS)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bias_and_loads_equal_a_plain_loops_on_every_rank(case: Case, trained: Any) -> None:
    expected = plain_loop(case.frozen_router, case.mode == "train")
    for by_case in trained:
        for step, (load_LE, bias_LE) in enumerate(zip(by_case[case]["loads"], by_case[case]["biases"])):
            assert torch.equal(load_LE, expected[step]["load"])
            assert torch.equal(bias_LE.view(torch.int32), expected[step]["bias"].view(torch.int32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_unpadded_token_counts_once_and_the_layer_stays(case: Case, trained: Any) -> None:
    for by_case in trained:
        assert all(load_LE.sum(1).tolist() == [TOKENS * TOP_K] * 2 for load_LE in by_case[case]["loads"])
        assert by_case[case]["dtypes"] == {torch.float32} and by_case[case]["layer"] == {"AutoEPMoELayer"}
        assert by_case[case]["acted"] == ([False] * (case.micro_batches - 1) + [True]) * STEPS


def test_plain_loops_bias_differs_by_step_and_layer() -> None:
    seen = [x["bias"] for x in plain_loop()]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2][0], seen[2][1])


# What the bias does there, and what is refused.


def in_one_process() -> dict[str, Any]:
    engine = autoep_engine(start_model(), 1, 1, 1)
    balancer, seen = Balancer(engine, rate=1.0), {}
    again = Balancer(engine, rate=1.0)
    seen["same gates"] = again.gates == balancer.gates
    engine.eval()
    batch = tiny_batch(5, 2, 6)
    for favoured in (2, 6):
        set_biases(engine.module, torch.nn.functional.one_hot(torch.tensor([favoured] * 2), 8) * 100.0)
        with torch.no_grad(), measure_loads(balancer.gates) as measured:
            engine(**batch)
            seen[favoured] = measured()
    engine.module.bfloat16()
    seen["cast"] = {g.bias_E.dtype for g in balancer.gates}, balancer.bias_LE
    return seen


def test_bias_reaches_autoeps_top_k(ranks: Callable[..., list[Any]]) -> None:
    seen = ranks(1, in_one_process)[0]
    for favoured in (2, 6):
        assert seen[favoured][:, favoured].tolist() == [12, 12] and seen[favoured].sum(1).tolist() == [48, 48]
    assert seen["same gates"]
    assert seen["cast"][0] == {torch.float32} and seen["cast"][1][0, 6] == 100.0


def refusals() -> dict[str, str]:
    texts = {}
    for name in ("dropped", "parameter", "shape"):
        engine = autoep_engine(start_model(), 1, 1, 1)
        for router in routers(engine.module):
            bias_E = router.e_score_correction_bias
            del router.e_score_correction_bias
            if name == "dropped":  # as AutoEP leaves it for a family with a bias of another name
                router.e_score_correction_bias = None
            elif name == "parameter":
                router.e_score_correction_bias = nn.Parameter(bias_E)
            else:
                router.register_buffer("e_score_correction_bias", bias_E[None])
        with pytest.raises(ValueError, match="bias") as error:
            Balancer(engine)
        texts[name] = str(error.value)
    return texts


def test_router_without_a_bias_to_update_is_refused(ranks: Callable[..., list[Any]]) -> None:
    texts = ranks(1, refusals)[0]
    assert "dropped the selection bias of DeepseekV3ForCausalLM" in texts["dropped"]
    assert "is a parameter of DeepSpeed's optimizer" in texts["parameter"]
    assert "has shape (1, 8), AutoEP's router uses (8,)" in texts["shape"]
