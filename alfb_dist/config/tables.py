"""The settings of a run: pydantic tables, checked together by the rules.

Imports only pydantic and the standard library, so that mistakes are reported in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainValidator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from alfb_dist.config.model_rules import MODEL_RULES
from alfb_dist.config.rules import TABLE_RULES, Settings, problems
from alfb_dist.config.text import refuse, to_toml, to_value

RULES = (*MODEL_RULES, *TABLE_RULES)

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], Field(strict=False)]  # not strict: TOML has lists, no tuples
Beta = Annotated[float, Field(ge=0, lt=1)]


MODES = ("train", "freeze", "recentre")


def _bias_mode(value: Any) -> str | tuple[str, ...]:
    """Return a mode for all layers, or a tuple with one for each."""
    if isinstance(value, str) and value in ("auto", *MODES):
        return value
    if isinstance(value, list | tuple) and value and all(mode in MODES for mode in value):
        return tuple(value)
    raise PydanticCustomError(  # like a Literal's, for which `load_config` suggests the closest choice
        "literal_error",
        "Input should be 'auto', 'train', 'freeze' or 'recentre', or a list of the latter three",
    )


class Table(BaseModel):
    """Settings that cannot be changed; unknown keys and values of another type are errors."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Table):
    """The name of a run, its directory, and how its processes start."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="name of the run and of its directory",
    )
    folder: Name = Field(default="runs", description="directory of all runs")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of the weights, the sample order and all other random numbers"
    )
    resume: bool = Field(
        default=False, description="continue the run from its newest undamaged checkpoint, if there is one"
    )
    interface: str = Field(
        default="", description="network interface between hosts; empty: the one with a route to the host of rank 0"
    )
    timeout_seconds: float = Field(default=600.0, gt=0, le=604_800, description="time limit of each collective")


class ModelConfig(Table):
    """The model: a transformers family and its configuration, or a pretrained model."""

    family: Name = Field(
        default="deepseek_v3", description="transformers model_type; with `path`, that of its config.json"
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description='arguments of the transformers configuration class; "null" for None'
    )
    path: str = Field(default="", description="directory of a pretrained transformers model, instead of `config`")
    attention: Literal["sdpa", "eager"] = Field(default="sdpa", description="attention implementation of transformers")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of weights and activations")


class ParallelConfig(Table):
    """How ranks share the model."""

    ep_degree: int = Field(
        default=1, ge=1, description="ranks that share the experts of a layer; must divide ranks and experts"
    )
    expert_placement: Literal["prefer-node", "node", "any"] = Field(
        default="prefer-node",
        description="warn of (prefer-node), refuse (node) or accept (any) groups that span hosts but fit on one",
    )
    max_rows: int = Field(
        default=0,
        ge=0,
        description="rows that a rank's experts hold at once; more are computed in chunks, with recompute; 0: no limit",
    )


class BalanceConfig(Table):
    """How the routing bias follows the load (arXiv:2408.15664), and auxiliary losses to compare with."""

    rule: Literal["sign", "proportional", "rms"] = Field(default="sign", description="update rule of the bias")
    rate: float = Field(default=0.001, ge=0, le=1, description="score units per optimizer step; 0 freezes the bias")
    centered: bool = Field(default=False, description="subtract the mean from every update")
    mode: Annotated[str | tuple[str, ...], PlainValidator(_bias_mode)] = Field(
        default="auto",
        description="treatment of the biases, one for all MoE layers or a list with one for each; recentre: train "
        "after subtracting the mean once; auto: freeze with model.path, else train",
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the rate rises linearly from 0")
    zero_at_step: int | None = Field(default=None, ge=1, description="step from which the rate is 0")
    sequence_loss_alpha: float = Field(
        default=0.0, ge=0, le=1, description="weight of DeepSeek-V3's sequence-wise loss"
    )
    batch_loss_alpha: float = Field(default=0.0, ge=0, le=1, description="weight of the classical auxiliary loss")


class OptimizerConfig(Table):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(gt=0, le=10, description="peak learning rate")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="decay rates of the two moments"
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="decoupled weight decay")
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no clipping")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises linearly from 0")
    schedule: Literal["constant", "cosine"] = Field(default="cosine", description="learning rate after the warm-up")
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="final learning rate as a fraction of the peak (cosine)"
    )


class DataConfig(Table):
    """The text, its tokenizer and the sequences cut from it."""

    source: Names = Field(
        min_length=1, description='directories, text files or token files; "python-stdlib": Python\'s own sources'
    )
    tokenizer: Name = Field(
        default="bytes", description='"bytes", a tokenizer.json, or the directory of a transformers tokenizer'
    )
    end_token: str = Field(
        default="", description="the tokenizer's end-of-document token, if it is not one of the usual ones"
    )
    sequence_length: int = Field(ge=2, le=2**24, description="tokens per sequence")
    layout: Literal["packed", "padded"] = Field(
        default="packed", description="sequences of joined documents, or of one padded document each"
    )
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="fraction of the files kept for validation"
    )
    validation_source: Names = Field(default=(), description="validation text; empty: split off `source`")
    cache: Name = Field(default="data-cache", description="directory of the prepared token files")


class TrainConfig(Table):
    """Steps, batches, evaluations and checkpoints."""

    steps: int = Field(ge=1, description="number of optimizer steps")
    global_batch: int = Field(ge=1, description="sequences per optimizer step over all ranks")
    micro_batch: int = Field(ge=1, description="sequences per rank and forward pass")
    activation_checkpointing: Literal["none", "reentrant", "non-reentrant"] = Field(
        default="none", description="recompute each layer in backward instead of keeping its activations"
    )
    eval_interval: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_sequences: int = Field(default=64, ge=1, description="sequences of one evaluation over all ranks")
    checkpoint_interval: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(default=2, ge=1, description="number of newest checkpoints to keep")
    max_skipped_steps: int = Field(default=20, ge=1, description="number of skipped steps in a row that ends the run")


class ReportConfig(Table):
    """What a run reports, where and how often."""

    log_interval: int = Field(default=1, ge=1, description="steps between lines of metrics")
    progress: bool = Field(default=True, description="show a progress bar on the console")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description='"auto": online if an account is configured, else offline'
    )
    wandb_project: Name = Field(default="alfb_dist", max_length=128, description="project on Weights & Biases")
    html: bool = Field(default=True, description="write report.html at the end of the run")


TABLES: dict[str, type[Table]] = {
    "run": RunConfig,
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "balance": BalanceConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "report": ReportConfig,
}


class Config(Table):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    balance: BalanceConfig = BalanceConfig()
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    report: ReportConfig = ReportConfig()
    deepspeed: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="passed to DeepSpeed unchanged; keys that follow from other tables are not allowed",
    )

    @model_validator(mode="after")
    def _holds_together(self) -> Config:
        refuse(problems(Settings(self.model_dump()), RULES))
        return self

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the micro-batches per optimizer step and rank. Raises ConfigError if they do not divide the batch."""
        refuse(problems(Settings(self.model_dump(), world_size=world_size), RULES))
        return self.train.global_batch // (self.train.micro_batch * world_size)

    def hash(self) -> str:
        """Return 16 hexadecimal digits that depend on every setting but `run.resume`."""
        text = json.dumps(self.model_dump(mode="json", exclude={"run": {"resume"}}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_to_toml(config: Config) -> str:
    """Return the configuration, defaults included, as TOML that `load_config` reads back equal."""
    return to_toml(config.model_dump())


def describe_fields() -> str:
    """Return a Markdown table of every key: type, default, bounds and meaning."""
    rows = ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for table, model in TABLES.items():
        for key, field in model.model_fields.items():
            default = "" if field.is_required() else to_value(field.get_default(call_default_factory=True))
            cells = (f"{table}.{key}", _kind(field), default or "required", _bounds(field), str(field.description))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    rows.append(f"| deepspeed | table | {{}} | | {Config.model_fields['deepspeed'].description} |")
    return "\n".join(rows) + "\n"


def _kind(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " or ".join(to_value(choice) for choice in get_args(annotation))
    if get_origin(annotation) is UnionType:
        return " or ".join(_type_name(kind) for kind in get_args(annotation))
    return _type_name(annotation)


def _type_name(annotation: Any) -> str:
    name = getattr(get_origin(annotation) or annotation, "__name__", str(annotation))
    return {"tuple": "list", "dict": "table", "NoneType": "null"}.get(name, name)


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >=", "max_length": "length <="}
    bounds = [(signs[name], getattr(rule, name)) for rule in field.metadata for name in signs if hasattr(rule, name)]
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
