"""Plan the tensors of a model's files: their names, and the pieces of the model's tensors that each consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import core_model_loading as conversions

from alfb_dist.checkpoint.safetensors_file import first_keys
from alfb_dist.pretrained.names import Shape, family_tables, is_supported, plain_name, shapes_of, stacks_experts

LAYOUTS = ("auto", "fused", "per_expert")


@dataclass(frozen=True)
class Piece:
    """Elements start to stop of a flattened tensor of a model, or of one expert's part of it."""

    parameter: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Output:
    """A tensor of a file: its name and shape, and the pieces that it consists of."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]


def _whole(name: str, shape: Shape, expert_names: set[str]) -> Output:
    if name not in expert_names:
        return Output(name, shape, (Piece(name, None, 0, math.prod(shape)),))
    size = math.prod(shape[1:])
    return Output(name, shape, tuple(Piece(name, e, 0, size) for e in range(shape[0])))


def _parts(name: str, shape: Shape, undo: Any, stacked: bool) -> list[Output]:
    """Return the outputs of a tensor that files hold in parts: by experts if it is stacked, otherwise by rows."""
    patterns, end = undo.target_patterns, plain_name(undo.source_patterns[0])
    rows, *rest = shape[1:] if stacked else shape
    part_shape = (rows // len(patterns), *rest)
    size = math.prod(part_shape)
    return [
        Output(
            name.replace(end, pattern.replace("*", str(e))),
            part_shape,
            (Piece(name, e if stacked else None, i * size, (i + 1) * size),),
        )
        for e in range(shape[0] if stacked else 1)
        for i, pattern in enumerate(patterns)
    ]


def plan_outputs(template: Any, expert_names: set[str], layout: str) -> list[Output]:
    """Return the tensors of a model's files, in its order.

    expert_names: the model's tensors that are held expert by expert.
    layout: "fused" as in the model, "per_expert" as on the hub, or "auto" as transformers would write it.
    Raises ValueError for a family whose conversion is not supported, or that has no names for single experts.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout ({layout!r}) must be one of {', '.join(LAYOUTS)}")
    shapes = shapes_of(template)
    if layout == "fused":
        return [_whole(name, shape, expert_names) for name, shape in shapes.items()]
    renamings, converters = family_tables(template, legacy=False)
    undo_names = [x.reverse_transform() for x in renamings[::-1]]
    undo_parts = [(x.reverse_transform(), stacks_experts(x)) for x in converters[::-1] if is_supported(x)]
    found: list[Output] = []
    for name, shape in shapes.items():
        _, pattern = conversions.apply_converters(name, [undo for undo, _ in undo_parts])
        if pattern is None:
            outputs = [_whole(name, shape, expert_names)]
            if layout == "per_expert" and name in expert_names:
                raise ValueError(
                    f"{type(template).__name__} has no names for single experts, as {name} needs: use layout 'fused'"
                )
        else:
            outputs = _parts(name, shape, *next(x for x in undo_parts if pattern in x[0].source_patterns))
        found += [Output(conversions.apply_renamings(x.name, undo_names), x.shape, x.pieces) for x in outputs]
    _check_outputs(template, {x.name: x.shape for x in found}, shapes)
    return found


def _check_outputs(template: Any, found: dict[str, Shape], shapes: dict[str, Shape]) -> None:
    """Raise ValueError if transformers would write other names or shapes; computed on the meta device."""
    state = template.state_dict()
    converted = conversions.revert_weight_conversion(template, {name: state[name] for name in shapes})
    expected = {name: tuple(x.shape) for name, x in converted.items()}
    if found != expected:
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        family = type(template).__name__
        raise ValueError(f"the files of {family} are not supported ({first_keys(wrong)}): use layout 'fused'")
