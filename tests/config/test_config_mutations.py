"""Over 500 damaged configurations, each refused with the key path: values out of range, and random damage."""

from __future__ import annotations

import copy
import random
import string
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alfb_dist.config import TABLES, Config, ConfigError, load_config
from alfb_dist.config.keys import DEEPSPEED_KEYS, ZERO_KEYS, family_keys
from alfb_dist.config.text import to_toml

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
NUM_EACH = 84  # of five kinds of random damage

BASE = load_config(
    DEMO,
    [
        "balance.zero_at_step=150",
        "balance.warmup_steps=10",
        "data.validation_source=['b']",
        "model.config.hidden_act=silu",
        "deepspeed.steps_per_print=10",
        "deepspeed.zero_optimization.overlap_comm=true",
    ],
).model_dump()
REQUIRED = "optimizer.lr data.source data.sequence_length train.steps train.global_batch train.micro_batch".split()
OUT_OF_RANGE: dict[str, list[Any]] = {
    "run.name": ["", "a/b", "..", "-x", "a b", "x" * 101],
    "run.folder": [""],
    "run.seed": [-1, 2**32],
    "run.timeout_seconds": [0.0, -1.0, float("inf"), float("nan")],
    "model.attention": ["flash", ""],
    "model.dtype": ["bf16", "float16"],
    "parallel.ep_degree": [0, -2],
    "balance.rule": ["sgn", "SIGN", "quantile"],
    "balance.rate": [-0.001, 1.5, float("nan")],
    "balance.warmup_steps": [-1],
    "balance.zero_at_step": [0, -1],
    "balance.sequence_loss_alpha": [-0.1, 2.0],
    "balance.batch_loss_alpha": [-0.1],
    "optimizer.lr": [0.0, -1e-3, float("inf")],
    "optimizer.betas": [[0.9, 1.0], [-0.1, 0.9], [0.9], [0.9, 0.95, 0.99]],
    "optimizer.eps": [0.0, -1e-8],
    "optimizer.weight_decay": [-0.1],
    "optimizer.clip": [-1.0],
    "optimizer.warmup_steps": [-1],
    "optimizer.schedule": ["linear"],
    "optimizer.min_lr_ratio": [-0.1, 1.1],
    "data.source": [[], [""]],
    "data.tokenizer": [""],
    "data.sequence_length": [1, 0, -4, 2**25],
    "data.layout": ["pack"],
    "data.validation_fraction": [0.0, 1.0, -0.5],
    "data.cache": [""],
    "train.steps": [0, -5],
    "train.global_batch": [0, -16],
    "train.micro_batch": [0, -1],
    "train.activation_checkpointing": ["full", "non_reentrant"],
    "train.eval_interval": [-1],
    "train.eval_sequences": [0],
    "train.checkpoint_interval": [-1],
    "train.keep_checkpoints": [0],
    "train.max_skipped_steps": [0],
    "report.log_interval": [0],
    "report.wandb": ["on"],
    "report.wandb_project": [""],
    "model.config.vocab_size": [0, 256],
    "model.config.hidden_size": [0, -128],
    "model.config.num_hidden_layers": [0],
    "model.config.n_routed_experts": [0, -16],
    "model.config.num_experts_per_tok": [0, 17],
    "model.config.n_group": [0],
    "model.config.topk_group": [0, 2],
    "model.config.first_k_dense_replace": [-1, 4, 5],
    "model.config.n_shared_experts": [-1],
    "deepspeed.zero_optimization.stage": [3, -1, 4],
}
INDIVISIBLE: dict[str, Callable[[random.Random], int]] = {
    "model.config.n_routed_experts": lambda rng: rng.randrange(5, 200, 2),
    "train.global_batch": lambda rng: 16 * rng.randrange(1, 50) + rng.randrange(1, 16),
    "parallel.ep_degree": lambda rng: rng.choice([3, 5, 6, 7]),
    "model.config.n_group": lambda rng: rng.choice([3, 5, 6, 7]),
    "model.config.num_key_value_heads": lambda rng: rng.choice([3, 5, 8]),
}

