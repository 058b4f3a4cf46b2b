"""The configuration of a run: pydantic tables and the rules that hold them together.

Imports only pydantic and the standard library, so that a refusal takes a fraction of a second.
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
    """A mode for all layers, or a list of one for each. Named like a wrong choice, so that the nearest one is told."""
    if isinstance(value, str) and value in ("auto", *MODES):
        return value
    if isinstance(value, list | tuple) and value and all(mode in MODES for mode in value):
        return tuple(value)
    raise PydanticCustomError(
        "literal_error",
        "Input should be 'auto', 'train', 'freeze', 'recentre' or a list of the last three",
    )


class Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Table):
    """Where a run is kept, and how its processes start."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="name of the run and its folder",
    )
    folder: Name = Field(default="runs", description="folder that holds the run folders")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of weights, of the order of samples and of everything else"
    )
    resume: bool = Field(
        default=False, description="go on from the newest good checkpoint of the run; else a new run folder"
    )
    interface: str = Field(
        default="", description="network interface between hosts; empty: the one that leads to the first rank's host"
    )
    timeout_seconds: float = Field(default=600.0, gt=0, le=604_800, description="longest wait of every collective")


class ModelConfig(Table):
    """The model: a transformers family with its configuration, or a folder with a pretrained one."""

    family: Name = Field(
        default="deepseek_v3", description="transformers model_type; with `path` that of the folder counts"
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description='arguments of the transformers configuration class; "null" for None'
    )
    path: str = Field(default="", description="folder of a pretrained transformers model, instead of `config`")
    attention: Literal["sdpa", "eager"] = Field(default="sdpa", description="attention implementation of transformers")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of weights and activations")


class ParallelConfig(Table):
    """How ranks share the model."""

    ep_degree: int = Field(
        default=1, ge=1, description="ranks that share the experts of a layer; divides ranks and experts"
    )
    expert_placement: Literal["prefer-node", "node", "any"] = Field(
        default="prefer-node",
        description='experts of a group that fit on one host but are not: told, refused ("node"), or not looked at',
    )
    max_rows: int = Field(
        default=0,
        ge=0,
        description="rows that a rank's experts hold at once, more being computed in pieces, twice; 0: all at once",
    )


class BalanceConfig(Table):
    """How the routing bias follows the load (arXiv:2408.15664), and the losses to compare with."""

    rule: Literal["sign", "proportional", "rms"] = Field(default="sign", description="update rule of the bias")
    rate: float = Field(default=0.001, ge=0, le=1, description="score units per optimizer step; 0 freezes the bias")
    centered: bool = Field(default=False, description="take the mean out of every update")
    mode: Annotated[str | tuple[str, ...], PlainValidator(_bias_mode)] = Field(
        default="auto",
        description="what happens to the biases, in all layers of experts or, by a list, in each; recentre: the mean "
        'is taken out once; "auto": freeze with model.path',
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the rate rises linearly from 0")
    zero_at_step: int | None = Field(default=None, ge=1, description="step from which on the rate is 0")
    sequence_loss_alpha: float = Field(
        default=0.0, ge=0, le=1, description="weight of DeepSeek-V3's sequence-wise loss"
    )
    batch_loss_alpha: float = Field(default=0.0, ge=0, le=1, description="weight of the classical auxiliary loss")


class OptimizerConfig(Table):
    """AdamW and the schedule of its learning rate."""

    lr: float = Field(gt=0, le=10, description="peak learning rate")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="decay of both moments"
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="decoupled weight decay")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 for no limit")
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises linearly")
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="course of the learning rate after that"
    )
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="last learning rate as a part of the peak (cosine)"
    )


class DataConfig(Table):
    """The text, its tokens and the sequences cut from it."""

    source: Names = Field(
        min_length=1, description='folders, text files or token files; "python-stdlib": Python\'s own sources'
    )
    tokenizer: Name = Field(
        default="bytes", description='"bytes", a tokenizer.json, or a transformers tokenizer folder'
    )
    end_token: str = Field(
        default="", description="the tokenizer's end-of-document token, where it is not one of the usual ones"
    )
    sequence_length: int = Field(ge=2, le=2**24, description="tokens a sequence")
    layout: Literal["packed", "padded"] = Field(
        default="packed", description="documents joined, or one padded one a sequence"
    )
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="part of the files kept for validation")
    validation_source: Names = Field(default=(), description="validation text; empty: split off `source`")
    cache: Name = Field(default="data-cache", description="folder of prepared token files")


class TrainConfig(Table):
    """Steps, batches, evaluations and checkpoints."""

    steps: int = Field(ge=1, description="optimizer steps of the run")
    global_batch: int = Field(ge=1, description="sequences per optimizer step over all ranks")
    micro_batch: int = Field(ge=1, description="sequences per rank and forward pass")
    activation_checkpointing: Literal["none", "reentrant", "non-reentrant"] = Field(
        default="none", description="recompute each layer in backward instead of keeping its activations"
    )
    eval_interval: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_sequences: int = Field(default=64, ge=1, description="sequences of one evaluation over all ranks")
    checkpoint_interval: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    max_skipped_steps: int = Field(default=20, ge=1, description="skipped steps in a row that end the run")


class ReportConfig(Table):
    """What a run tells, where and how often."""

    log_interval: int = Field(default=1, ge=1, description="steps between lines of metrics")
    progress: bool = Field(default=True, description="a progress bar on the console")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description='"auto": online if an account is configured, else offline'
    )
    wandb_project: Name = Field(default="alfb_dist", max_length=128, description="project on Weights & Biases")
    html: bool = Field(default=True, description="write report.html at the end")


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
    """A whole run. Settings that contradict each other are refused together with those that are wrong alone."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    balance: BalanceConfig = BalanceConfig()
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    report: ReportConfig = ReportConfig()
    deepspeed: dict[str, JsonValue] = Field(
        default_factory=dict, description="handed to DeepSpeed as it is, apart from what the other tables decide"
    )

    @model_validator(mode="after")
    def _holds_together(self) -> Config:
        refuse(problems(Settings(self.model_dump()), RULES))
        return self

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the micro-batches per optimizer step and rank. Raises ConfigError if the batch does not split."""
        refuse(problems(Settings(self.model_dump(), world_size=world_size), RULES))
        return self.train.global_batch // (self.train.micro_batch * world_size)

    def hash(self) -> str:
        """Return 16 hexadecimal digits that stay the same as long as every setting but `run.resume` does."""
        text = json.dumps(self.model_dump(mode="json", exclude={"run": {"resume"}}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_to_toml(config: Config) -> str:
    """Return the configuration with every default written out, as TOML that `load_config` reads back equal."""
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
