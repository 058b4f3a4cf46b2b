"""The parts of parameters that this rank's optimizer holds, for each of DeepSpeed's optimizers.

Without ZeRO a rank holds every parameter whole. With ZeRO 1 and 2 the parameters of a group are flattened into one
tensor and a rank holds a contiguous partition of it: of a parameter it may hold all, a fragment or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = "weight"

_IMPLEMENTATION = frozenset({"params", "name", "moe", "foreach", "fused", "capturable", "differentiable"})
"""Keys of a parameter group that change how or where it is computed, but not the result."""


@dataclass(frozen=True)
class Held:
    """Elements start to start + numel of this rank's flattened parameter, held by `holder` from element `offset` on."""

    parameter: nn.Parameter
    holder: Tensor
    """The tensor that the optimizer steps, the master weights; a frozen parameter itself."""
    group: int | None
    """The optimizer's parameter group; None for a frozen parameter."""
    start: int
    offset: int
    numel: int

    def part(self, whole: Tensor) -> Tensor:
        """Return this parameter's part of a tensor shaped like the holder: flat, not copied."""
        return whole.detach().view(-1)[self.offset : self.offset + self.numel]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer that DeepSpeed's wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _first(owner: Any, *names: str) -> Any:
    return next((getattr(owner, name) for name in names if hasattr(owner, name)), None)


def _groups(engine: Any) -> list[list[nn.Parameter]]:
    """Return the trained parameters of each of the optimizer's groups."""
    wrapped = _first(engine.optimizer, "bit16_groups", "bf16_groups", "fp16_groups")
    return wrapped or [[p for p in group["params"] if p.requires_grad] for group in engine.optimizer.param_groups]


def partitioned(engine: Any) -> bool:
    """Return whether ranks hold parts of parameters (ZeRO 1 and 2)."""
    return _partitions(engine) is not None


def _partitions(engine: Any) -> list[Tensor] | None:
    return _first(engine.optimizer, "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def _trained(engine: Any) -> Iterator[tuple[nn.Parameter, Held]]:
    partitions, masters = _partitions(engine), _first(engine.optimizer, "fp32_groups")
    if partitions is None and masters is None and hasattr(engine.optimizer, "fp16_groups"):
        raise ValueError(f"checkpoints of DeepSpeed's {type(engine.optimizer).__name__} are not supported: use ZeRO")
    for i, group in enumerate(_groups(engine)):
        for j, p in enumerate(group):
            if partitions is None:
                yield p, Held(p, p if masters is None else masters[i][j], i, 0, 0, p.numel())
            elif (mapping := vars(p)["_hp_mapping"]) is None:
                yield p, Held(p, partitions[i], i, 0, 0, 0)
            else:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield p, Held(p, partitions[i], i, low.start, high.start, high.numel)


def held(engine: Any) -> dict[str, Held]:
    """Return this rank's part of every parameter of the model, by name, in the model's order.

    Raises ValueError for an unsupported optimizer and for a parameter that is not contiguous.
    """
    if getattr(engine.optimizer, "round_robin_gradients", False):
        # With it, DeepSpeed maps parameters to the master weights of others.
        raise ValueError("zero_optimization.round_robin_gradients must be false to save and load checkpoints")
    trained = {id(p): part for p, part in _trained(engine)}
    parts = {}
    for name, p in engine.module.named_parameters():
        parts[name] = trained.get(id(p)) or Held(p, p, None, 0, 0, p.numel())
        if not parts[name].holder.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory, so it cannot be saved or loaded: make it contiguous")
    return parts


def check_masters(held: dict[str, Held]) -> None:
    """Raise ValueError if the model's weights are not the rounded master weights, so that these cannot be trusted."""
    for name, part in held.items():
        if part.group is not None and part.parameter is not part.holder:
            model = part.parameter.detach().view(-1)[part.start : part.start + part.numel]
            master = part.part(part.holder).to(model)
            if not torch.equal(model.view(torch.uint8), master.view(torch.uint8)):
                raise ValueError(
                    f"{name} differs from its master weights rounded to {model.dtype}: change weights through the "
                    "optimizer, or else this version of DeepSpeed is not supported"
                )


def _is_number(key: str, value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and (key == "step" or value.dim() == 0))


def elementwise(engine: Any, part: Held) -> dict[str, Tensor]:
    """Return the master weights and the optimizer's per-element states of a parameter by kind, shaped like its holder.

    Raises ValueError if the optimizer keeps a state that is neither per element nor a number.
    """
    states = {WEIGHT: part.holder.detach()}
    for key, value in base_optimizer(engine).state.get(part.holder, {}).items():
        if isinstance(value, Tensor) and value.shape == part.holder.shape and key != "step":
            states[key] = value
        elif not _is_number(key, value):
            optimizer = type(base_optimizer(engine)).__name__
            raise ValueError(f"state {key!r} of {optimizer} is neither per element nor a number: it cannot be saved")
    return states


def numbers(engine: Any, part: Held) -> dict[str, Any]:
    """Return the states of a parameter that are one number, such as Adam's step, as JSON."""
    found: dict[str, Any] = {}
    kinds = elementwise(engine, part)
    for key, value in base_optimizer(engine).state.get(part.holder, {}).items():
        if isinstance(value, Tensor) and key not in kinds:
            found[key] = {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
        elif not isinstance(value, Tensor):
            found[key] = value
    return found


def set_states(engine: Any, part: Held, dtypes: dict[str, torch.dtype], found: dict[str, Any]) -> dict[str, Tensor]:
    """Replace the holder's states by zeros of these types and by these numbers; return the zeros by kind.

    dtypes: by kind, without the weights. found: as returned by `numbers`.
    """
    optimizer = base_optimizer(engine)
    optimizer.state.pop(part.holder, None)
    if not dtypes and not found:
        return {}
    assert part.group is not None
    group = optimizer.param_groups[part.group]
    device = part.holder.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    state: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            value = torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]), device=device)
        state[key] = value
    zeros = {kind: torch.zeros_like(part.holder, dtype=dtype, requires_grad=False) for kind, dtype in dtypes.items()}
    optimizer.state[part.holder] = {**state, **zeros}
    return zeros


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float)


