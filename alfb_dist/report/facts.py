"""The sizes and rules of a run for a reader, found in its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alfb_dist.config.keys import EXPERT_NAMES, TOP_K_NAMES
from alfb_dist.report.wording import count

_FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model", ("path", "family")),
    ("parameters", ("num_parameters",)),
    ("layers", ("num_hidden_layers", "num_layers", "layers_block_type")),
    ("hidden size", ("hidden_size",)),
    ("routed experts", EXPERT_NAMES),
    ("experts per token", TOP_K_NAMES),
    ("shared experts", ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")),
    ("expert-parallel degree", ("ep_degree",)),
    ("ranks", ("world_size",)),
    ("balance rule", ("rule",)),
    ("bias rate", ("rate",)),
    ("steps", ("steps",)),
    ("sequences per step", ("global_batch",)),
    ("sequence length", ("sequence_length",)),
)


def model_facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (label, value) of each fact found in the configuration at any depth; the first of several names counts."""
    leaves = dict(reversed(list(flatten(config))))
    by_name = {path.rsplit(".", 1)[-1]: value for path, value in leaves.items()}
    facts = []
    for label, names in _FACTS:
        value = next((by_name[name] for name in names if by_name.get(name) not in (None, "")), None)
        if value is not None:
            facts.append((label, _shown(label, value)))
    return facts


def _shown(label: str, value: Any) -> str:
    if label == "parameters":
        return count(value)
    return str(len(value) if label == "layers" and isinstance(value, list) else value)  # a list has an entry a layer


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf, in the configuration's order."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
