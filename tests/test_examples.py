"""docs/examples.md runs as it stands, on tiny models; and which tokens count is as its table says."""

from __future__ import annotations

import json
import os
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import biases, expected_load, gates, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from alfb_dist.cli import main
from alfb_dist.config import load_config
from alfb_dist.engine.balancer import Balancer
from alfb_dist.engine.initialize import quiet, start_without_compiler
from alfb_dist.training.loop import train
from alfb_dist.training.run import start

PAGE = (Path(__file__).parent.parent / "docs" / "examples.md").read_text()


def block(heading: str, language: str) -> str:
    """The code of a section."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", section, re.S)
    assert len(found) == 1, f"{heading} has {len(found)} {language} blocks"
    return found[0]


def released(folder: Path) -> Tensor:
    """A tiny model in transformers' form, its biases far from 0."""
    model = tiny_model(3)
    set_biases(model, random_biases(model, 4) + 8)
    model.save_pretrained(folder)
    return biases(model)


def execute(heading: str, folder: str) -> dict[str, Any]:
    """What a block leaves in its variables: biases and loads."""
    warnings.simplefilter("ignore")
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.chdir(folder)
    start_without_compiler()
    quiet(40)
    one = {name: x[0] for name, x in tiny_batch(1, 1, 6).items()}
    batches = [tiny_batch(10 * i + dist.get_rank(), 2, 6) for i in range(4)]
    names: dict[str, Any] = {"batches": batches, "rows": [one] * 32}
    exec(compile(block(heading, "python"), heading, "exec"), names)
    if "trainer" in names:
        callback = next(c for c in names["trainer"].callback_handler.callbacks if hasattr(c, "balancer"))
        names["balancer"] = callback.balancer
    balancer = names["balancer"]
    return {"steps": balancer.num_steps, "bias": balancer.bias_LE, "load": balancer.load_LE}


BLOCKS = {"Continue a released model": 2, "transformers' Trainer": 4, "DeepSpeed's AutoEP": 2, "LoRA": 0}


@pytest.mark.parametrize(("heading", "steps"), BLOCKS.items())
def test_block_runs_on_two_ranks_and_moves_the_bias(
    heading: str, steps: int, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    start_LE = released(tmp_path / "released-model")
    if "recentre" in block(heading, "python"):
        start_LE = (start_LE.double() - start_LE.double().mean(-1, keepdim=True)).float()
    first, second = ranks(2, execute, heading, str(tmp_path))
    assert first["steps"] == steps and torch.equal(first["bias"], second["bias"])
    tokens = 2 * 2 * 2 * 6  # ranks, micro-batches, sequences, positions
    assert first["load"].sum(1).tolist() == ([tokens * 4] * 2 if steps else [0, 0])
    assert (first["bias"] - start_LE).abs().max().item() == pytest.approx(1e-3 * steps, rel=0.5, abs=1e-6)
    if "save_pretrained" in block(heading, "python"):
        written: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "trained-model")
        assert torch.equal(biases(written), first["bias"])


def small_config(folder: str, model: str = "") -> Any:
    """The page's configuration, with tiny steps and texts of our own. model: a line in place of its model's tables."""
    toml = block("Pretrain from a configuration", "toml")
    if model:
        toml = re.sub(r"\[model\].*?\[parallel\]", f"[model]\n{model}\n[parallel]", toml, flags=re.S)
    if dist.get_rank() == 0:
        Path(folder, "run.toml").write_text(toml)
        for name in ("a.txt", "b.txt"):
            Path(folder, name).write_text(f"{name}: a bias for every expert\n" * 200)
    dist.barrier()  # a rank must not read what another is about to write
    small = ["train.steps=2", "train.global_batch=4", "train.micro_batch=1", "data.sequence_length=16"]
    places = [f"run.folder='{folder}/runs'", f"data.cache='{folder}/cache'", f"data.source=['{folder}']"]
    silent = ["report.progress=false", "report.wandb='disabled'", "report.html=false", "train.eval_sequences=2"]
    return load_config(Path(folder, "run.toml"), [*small, *places, *silent], world_size=dist.get_world_size())


def pretrain(folder: str) -> int:
    return train(small_config(folder))


def test_pretraining_runs_from_the_configuration(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert ranks(2, pretrain, str(tmp_path)) == [0, 0]
    lines = (tmp_path / "runs" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line)["step"] == 2 for line in lines)


def go_on(folder: str) -> tuple[list[str], list[str], Tensor]:
    run = start(small_config(folder, f"path = '{folder}/released-model'"))
    run.engine.backward(run.engine(**tiny_batch(1, 1, 6)).loss)
    run.engine.step()
    run.engine.backward(run.engine(**tiny_batch(2, 1, 6)).loss)
    run.engine.step()
    assert run.balancer.step() and run.balancer.load_LE.any()
    return run.messages, run.balancer.modes, run.balancer.bias_LE


def test_run_from_a_released_model_leaves_its_biases_and_says_so(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    model = tiny_model(3, vocab_size=320)
    set_biases(model, random_biases(model, 4) + 8)
    model.save_pretrained(tmp_path / "released-model")
    for notes, modes, bias_LE in ranks(2, go_on, str(tmp_path)):
        assert any("stay as released" in note and "balance.mode" in note for note in notes)
        assert modes == ["freeze"] * 2 and torch.equal(bias_LE, biases(model))


def test_commands_do_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released(tmp_path / "released-model")
    monkeypatch.chdir(tmp_path)
    lines = block("Inspect, compare and convert models", "sh").splitlines()
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "alfb" and main(words) == 0, line
    assert len(lines) == 6 and (tmp_path / "trained-model" / "config.json").is_file()


# Which tokens count.


def load_of(batch: dict[str, Tensor]) -> Tensor:
    model = tiny_model(3)
    balancer = Balancer(model)
    model(**batch).loss.backward()
    balancer.step()
    return balancer.load_LE


def test_prompt_tokens_count() -> None:
    batch = tiny_batch(1, 2, 6)
    batch["labels"][:, :4] = -100
    assert torch.equal(load_of(batch), expected_load(tiny_model(3), tiny_batch(1, 2, 6)))
    assert load_of(batch).sum(1).tolist() == [2 * 6 * 4] * 2


def test_padding_counts_only_where_no_mask_tells_of_it() -> None:
    batch = tiny_batch(1, 2, 6, padding=[2, 3])
    assert load_of(batch).sum(1).tolist() == [7 * 4] * 2
    unmasked = {name: x for name, x in batch.items() if name != "attention_mask"}
    assert load_of(unmasked).sum(1).tolist() == [12 * 4] * 2
    seen = torch.ones(6, 6, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None, :]
    whole = {**unmasked, "attention_mask": torch.zeros(2, 1, 6, 6).masked_fill(~seen, -1e9)}
    assert load_of(whole).sum(1).tolist() == [12 * 4] * 2


def test_all_of_a_packed_sequence_counts() -> None:
    batch = tiny_batch(1, 1, 12)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    assert load_of(batch).sum(1).tolist() == [12 * 4] * 2


def test_bias_of_a_model_without_a_balancer_stays() -> None:
    model: nn.Module = tiny_model(3)
    model(**tiny_batch(1, 2, 6)).loss.backward()
    assert not biases(model).any() and len(gates(model)) == 2