# The damaged tables, the key path that a line of the message has to name, and what else this line has to hold.
Mutation = tuple[dict[str, Any], str, str]
Mutate = Callable[[dict[str, Any], random.Random], Mutation]


def leaves(tables: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def parent_of(tables: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parents, key = path.split(".")
    for parent in parents:
        tables = tables[parent]
    return tables, key


def valid_names(parent: str) -> set[str]:
    if parent == "model.config":
        keys = family_keys("deepseek_v3")
        assert keys is not None
        return set(keys.names)
    names = {
        "": set(Config.model_fields),
        "deepspeed": set(DEEPSPEED_KEYS),
        "deepspeed.zero_optimization": set(ZERO_KEYS),
    }
    return names.get(parent) or set(TABLES[parent].model_fields)


def typo(name: str, taken: set[str], rng: random.Random) -> str:
    while True:
        at = rng.randrange(len(name))
        letter = rng.choice(string.ascii_lowercase)
        wrong = rng.choice(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
            ]
        )
        if wrong and wrong not in taken:
            return wrong


def misspell_key(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice([*leaves(tables), *TABLES, "deepspeed.zero_optimization"])
    parent, key = parent_of(tables, path)
    prefix = path.removesuffix(key).removesuffix(".")
    wrong = typo(key, valid_names(prefix), rng)
    parent[wrong] = parent.pop(key)
    return tables, f"{prefix}.{wrong}".removeprefix("."), key


def wrong_type(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice(list(leaves(tables)))
    parent, key = parent_of(tables, path)
    others: list[tuple[type, list[Any]]] = [
        (bool, [1, "true", [True]]),
        (int, ["3", 1.5, True, [1]]),
        (float, ["0.1", True, [0.1]]),
        (str, [3, True, ["x"], {"a": 1}]),
        (tuple, ["x", 3, {"a": 1}, [["x"]]]),
    ]
    parent[key] = rng.choice(next(values for kind, values in others if isinstance(parent[key], kind)))
    return tables, path, ""


def indivisible(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice(list(INDIVISIBLE))
    parent, key = parent_of(tables, path)
    parent[key] = INDIVISIBLE[path](rng)
    return tables, path, f"({parent[key]})"


def drop_required(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice([*REQUIRED, "model.config", "model", "optimizer", "data", "train"])
    parent, key = parent_of(tables, path)
    del parent[key]
    return tables, path, "is missing"


def move_to_wrong_table(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice([path for path in leaves(tables) if path.split(".")[0] in TABLES])
    parent, key = parent_of(tables, path)
    target = rng.choice([name for name in TABLES if key not in TABLES[name].model_fields])
    tables[target][key] = parent.pop(key)
    return tables, f"{target}.{key}", path


MUTATIONS = (misspell_key, wrong_type, indivisible, drop_required, move_to_wrong_table)


def test_damaged_configurations_are_over_500() -> None:
    assert NUM_EACH * len(MUTATIONS) + sum(map(len, OUT_OF_RANGE.values())) > 500


def test_unmutated_configuration_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(BASE), encoding="utf-8")
    assert load_config(file, world_size=2).model_dump() == BASE


@pytest.mark.parametrize("path", OUT_OF_RANGE)
def test_every_value_out_of_range_is_refused(path: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    for value in OUT_OF_RANGE[path]:
        tables = copy.deepcopy(BASE)
        parent, key = parent_of(tables, path)
        parent[key] = value
        file.write_text(to_toml(tables), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(file, world_size=2)
        assert any(line.startswith(path) or f" {path} (" in line for line in caught.value.problems), str(caught.value)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mutated_configuration_is_refused_with_its_key_path(mutate: Mutate, tmp_path: Path) -> None:
    rng = random.Random(f"alfb_dist {mutate.__name__}")
    file = tmp_path / "config.toml"
    for _ in range(NUM_EACH):
        tables, path, hint = mutate(copy.deepcopy(BASE), rng)
        text = to_toml(tables)
        tomllib.loads(text)  # valid TOML: the configuration is what is refused
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(file, world_size=2)
        lines = [line for line in caught.value.problems if path in line]
        assert any(hint in line.replace(path, "", 1) for line in lines), f"{path}, {hint!r}: {caught.value}"
