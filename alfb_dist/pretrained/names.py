"""The names of a model's tensors, and transformers' own tables for converting the names in files to them.

In files, experts are either fused as in the model, (E, rows, D), or one by one under names with the expert's number.
transformers' tables have each family's names. Of their conversions, renaming, stacking experts and concatenating rows
are supported; a family that needs another is refused.
"""

from __future__ import annotations

from typing import Any

from transformers import conversion_mapping as tables
from transformers import core_model_loading as conversions

from alfb_dist.moe.families.blocks import BIAS_NAMES, moe_blocks, num_choices

Shape = tuple[int, ...]


def shapes_of(template: Any) -> dict[str, Shape]:
    """Return the shape of every saved tensor of a model, by name in its order; of tied ones only the source."""
    tied = template.all_tied_weights_keys
    return {name: tuple(x.shape) for name, x in template.state_dict().items() if name not in tied}


def added_shapes(template: Any) -> dict[str, Shape]:
    """Return the shapes of the selection biases that balancing adds to the family's own model, by name."""
    names = {id(module): name for name, module in template.named_modules()}
    added = [block for block in moe_blocks(template) if block.added and not hasattr(block.holder, block.bias_name)]
    return {f"{names[id(block.holder)]}.{block.bias_name}": (num_choices(block.gate, None),) for block in added}


def is_bias(name: str) -> bool:
    """Return whether a tensor of this name is a selection bias."""
    return name.rpartition(".")[2] in BIAS_NAMES


def float32_names(model: Any, dtype: Any) -> set[str]:
    """Return the names of the tensors that are always float32: biases, and those of the family's own list."""
    plan = model._get_dtype_plan(dtype)
    family = conversions.build_glob_alternation(list(plan))[0] if plan else None
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return {name for name in names if is_bias(name) or (family is not None and family.search(name) is not None)}


def expert_counts(template: Any) -> dict[str, int]:
    """Return the number of experts of each expert tensor, by name. Rows beyond belong to none (LongCat)."""
    return {
        f"{block.name}.experts.{name}": block.num_experts
        for block in moe_blocks(template)
        for name, _ in block.module.experts.named_parameters()
    }


def family_tables(template: Any, *, legacy: bool) -> tuple[list[Any], list[Any]]:
    """Return (renamings, converters) of a model's family. legacy: include those of old files, for reading."""
    found = tables.get_model_conversion_mapping(template, add_legacy=legacy)
    if not legacy:  # as transformers does when it saves a model that was not loaded
        found = [x for x in found if not isinstance(x, conversions.PrefixChange)]
    renamings = [x for x in found if isinstance(x, conversions.WeightRenaming)]
    return renamings, [x for x in found if isinstance(x, conversions.WeightConverter)]


def plain_name(pattern: str) -> str:
    """Return the name, or the end of one, that a pattern of these tables matches; `*` is an expert's number."""
    return pattern.replace("\\.", ".")


_SUPPORTED = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)], [("Concatenate", 0)])


def is_supported(converter: Any) -> bool:
    """Return whether a converter stacks experts, concatenates rows, or concatenates and then stacks."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    plain = all(getattr(step, "num_shards_attribute", None) is None for step in converter.operations)
    joins = len(converter.source_patterns) > 1
    return plain and steps in _SUPPORTED and joins == (steps[-1][0] == "Concatenate")


def stacks_experts(converter: Any) -> bool:
    """Return whether a supported converter stacks experts."""
    return type(converter.operations[0]).__name__ == "MergeModulelist"
