"""Rules between settings: each is a generator of problems, one line each with key paths, values and what to do.

A rule asks for its settings through `Settings`; where one of them is itself wrong or missing the rule stays silent,
so that one mistake is reported once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from alfb_dist.config_keys import (
    DEEPSPEED_KEYS,
    DERIVED_KEYS,
    EXPERT_NAMES,
    TOP_K_NAMES,
    ZERO_KEYS,
    FamilyKeys,
    family_keys,
    moe_families,
)
from alfb_dist.config_text import nearest

# Sizes and counts of a model that have to be at least 1, and those that may be 0.
SIZES = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim n_group
    topk_group max_position_embeddings""".split()
COUNTS = "n_shared_experts num_shared_experts first_k_dense_replace num_mtp_layers num_nextn_predict_layers".split()

# Keyword arguments of a transformers configuration that have a key of their own here.
SET_ELSEWHERE = {
    "attn_implementation": "model.attention",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "model_type": "model.family",
}

# Token ids of the bytes tokenizer: 0..255 are bytes, 256 ends a document and pads.
BYTES_VOCAB = 257


class UnsettledError(Exception):
    """Raised where a rule asks for a setting that is missing or already reported."""


@dataclass(frozen=True)
class Settings:
    """The resolved tables, and the dotted paths in them that must not be relied on.

    pretrained: config.json of `model.path`, where that was read.
    """

    tables: dict[str, Any]
    bad: frozenset[str] = frozenset()
    world_size: int | None = None
    pretrained: dict[str, Any] = field(default_factory=dict)

    def __call__(self, path: str) -> Any:
        table, _, key = path.partition(".")
        try:
            if table in self.bad or path in self.bad:
                raise UnsettledError(path)
            return self.tables[table][key] if key else self.tables[table]
        except (KeyError, TypeError):
            raise UnsettledError(path) from None


@dataclass(frozen=True)
class Model:
    """The arguments of a transformers configuration, completed by its family's defaults."""

    prefix: str
    given: dict[str, Any]
    keys: FamilyKeys | None

    def find(self, *names: str) -> tuple[str, int]:
        """Return (label with the value, value) of the first of `names` that is given, or else has a default."""
        given = {self.canonical(key): key for key in self.given}
        for name in names:
            if (key := given.get(self.canonical(name))) is not None:
                value = self.given[key]
                if not _is(value, "int") or value < 0:
                    raise UnsettledError(key)  # a problem of its own
                return f"{self.prefix}{key} ({value})", value
        for name in names:
            value = self.default(name)
            if _is(value, "int"):
                return f"{self.prefix}{name} ({value} by default)", value
        raise UnsettledError(names[0])

    def at_least_1(self, *names: str) -> tuple[str, int]:
        label, value = self.find(*names)
        if value < 1:
            raise UnsettledError(label)  # a problem of its own
        return label, value

    def gives(self, *names: str) -> bool:
        """Whether one of `names` has a value, right or wrong."""
        given = {self.canonical(key) for key, value in self.given.items() if value is not None}
        return any(self.canonical(name) in given or self.default(name) is not None for name in names)

    def default(self, name: str) -> Any:
        defaults = self.keys.defaults if self.keys else {}
        return defaults.get(self.canonical(name), defaults.get(name))

    def canonical(self, name: str) -> str:
        return self.keys.canonical(name) if self.keys else name


def problems(settings: Settings) -> list[str]:
    """Return one line per broken rule; empty if the configuration holds together."""
    lines: list[str] = []
    for rule in RULES:
        # Line by line: a rule may find a problem before it asks for a setting that is not there.
        with contextlib.suppress(UnsettledError):
            for line in rule(settings):
                lines.append(line)
    return lines


def _is(value: Any, kind: str) -> bool:
    """Whether a value is of a kind named in config_keys; DeepSpeed and TOML users write 5e8 for an int."""
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    if kind == "float":
        return isinstance(value, int | float)
    return isinstance(value, {"int": int, "str": str, "table": dict}[kind])


def _divisible(of: str, value: int, by: str, divisor: int) -> Iterator[str]:
    if value % divisor:
        below, above = value - value % divisor, value - value % divisor + divisor
        advice = f"take {below} or {above}" if below else f"take {above}"
        yield f"{of} must be divisible by {by}: {advice}"


def _model(settings: Settings) -> Model:
    path, family, given = settings("model.path"), settings("model.family"), settings("model.config")
    if path and given:
        raise UnsettledError("model.config")  # a problem of its own
    if path:
        nested = settings.pretrained.get("text_config")
        values = nested if isinstance(nested, dict) else settings.pretrained
        return Model("config.json of model.path: ", values, family_keys(str(values.get("model_type", ""))))
    if not given:
        raise UnsettledError("model.config")
    return Model("model.config.", given, family_keys(family))