def hyperparameters(engine: Any, names: dict[int, str]) -> list[dict[str, Any]]:
    """Return the settings of each parameter group and the names of its parameters, as JSON.

    names: by id of the parameter. Raises ValueError for a setting that is not a plain value.
    """
    found = []
    for group, parameters in zip(base_optimizer(engine).param_groups, _groups(engine)):
        values = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k not in _IMPLEMENTATION}
        for key, value in values.items():
            if not _plain(value):
                raise ValueError(f"the optimizer's setting {key!r} is a {type(value).__name__}: it cannot be saved")
        found.append({"settings": values, "parameters": [names[id(p)] for p in parameters]})
    return found


def match_hyperparameters(
    saved: list[dict[str, Any]], engine: Any, names: dict[int, str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return each parameter group of the engine with the settings that its parameters were saved with.

    Groups may differ at another EP size. Raises ValueError if parameters of one group were saved with different
    settings or not saved.
    """
    settings = {name: group["settings"] for group in saved for name in group["parameters"]}
    pairs = []
    for group, parameters in zip(base_optimizer(engine).param_groups, _groups(engine)):
        found = [settings.get(names[id(p)]) for p in parameters]
        if not found:
            continue
        if found[0] is None or any(f != found[0] for f in found):
            raise ValueError(
                f"the optimizer's group of {names[id(parameters[0])]} has parameters that were saved with different "
                "settings or were frozen: use the parameter groups of the saved run"
            )
        pairs.append((group, found[0]))
    return pairs


def apply_hyperparameters(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Set each group to the settings found for it."""
    for group, settings in pairs:
        for key, value in settings.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def refresh_model(engine: Any) -> None:
    """Copy the master weights to the model's weights, in the model's type; collective under ZeRO."""
    optimizer = engine.optimizer
    if partitioned(engine):
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False  # so that the next step links the present states
        return
    for wide, narrow in zip(_first(optimizer, "fp32_groups") or [], _groups(engine)):
        for master, p in zip(wide, narrow):
            p.data.copy_(master.data)


def loss_scale(engine: Any) -> dict[str, Any] | None:
    """Return the state of the loss scale as JSON; None if there is none."""
    scaler = _first(engine.optimizer, "loss_scaler", "loss_scale_config")
    return None if scaler is None else {k: getattr(scaler, k) for k in _LOSS_SCALE if hasattr(scaler, k)}


_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def set_loss_scale(engine: Any, state: dict[str, Any] | None) -> None:
    """Set the loss scale to the saved state, as far as this engine has one."""
    scaler = _first(engine.optimizer, "loss_scaler", "loss_scale_config")
    for key in _LOSS_SCALE:
        if state is not None and key in state and hasattr(scaler, key):
            setattr(scaler, key, state[key])
