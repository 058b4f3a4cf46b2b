"""The keys of DeepSpeed and of transformers' model families, without importing either: a mistake is reported at once.

Those of DeepSpeed 0.19 are listed here; a test compares them with the installed package. Those of a family are read
from the source of its configuration class, so they are those of the installed release.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# DeepSpeed's top-level keys by the kind of their values.
_DEEPSPEED = {
    "bool": """dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation
        memory_breakdown prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer""",
    "int": "sequence_parallel_size steps_per_print vocabulary_size",
    "float": "gradient_predivide_factor",
    "str": "communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type",
    "table": """activation_checkpointing aio autotuning checkpoint comet comms_logger compile csv_monitor
        data_efficiency data_types datastates_ckpt flops_profiler hybrid_engine pipeline tensor_parallel tensorboard
        timers torch_autocast wandb weight_quantization zero_optimization""",
}
DEEPSPEED_KEYS = {key: kind for kind, keys in _DEEPSPEED.items() for key in keys.split()}

# DeepSpeed keys that alfb_dist sets itself, and the setting that each follows from.
DERIVED_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "the table [optimizer]",
    "scheduler": "optimizer.schedule",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "expert_parallel": "parallel.ep_degree (alfb_dist shards the experts itself)",
}

# Keys of deepspeed.zero_optimization by kind. Those of stage 3 are known with and without the prefix stage3_.
_ZERO = {
    "int": "stage allgather_bucket_size reduce_bucket_size sub_group_size zero_hpz_partition_size",
    "bool": """allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
        cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters legacy_stage1
        load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear overlap_comm override_module_apply
        parameter_alignment pipeline_loading_checkpoint reduce_scatter round_robin_gradients
        save_muon_momentum_buffer_in_memory stage3_gather_fp16_weights_on_model_save use_multi_rank_bucket_allreduce
        zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights""",
    "table": "leaf_module offload_optimizer offload_param zenflow",
}
_ZERO_3 = {
    "int": """max_live_parameters max_reuse_distance model_persistence_threshold module_granularity_threshold
        param_persistence_threshold prefetch_bucket_size""",
    "bool": "allgather_sequential gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params",
}
ZERO_KEYS = {key: kind for kind, keys in _ZERO.items() for key in keys.split()} | {
    prefix + key: kind for kind, keys in _ZERO_3.items() for key in keys.split() for prefix in ("", "stage3_")
}

# The families' names for the number of routed experts, and of experts per token.
EXPERT_NAMES = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")

# Keyword arguments that every configuration class accepts besides its own fields.
_COMMON = ("architectures", "rope_scaling", "rope_theta", "partial_rotary_factor", "transformers_version")


@dataclass(frozen=True)
class FamilyKeys:
    """What a transformers configuration class declares.

    kinds: the type names that each field accepts ("int", "None", ...), or None if its annotation holds anything else.
    defaults: the literal defaults. synonyms: other names of a field. extras: further accepted names.
    """

    kinds: dict[str, frozenset[str] | None]
    defaults: dict[str, Any]
    synonyms: dict[str, str]
    extras: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.kinds) | self.extras | frozenset(self.synonyms) | frozenset(self.synonyms.values())

    def canonical(self, name: str) -> str:
        return self.synonyms.get(name, name)


@lru_cache(maxsize=8)
def family_keys(family: str) -> FamilyKeys | None:
    """Return the keys of the configuration class with `model_type == family`, or None if transformers has none."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", family):
        return None  # must not lead to another directory
    directories = [family, family.replace("-", "_"), family.removesuffix("_text")]
    for directory in dict.fromkeys(directories):
        for path in sorted((_models_directory() / directory).glob("configuration_*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and _assigned(node).get("model_type") == family:
                    return _declared(node)
    return None


def moe_families() -> list[str]:
    """Return the names of the model families with a number of experts, for suggestions."""
    pattern = re.compile(rf"^    ({'|'.join(EXPERT_NAMES)}): ", re.MULTILINE)
    sources = sorted(_models_directory().glob("*/configuration_*.py"))
    return [path.parent.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))]


def _models_directory() -> Path:
    spec = importlib.util.find_spec("transformers")  # finds the package, does not import it
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("transformers is not installed: install alfb_dist with its dependencies")
    return Path(spec.submodule_search_locations[0]) / "models"


def _declared(node: ast.ClassDef) -> FamilyKeys:
    kinds: dict[str, frozenset[str] | None] = {}
    defaults = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            kinds[name] = _kinds(statement.annotation)
            if statement.value is not None:
                try:
                    defaults[name] = ast.literal_eval(statement.value)
                except ValueError:
                    continue  # an expression: no rule reads such a default
    synonyms = _assigned(node).get("attribute_map", {})
    extras = set(_COMMON) | set(re.findall(r"kwargs\.(?:pop|get)\('(\w+)'", ast.unparse(node)))
    return FamilyKeys(kinds, defaults, synonyms, frozenset(extras))


def _assigned(node: ast.ClassDef) -> dict[str, Any]:
    values = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                values[statement.targets[0].id] = ast.literal_eval(statement.value)
            except ValueError:
                continue
    return values


def _kinds(annotation: ast.expr) -> frozenset[str] | None:
    """Return the type names in a union such as `int | list[int] | None`, or None if it holds anything else."""
    if isinstance(annotation, ast.BinOp):
        left, right = _kinds(annotation.left), _kinds(annotation.right)
        return None if left is None or right is None else left | right
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return frozenset({"None"})
    if isinstance(annotation, ast.Name) and annotation.id in ("bool", "int", "float", "str", "list", "dict"):
        return frozenset({annotation.id})
    return None