def model_source(settings: Settings) -> Iterator[str]:
    path, given = settings("model.path"), settings("model.config")
    if path and given:
        yield (
            f"model.path ({path!r}) and model.config ({len(given)} keys) are both given: keep the path to go on from "
            "pretrained weights, or the config to start from random ones"
        )
    if not path and not given:
        yield "model.config is missing: give [model.config] to start from random weights, or model.path to go on"


def model_family(settings: Settings) -> Iterator[str]:
    family = settings("model.family")
    if settings("model.path"):
        return
    keys = family_keys(family)
    if keys is not None and keys.names.intersection(EXPERT_NAMES):
        return
    near = nearest(family, (name for name in moe_families() if name != family))
    hint = f"; did you mean {near!r}?" if near else "; for example 'deepseek_v3' or 'glm4_moe'"
    fault = "is no model_type of the installed transformers" if keys is None else "declares no routed experts"
    yield f"model.family ({family!r}) {fault}{hint}"


def model_keys(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    if model.keys is None or settings("model.path"):
        return
    seen: dict[str, str] = {}
    for key, value in model.given.items():
        path = f"model.config.{key}"
        if key in SET_ELSEWHERE:
            yield f"{path} ({value!r}) is set by {SET_ELSEWHERE[key]}: remove it"
        elif key not in model.keys.names:
            yield _unknown(path, key, sorted(model.keys.names), f"of {settings('model.family')}")
        elif not _accepts(model.keys.kinds.get(key), value):
            kinds = " or ".join(sorted(model.keys.kinds[key] or ())).replace("None", '"null"')
            hint = f": write {value}.0" if _is(value, "int") and "float" in kinds else ""
            yield f"{path} ({value!r}) must be {kinds}{hint}"
        if (other := seen.setdefault(model.keys.canonical(key), key)) != key:
            yield f"{path} ({value!r}) and model.config.{other} ({model.given[other]!r}) are one setting: keep one"


def model_sizes(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    for names, least in ((SIZES, 1), (EXPERT_NAMES, 1), (TOP_K_NAMES, 1), (COUNTS, 0)):
        for key in names:
            value = model.given.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                yield f"{model.prefix}{key} ({value}) must be at least {least}"
    if model.keys is not None and not model.gives(*EXPERT_NAMES):
        yield f"{model.prefix}{_declared_name(model, EXPERT_NAMES)} is missing: give the number of routed experts"
    if model.keys is not None and not model.gives(*TOP_K_NAMES):
        yield f"{model.prefix}{_declared_name(model, TOP_K_NAMES)} is missing: give the number of experts a token"


def expert_choice(settings: Settings) -> Iterator[str]:
    """Top-k within the experts, and within the chosen groups (arXiv:2412.19437: a group's score sums its top two)."""
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
    yield from _divisible(experts_label, experts, group_label, groups)
    if experts % groups == 0 and experts // groups < 2:
        yield (
            f"{experts_label} must be at least twice {group_label}: a group is scored by its two best experts; "
            f"take at most {experts // 2} groups"
        )
    available = min(chosen, groups) * (experts // groups)
    if experts % groups == 0 and available < top_k <= experts:
        yield (
            f"{top_k_label} must be at most {chosen_label} x {experts // groups} experts a group = {available}: "
            f"choose at least {-(-top_k // (experts // groups))} groups"
        )


def expert_layers(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    if model.given.get("mlp_layer_types") is not None:
        return  # says itself which layers are sparse
    dense_label, dense = model.find("first_k_dense_replace")
    layers_label, layers = model.at_least_1("num_hidden_layers")
    if dense >= layers:
        yield f"{dense_label} must be less than {layers_label}: without a layer of experts there is nothing to balance"


def attention_heads(settings: Settings) -> Iterator[str]:
    model = _model(settings)
    label, heads = model.at_least_1("num_attention_heads")
    groups_label, groups = model.at_least_1("num_key_value_heads")
    if heads % groups:
        yield f"{label} must be divisible by {groups_label}: set num_key_value_heads to {heads} or a divisor of it"


def expert_shards(settings: Settings) -> Iterator[str]:
    ep_degree = settings("parallel.ep_degree")
    label, experts = _model(settings).at_least_1(*EXPERT_NAMES)
    yield from _divisible(label, experts, f"parallel.ep_degree ({ep_degree})", ep_degree)


def vocabulary(settings: Settings) -> Iterator[str]:
    tokenizer = settings("data.tokenizer")
    label, size = _model(settings).at_least_1("vocab_size")
    if tokenizer == "bytes" and size < BYTES_VOCAB:
        yield f"{label} must be at least {BYTES_VOCAB} for data.tokenizer ('bytes'): 256 bytes and the end of document"


def positions(settings: Settings) -> Iterator[str]:
    length = settings("data.sequence_length")
    label, positions = _model(settings).at_least_1("max_position_embeddings")
    if length > positions:
        yield f"data.sequence_length ({length}) must be at most {label}"


def world(settings: Settings) -> Iterator[str]:
    ep_degree, size = settings("parallel.ep_degree"), settings.world_size
    if size is not None and size % ep_degree:
        yield f"the number of ranks ({size}) must be divisible by parallel.ep_degree ({ep_degree})"


def batch(settings: Settings) -> Iterator[str]:
    """The global batch splits evenly over ranks; before their number is known, over those of one expert group."""
    total, micro = settings("train.global_batch"), settings("train.micro_batch")
    if settings.world_size is not None:
        ranks, label = settings.world_size, f"the number of ranks ({settings.world_size})"
    else:
        ranks = settings("parallel.ep_degree")
        label = f"parallel.ep_degree ({ranks})"
    by = f"train.micro_batch ({micro}) x {label} = {micro * ranks}"
    yield from _divisible(f"train.global_batch ({total})", total, by, micro * ranks)


def balance_schedule(settings: Settings) -> Iterator[str]:
    zero_at, warmup = settings("balance.zero_at_step"), settings("balance.warmup_steps")
    if zero_at is not None and zero_at <= warmup:
        yield f"balance.zero_at_step ({zero_at}) must be greater than balance.warmup_steps ({warmup})"


def lr_schedule(settings: Settings) -> Iterator[str]:
    warmup, steps = settings("optimizer.warmup_steps"), settings("train.steps")
    if warmup > steps:
        yield f"optimizer.warmup_steps ({warmup}) must be at most train.steps ({steps})"


def deepspeed_keys(settings: Settings) -> Iterator[str]:
    for key, value in settings("deepspeed").items():
        path = f"deepspeed.{key}"
        if key in DERIVED_KEYS:
            yield f"{path} ({value!r}) is derived: remove it and set {DERIVED_KEYS[key]}"
        elif key not in DEEPSPEED_KEYS:
            yield _unknown(path, key, sorted(DEEPSPEED_KEYS), "of DeepSpeed")
        elif value is not None and not _is(value, DEEPSPEED_KEYS[key]):
            yield f"{path} ({value!r}) must be a {DEEPSPEED_KEYS[key]}"


def deepspeed_zero(settings: Settings) -> Iterator[str]:
    zero = settings("deepspeed").get("zero_optimization")
    for key, value in zero.items() if isinstance(zero, dict) else ():
        path = f"deepspeed.zero_optimization.{key}"
        if key not in ZERO_KEYS:
            yield _unknown(path, key, sorted(ZERO_KEYS), "of DeepSpeed's zero_optimization")
        elif key == "stage" and value == 3 and _is(value, "int"):
            yield (
                f"{path} (3) must be 0, 1 or 2: ZeRO-3 partitions expert parameters that expert parallelism already "
                "shards; use stage 1 or 2"
            )
        elif key == "stage" and not (_is(value, "int") and 0 <= value <= 2):
            yield f"{path} ({value!r}) must be 0, 1 or 2"
        elif ZERO_KEYS[key] == "int" and value is not None and not _is_whole(value):
            yield f"{path} ({value!r}) must be a whole number of at least 0"
        elif value is not None and ZERO_KEYS[key] != "int" and not _is(value, ZERO_KEYS[key]):
            yield f"{path} ({value!r}) must be a {ZERO_KEYS[key]}"


RULES: tuple[Callable[[Settings], Iterator[str]], ...] = (
    model_source,
    model_family,
    model_keys,
    model_sizes,
    expert_choice,
    expert_layers,
    attention_heads,
    expert_shards,
    vocabulary,
    positions,
    world,
    batch,
    balance_schedule,
    lr_schedule,
    deepspeed_keys,
    deepspeed_zero,
)


def _declared_name(model: Model, names: tuple[str, ...]) -> str:
    return next((name for name in names if model.keys and name in model.keys.kinds), names[0])


def _is_whole(value: Any) -> bool:
    return _is(value, "float") and value >= 0 and float(value).is_integer()


def _accepts(kinds: frozenset[str] | None, value: Any) -> bool:
    return kinds is None or ("None" if value is None else type(value).__name__) in kinds


def _unknown(path: str, key: str, names: list[str], owner: str) -> str:
    near = nearest(key, names)
    parent = path.removesuffix(key)
    return f"{path} is no key {owner}; " + (f"did you mean {parent}{near}?" if near else f"keys: {', '.join(names)}")
