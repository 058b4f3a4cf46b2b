"""doctor on a configuration: settings that are valid but seldom meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.doctor_verdicts import TEST_CONFIG, Row, case, check_row, verdicts

from alfb_dist.cli.doctor import pitfalls
from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result
from alfb_dist.config import ConfigError, load_config

JUDGEMENTS: list[Row] = [
    (pitfalls.judge_rate, ("sign", 0.001, "sigmoid", 64), "ok", "sigmoid"),
    (pitfalls.judge_rate, ("sign", 0.001, None, 64), "ok", "of the family's own rule"),
    (pitfalls.judge_rate, ("sign", 0.001, "softmax", 64), "warning", "balance.rate = 3e-05"),
    (pitfalls.judge_rate, ("sign", 3e-5, "softmax", 64), "ok", "average 0.016"),
    (pitfalls.judge_rate, ("proportional", 0.001, "softmax", 64), "ok", "softmax"),
    (pitfalls.judge_rate, ("sign", 0.0, "sigmoid", 64), "warning", "never move"),
    (pitfalls.judge_annealing, (0.001, 9500, 10000), "ok", "from step 9500"),
    (pitfalls.judge_annealing, (0.001, None, 200), "ok", "short run"),
    (pitfalls.judge_annealing, (0.001, None, 10000), "warning", "zero_at_step = 9500"),
    (pitfalls.judge_annealing, (0.001, 300, 200), "warning", "300 is not reached"),
    (pitfalls.judge_annealing, (0.0, None, 10000), "not applicable", "rate is 0"),
    (pitfalls.judge_mode, ("", "auto", 0.001), "ok", "auto"),
    (pitfalls.judge_mode, ("model", "train", 0.001), "ok", "the biases of model move"),
    (pitfalls.judge_mode, ("model", "auto", 0.001), "warning", "stay as released"),
    (pitfalls.judge_mode, ("", "freeze", 0.001), "warning", "stay 0"),
    (pitfalls.judge_losses, (0.001, 0.0, 0.0), "ok", "none"),
    (pitfalls.judge_losses, (0.001, 1e-4, 0.0), "ok", "sequence_loss_alpha 0.0001"),
    (pitfalls.judge_losses, (0.0, 0.0, 0.001), "ok", "instead of the bias"),
    (pitfalls.judge_losses, (0.001, 0.0, 0.001), "warning", "batch_loss_alpha = 0"),
    (pitfalls.judge_losses, (0.001, 0.1, 0.0), "warning", "DeepSeek-V3 uses 0.0001"),
    (pitfalls.judge_accumulation, (True, 1, 4), "ok", "4 micro-batches"),
    (pitfalls.judge_accumulation, (True, 2, 1), "ok", "ZeRO-2"),
    (pitfalls.judge_accumulation, (True, 2, 4), "warning", "after each of 4"),
    (pitfalls.judge_accumulation, (False, 1, 1), "problem", "managed_gradient_accumulation"),
    (pitfalls.judge_layout, ("packed",), "ok", "none"),
    (pitfalls.judge_layout, ("padded",), "ok", "attention masks"),
    (pitfalls.judge_checkpoints, (500, 10000, None), "ok", "at most 500 steps"),
    (pitfalls.judge_checkpoints, (0, 50, None), "ok", "at most 50 steps"),
    (pitfalls.judge_checkpoints, (0, 10000, None), "warning", "the whole run"),
    (pitfalls.judge_checkpoints, (500, 10000, 2.0), "ok", "up to 17 min"),
    (pitfalls.judge_checkpoints, (500, 10000, 6.0), "warning", "up to 50 min"),
    (pitfalls.judge_groups, (8, {"a": 8, "b": 8}), "ok", "stay within"),
    (pitfalls.judge_groups, (8, {"a": 4, "b": 4}), "warning", "span hosts of 4 ranks"),
    (pitfalls.judge_groups, (8, {"a": 8}), "not applicable", "one host"),
    (pitfalls.judge_bias_types, ({"b": "float32"},), "ok", "in float32"),
    (pitfalls.judge_bias_types, ({"a": "float32", "b": "bfloat16"},), "warning", "1 of 2 are stored as bfloat16"),
    (pitfalls.judge_bias_types, ({},), "not applicable", "no released model"),
    (pitfalls.judge_source, ("texts", False), "problem", "texts does not exist"),
]


@pytest.mark.parametrize(("judge", "facts", "verdict", "words"), JUDGEMENTS)
def test_facts_get_their_verdict(
    judge: Callable[..., Result], facts: tuple[Any, ...], verdict: str, words: str
) -> None:
    check_row(judge, facts, verdict, words)


def config_verdicts(given: Case) -> dict[str, str]:
    results = [r for r in pitfalls.check_configuration(given) if r.verdict in ("warning", "problem")]
    return {result.check.removeprefix("config: "): result.verdict for result in results}


def test_configuration_for_tests_has_no_pitfall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_verdicts(case()) == {}
    assert config_verdicts(case(hosts={"a": 2, "b": 2})) == {}


SOFTMAX = (
    'model.family="mixtral"',
    "model.config={vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_local_experts=8, "
    "num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2}",
)


PITFALLS = [  # overrides, hosts, verdicts
    (
        (
            *SOFTMAX,
            "train.steps=20000",
            "train.global_batch=16",
            "train.checkpoint_interval=0",
            "balance.batch_loss_alpha=0.01",
            "deepspeed.zero_optimization.stage=2",
            "parallel.ep_degree=4",
            'data.source=["nowhere", "python-stdlib"]',
        ),
        {"a": 2, "b": 2},
        {
            "balance.rate": "warning",
            "balance.zero_at_step": "warning",
            "auxiliary losses": "warning",
            "accumulation": "warning",
            "train.checkpoint_interval": "warning",
            "parallel.ep_degree": "warning",
            "data.source": "problem",
        },
    ),
    (
        ("balance.rate=0", "balance.batch_loss_alpha=0.01", "deepspeed.managed_gradient_accumulation=false"),
        {},
        {"balance.rate": "warning", "accumulation": "problem"},
    ),
    ((*SOFTMAX, 'balance.rule="rms"', "balance.zero_at_step=60"), {}, {"balance.zero_at_step": "warning"}),
]


@pytest.mark.parametrize(("overrides", "hosts", "found"), PITFALLS)
def test_pitfalls_of_a_configuration_are_found(
    overrides: tuple[str, ...],
    hosts: dict[str, int],
    found: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_verdicts(case(*overrides, hosts=hosts)) == found


def test_released_model_without_a_mode_and_with_rounded_biases_is_a_pitfall(tmp_path: Path) -> None:
    from transformers import AutoConfig

    given = load_config(TEST_CONFIG).model.config
    AutoConfig.for_model("deepseek_v3", **given).save_pretrained(tmp_path)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file({bias: torch.zeros(8, dtype=torch.bfloat16), "x.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    released = case(f'model.path="{tmp_path}"', "model.config={}", f'run.folder="{tmp_path}/runs"')
    assert config_verdicts(released) == {"balance.mode": "warning", "released biases": "warning"}
    assert pitfalls.bias_types(str(tmp_path)) == {bias: "bfloat16"}


def test_steps_of_the_last_run_give_the_cost_of_a_crash(tmp_path: Path) -> None:
    given = case(f'run.folder="{tmp_path}"', "train.steps=2000", "train.checkpoint_interval=500")
    assert config_verdicts(given) == {}
    directory = tmp_path / "test-2"
    directory.mkdir()
    lines = ['{"step": 1, "step_seconds": 50.0}', *(f'{{"step": {i}, "step_seconds": 5.0}}' for i in (2, 3))]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    assert config_verdicts(given) == {"train.checkpoint_interval": "warning"}


def test_problems_of_loading_are_reported_one_by_one() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(TEST_CONFIG, ["train.stepz=3", "parallel.ep_degree=3"])
    results = list(pitfalls.check_configuration(Case(config_problems=refused.value.problems)))
    assert [r.verdict for r in results] == ["problem"] * len(refused.value.problems)
    assert any("did you mean train.steps?" in r.found for r in results)


def test_without_a_configuration_there_are_no_pitfalls() -> None:
    assert verdicts(pitfalls.check_configuration(Case())) == {"config": "not applicable"}
