"""The tables of docs/families.md, from the installed transformers; `cd tests; python -m support.family_table`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from support.autoep_families import PRESETS
from support.tiny_families import FAMILIES, family_config, family_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alfb_dist import parallelize
from alfb_dist.moe.families.blocks import UNSUPPORTED, moe_blocks
from alfb_dist.moe.routing import SpecRouter
from alfb_dist.pretrained.outputs import plan_outputs

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
NOT_LANGUAGE_ONLY = ["ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "muse_spark", "step3p7"]
"""Model folders with a selection bias and no causal language model of their own."""

HOLDS_BIAS = re.compile(r"e_score_correction_bias|expert_bias")
HOLDS_EXPERTS = re.compile(r"self\.experts\b|e_score_correction_bias|expert_bias")


def sources(pattern: re.Pattern[str]) -> set[str]:
    """The model folders of transformers whose model matches."""
    folder = Path(transformers.__file__).parent / "models"
    return {p.parent.name for p in folder.glob("*/modeling_*.py") if pattern.search(p.read_text())}


def moe_language_models() -> set[str]:
    """The model types with a causal language model whose source has experts; of a composite one its text model only."""
    types, folders = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), sources(HOLDS_EXPERTS)
    return {t for t in types if f"{t}_text" not in types and model_type_to_module_name(t) in folders}


def biased_folders_without_language_model() -> set[str]:
    """Folders whose model carries a selection bias but that no causal language model comes from."""
    covered = {model_type_to_module_name(t) for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return sources(HOLDS_BIAS) - covered


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def trains_mtp(family: str) -> bool:
    """Whether its model has more parameters when asked for one multi-token-prediction layer."""
    known = family_config(family).to_dict()
    keys = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in known]
    with torch.device("meta"):
        built = [AutoModelForCausalLM.from_config(family_config(family, **dict.fromkeys(keys, n))) for n in (0, 1)]
    return len({sum(p.numel() for p in model.parameters()) for model in built}) > 1


def files(family: str) -> str:
    """In which names its files are written and read."""
    with torch.device("meta"):
        template = AutoModelForCausalLM.from_config(family_config(family))
    try:
        plan_outputs(template, set(), "auto")
    except ValueError:
        return "fused only"
    return "released, fused"


def family_row(family: str) -> str:
    """The family's line of the table, from a tiny model of it."""
    model = parallelize(family_model(family), ep_degree=1)
    block: Any = next(iter(moe_blocks(model)))
    names = {module: name for name, module in model.named_modules()}
    names_here = (names[block.holder], names[block.gate])
    holder, gate = (name.removeprefix(block.name).removeprefix(".") for name in names_here)
    experts = block.module.experts
    form = ", ".join(name for name, _ in experts.named_parameters())
    surplus = ", experts without weights" if any(experts.unread_rows.values()) else ""
    return _row(
        [
            f"`{family}`",
            f"`{gate}` {type(block.gate).__name__.removeprefix('Balanced')}",
            f"`{holder}.{block.bias_name}`, ".replace("`.", "`") + ("added" if block.added else "native"),
            f"{form}{surplus}",
            "fast" if experts.part is None else "general",
            "ours" if isinstance(block.gate.router, SpecRouter) else "the family's",
            "yes" if block.gate.spec is not None else "no",
            "in the model" if trains_mtp(family) else "none",
            files(family),
            f"`{PRESETS[family]}`" if family in PRESETS else "no",
            "done",
        ]
    )


def tables() -> Iterator[str]:
    """Every line of the tables."""
    titles = "family|gate|bias|experts|path|routing|auxiliary losses|MTP layers|files|AutoEP|status".split("|")
    yield _row(titles)
    yield _row(["---"] * len(titles))
    yield from (family_row(family) for family in sorted(FAMILIES))
    yield ""
    yield _row(["family", "unsupported, because"])
    yield _row(["---"] * 2)
    yield from (_row([f"`{family}`", reason]) for family, reason in sorted(UNSUPPORTED.items()))
    yield from (_row([f"`{folder}`", "not a causal language model; not tested"]) for folder in NOT_LANGUAGE_ONLY)


START, END = "<!-- tables: made by tests/support/family_table.py -->\n", "<!-- end of tables -->\n"


def written(text: str) -> str:
    """The document with its tables as they should be."""
    before, _, rest = text.partition(START)
    return before + START + "\n".join(tables()) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
