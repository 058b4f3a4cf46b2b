"""BalanceCallback over families that differ in where their bias is and how they route, against the gates' ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.by_hand import counted, moved, same_bits
from support.tiny_families import FAMILIES, batch, biases, family_model, logits_weights_ids, set_biases
from test_trainer_callback import InOrderTrainer, arguments
from torch import Tensor, nn
from transformers import TrainerCallback

from alfb_dist import BalanceCallback
from alfb_dist.moe.families.blocks import moe_blocks

SEQUENCES, POSITIONS, PER_STEP, STEPS, RATE = 12, 6, 4, 3, 0.03
KINDS = {
    "ernie4_5_moe": "bias (1, E) in a part of the gate",
    "minimax_m2": "bias in the block, the family's own routing",
    "lfm2_moe": "bias in the block under another name",
    "longcat_flash": "experts without weights, gate named router",
    "deepseek_v4": "a layer without a bias and one with a bias",
    "nemotron_h": "blocks without attention, groups",
    "qwen3_moe": "no bias, routing is ours",
    "mixtral": "no bias, the family's own routing",
    "gpt_oss": "no bias, ranks logits, softmax over the chosen",
    "gemma4_text": "no bias, gate outside the MLP",
    "llama4_text": "no bias, scores for all experts",
}

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def rows() -> tuple[list[dict[str, Tensor]], Tensor]:
    """Return the sequences, every third of which ends in two of padding, and the mask of their tokens (B, S)."""
    mask_BS = torch.ones(SEQUENCES, POSITIONS, dtype=torch.int64)
    mask_BS[::3, -2:] = 0
    given = batch(7, SEQUENCES, POSITIONS)
    given |= {"attention_mask": mask_BS, "labels": given["labels"].masked_fill(mask_BS == 0, -100)}
    return [{name: x[i] for name, x in given.items()} for i in range(SEQUENCES)], mask_BS.bool()


class Recorded(TrainerCallback):
    """Records the expert ids of each gate in training forwards, step by step, and the biases after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[list[list[Tensor]]] = []
        self.biases: list[list[Tensor]] = []
        self.evaluations = 0
        self.ids: list[list[Tensor]] = []
        for block in moe_blocks(model):
            self.ids.append([])
            block.gate.register_forward_hook(self.hook(self.ids[-1]))

    def hook(self, ids: list[Tensor]) -> Any:
        def record(gate: nn.Module, _: Any, output: Any) -> None:
            if gate.training and torch.is_grad_enabled():
                ids.append(logits_weights_ids(output)[2])
            else:
                self.evaluations += 1

        return record

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.biases.append([bias.detach().flatten().clone() for bias in biases(model)])
        self.steps.append([list(ids) for ids in self.ids])
        for ids in self.ids:
            ids.clear()


@pytest.mark.parametrize("family", KINDS)
def test_bias_is_what_the_rule_makes_of_what_the_gates_chose(tmp_path: Path, family: str) -> None:
    assert family in FAMILIES
    model = family_model(family, 3)
    set_biases(model, 4)
    (data, mask_BS), callback = rows(), BalanceCallback(rate=RATE)
    run = InOrderTrainer(
        model, arguments(tmp_path, max_steps=STEPS), train_dataset=data, eval_dataset=data[:3], callbacks=[callback]
    )
    recorded, expected = Recorded(model), [bias.detach().flatten().clone().numpy() for bias in biases(model)]
    start = expected
    run.add_callback(recorded)
    run.train()
    for step, (by_layer, found) in enumerate(zip(recorded.steps, recorded.biases, strict=True)):
        mask = mask_BS[PER_STEP * step : PER_STEP * (step + 1)]
        loads = [counted(ids, mask, len(bias)) for ids, bias in zip(by_layer, expected, strict=True)]
        expected = [moved(bias, load, RATE) for bias, load in zip(expected, loads, strict=True)]
        for bias, now in zip(expected, found, strict=True):
            assert same_bits(bias, now)
    assert callback.balancer is not None and callback.balancer.load_LE.tolist() == loads
    assert len(recorded.steps) == STEPS and recorded.evaluations > 0 and len(start) > 0
    assert not any(same_bits(a, b) for a, b in zip(start, expected, strict=True))


def test_resumed_training_gets_back_experts_under_the_names_of_a_release(tmp_path: Path) -> None:
    """transformers saves Granite's fused experts as input_linear and output_linear, and cannot load these."""
    data, _ = rows()
    made = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "max_steps": STEPS}
    seen = []
    for seed, where, resumed in ((3, "straight", None), (9, "resumed", tmp_path / "straight" / "checkpoint-2")):
        callback = BalanceCallback(rate=RATE)
        given = arguments(tmp_path / where, **made)
        run = InOrderTrainer(family_model("granitemoe", seed), given, train_dataset=data, callbacks=[callback])
        run.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        seen.append({name: x.clone() for name, x in run.model.state_dict().items()})
    straight, resumed_ = seen
    assert straight.keys() == resumed_.keys() and any(name.endswith("selection_bias") for name in straight)
    for name, x in straight.items():
        assert torch.equal(resumed_[name], x), name
