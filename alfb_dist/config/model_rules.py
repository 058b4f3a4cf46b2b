"""Rules about the model: the keys of its family's configuration class, and sizes that must fit each other.

A value that is not given has the default of the family's configuration class in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alfb_dist.config.keys import EXPERT_NAMES, TOP_K_NAMES, FamilyKeys, family_keys, moe_families
from alfb_dist.config.rules import KINDS, Rule, Settings, UnsettledError, divisible, is_kind, unknown_key
from alfb_dist.config.text import nearest, shown, to_value

# The smallest valid values of sizes and counts.
_LEAST = {
    1: """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim n_group
        topk_group max_position_embeddings"""
    + f" {' '.join(EXPERT_NAMES)} {' '.join(TOP_K_NAMES)}",
    0: "n_shared_experts num_shared_experts first_k_dense_replace num_mtp_layers num_nextn_predict_layers",
}
LEAST = {key: least for least, keys in _LEAST.items() for key in keys.split()}

# Keyword arguments of a transformers configuration that are settings of their own here.
SET_ELSEWHERE = {
    "attn_implementation": "model.attention",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "model_type": "model.family",
}

# Size of the bytes tokenizer: 256 bytes, and one token that ends a document and pads.
BYTES_VOCAB = 257


@dataclass(frozen=True)
class Model:
    """The arguments of a transformers configuration, and the keys of its family."""

    prefix: str
    given: dict[str, Any]
    keys: FamilyKeys | None

    def find(self, *names: str) -> tuple[str, int]:
        """Return (label with the value, value) of the first of `names` that is given, or else of the first default."""
        given = {self.canonical(key): key for key in self.given}
        for name in names:
            if (key := given.get(self.canonical(name))) is not None:
                value = self.given[key]
                if not is_kind(value, "int") or value < 0:
                    raise UnsettledError(key)  # reported by another rule
                return f"{self.prefix}{key} ({value})", value
        for name in names:
            value = self.default(name)
            if is_kind(value, "int"):
                return f"{self.prefix}{name} ({value} by default)", value
        raise UnsettledError(names[0])

    def at_least_1(self, *names: str) -> tuple[str, int]:
        label, value = self.find(*names)
        if value < 1:
            raise UnsettledError(label)  # reported by another rule
        return label, value

    def gives(self, *names: str) -> bool:
        """Return whether one of `names` has a value, valid or not."""
        given = {self.canonical(key) for key, value in self.given.items() if value is not None}
        return any(self.canonical(name) in given or self.default(name) is not None for name in names)

    def default(self, name: str) -> Any:
        defaults = self.keys.defaults if self.keys else {}
        return defaults.get(self.canonical(name), defaults.get(name))

    def canonical(self, name: str) -> str:
        return self.keys.canonical(name) if self.keys else name


def _model(settings: Settings) -> Model:
    path, family, given = settings("model.path"), settings("model.family"), settings("model.config")
    if path and given:
        raise UnsettledError("model.config")  # reported by another rule
    if path:
        nested = settings.pretrained.get("text_config")
        values = nested if isinstance(nested, dict) else settings.pretrained
        return Model("config.json of model.path: ", values, family_keys(str(values.get("model_type", ""))))
    if not given:
        raise UnsettledError("model.config")
    keys = family_keys(family)
    if not _has_experts(keys):
        raise UnsettledError("model.family")  # reported by another rule
    return Model("model.config.", given, keys)


def model_source(settings: Settings) -> Iterator[str]:
    path, given = settings("model.path"), settings("model.config")
    if path and given:
        yield (
            f"model.path ({to_value(path)}) and model.config ({len(given)} keys) are both given: keep model.path "
            "to start from pretrained weights, or model.config to start from random ones"
        )
    if not path and not given:
        yield "model.config is missing: give it to start from random weights, or model.path for pretrained ones"


def model_family(settings: Settings) -> Iterator[str]:
    family = settings("model.family")
    if settings("model.path"):
        return
    keys = family_keys(family)
    if _has_experts(keys):
        return
    near = nearest(family, (name for name in moe_families() if name != family))
    hint = f"; did you mean {shown(near)}?" if near else "; for example deepseek_v3 or glm4_moe"
    fault = "is not a model_type of the installed transformers" if keys is None else "has no routed experts"
    yield f"model.family ({shown(family)}) {fault}{hint}"


def model_keys(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    if model.keys is None or settings("model.path"):
        return
    seen: dict[str, str] = {}
    for key, value in model.given.items():
        path = f"model.config.{key}"
        if key in SET_ELSEWHERE:
            yield f"{path} ({shown(value)}) is set by {SET_ELSEWHERE[key]}: remove it"
        elif key not in model.keys.names:
            yield unknown_key(path, key, sorted(model.keys.names), f"unknown key of {settings('model.family')}")
        elif not _accepts(model.keys.kinds.get(key), value):
            kinds = " or ".join(KINDS[kind] for kind in sorted(model.keys.kinds[key] or ()))
            hint = f": write {value}.0" if is_kind(value, "int") and "a number" in kinds else ""
            yield f"{path} ({shown(value)}) must be {kinds}{hint}"
        if (other := seen.setdefault(model.keys.canonical(key), key)) != key:
            same = f"model.config.{other} ({shown(model.given[other])})"
            yield f"{path} ({shown(value)}) and {same} are the same setting: keep one"


def model_sizes(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    for key, value in model.given.items():
        if is_kind(value, "int") and value < LEAST.get(key, value):
            yield f"{model.prefix}{key} ({value}) must be at least {LEAST[key]}"
    if model.keys is not None and not model.gives(*EXPERT_NAMES):
        yield f"{model.prefix}{_declared_name(model, EXPERT_NAMES)} is missing: give the number of routed experts"
    if model.keys is not None and not model.gives(*TOP_K_NAMES):
        yield f"{model.prefix}{_declared_name(model, TOP_K_NAMES)} is missing: give the number of experts per token"


def expert_choice(settings: Settings) -> Iterator[str]:
    """Top-k must fit into the experts, and into the selected groups (arXiv:2412.19437, eq. 12 to 16)."""
    model = _model(settings)
    experts_label, experts = model.at_least_1(*EXPERT_NAMES)
    top_k_label, top_k = model.at_least_1(*TOP_K_NAMES)
    if top_k > experts:
        yield f"{top_k_label} must be at most {experts_label}"
    group_label, groups = model.at_least_1("n_group")
    chosen_label, chosen = model.at_least_1("topk_group")
    if chosen > groups:
        yield f"{chosen_label} must be at most {group_label}"
    if groups == 1:
        return
    yield from divisible(experts_label, experts, group_label, groups)
    if experts % groups == 0 and experts // groups < 2:
        yield (
            f"{experts_label} must be at least twice {group_label}: a group's score is the sum of its top two; "
            f"take at most {experts // 2} groups"
        )
    available = min(chosen, groups) * (experts // groups)
    if experts % groups == 0 and available < top_k <= experts:
        yield (
            f"{top_k_label} must be at most {chosen_label} x {experts // groups} experts per group = {available}: "
            f"select at least {-(-top_k // (experts // groups))} groups"
        )


def expert_layers(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    if model.given.get("mlp_layer_types") is not None:
        return  # names the MoE layers itself
    dense_label, dense = model.find("first_k_dense_replace")
    layers_label, layers = model.at_least_1("num_hidden_layers")
    if dense >= layers:
        yield f"{dense_label} must be less than {layers_label}: without an MoE layer there is nothing to balance"


def bias_modes(settings: Settings) -> Iterator[str]:
    """A list of bias modes must have one for each MoE layer, if their number is known before the model is built."""
    modes, model = settings("balance.mode"), _model(settings)
    if isinstance(modes, str):
        return
    kinds = model.given.get("mlp_layer_types")
    if isinstance(kinds, list):
        label, layers = f"the sparse layers of {model.prefix}mlp_layer_types", kinds.count("sparse")
    else:
        layers_label, layers = model.at_least_1("num_hidden_layers")
        dense_label, dense = model.find("first_k_dense_replace")
        label, layers = f"{layers_label} minus {dense_label}", layers - dense
    if len(modes) != layers > 0:
        yield f"balance.mode ({len(modes)} modes) must have one mode for each of the {layers} MoE layers: {label}"


def attention_heads(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    label, heads = model.at_least_1("num_attention_heads")
    groups_label, groups = model.at_least_1("num_key_value_heads")
    if heads % groups:
        yield f"{label} must be divisible by {groups_label}: set num_key_value_heads to {heads} or a divisor of it"


def expert_shards(settings: Settings) -> Iterator[str]:
    ep_degree = settings("parallel.ep_degree")
    label, experts = _model(settings).at_least_1(*EXPERT_NAMES)
    yield from divisible(label, experts, f"parallel.ep_degree ({ep_degree})", ep_degree)


def vocabulary(settings: Settings) -> Iterator[str]:
    tokenizer = settings("data.tokenizer")
    label, size = _model(settings).at_least_1("vocab_size")
    if tokenizer == "bytes" and size < BYTES_VOCAB:
        yield f'{label} must be at least {BYTES_VOCAB} for data.tokenizer ("bytes"): 256 bytes and the end of document'


def positions(settings: Settings) -> Iterator[str]:
    length = settings("data.sequence_length")
    label, positions = _model(settings).at_least_1("max_position_embeddings")
    if length > positions:
        yield f"data.sequence_length ({length}) must be at most {label}"


MODEL_RULES: tuple[Rule, ...] = (
    model_source,
    model_family,
    model_keys,
    model_sizes,
    expert_choice,
    expert_layers,
    bias_modes,
    attention_heads,
    expert_shards,
    vocabulary,
    positions,
)


def _has_experts(keys: FamilyKeys | None) -> bool:
    return keys is not None and not keys.names.isdisjoint(EXPERT_NAMES)


def _declared_name(model: Model, names: tuple[str, ...]) -> str:
    return next((name for name in names if model.keys and name in model.keys.kinds), names[0])


def _accepts(kinds: frozenset[str] | None, value: Any) -> bool:
    return kinds is None or ("None" if value is None else type(value).__name__) in kinds
