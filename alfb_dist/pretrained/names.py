"""What a model's tensors are called in files, by transformers' own conversion tables, and which stretch lies where.

In files, experts are either fused as in the model, (E, rows, D), or one by one under names with the expert's number.
transformers' tables say which, and how a family's names differ. Of their conversions, renaming and the stacking of
experts are known here; a family that needs another is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import conversion_mapping as tables
from transformers import core_model_loading as conversions

from alfb_dist.families import BIAS_NAMES

LAYOUTS = ("auto", "fused", "per_expert")

Shape = tuple[int, ...]


def shapes_of(template: Any) -> dict[str, Shape]:
    """The shape of every tensor that a model is saved with, by name in its order; of tied ones only the source."""
    tied = template.all_tied_weights_keys
    return {name: tuple(x.shape) for name, x in template.state_dict().items() if name not in tied}


def is_bias(name: str) -> bool:
    """Whether a tensor of this name is a selection bias."""
    return name.rpartition(".")[2] in BIAS_NAMES


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _tables(template: Any, *, legacy: bool) -> tuple[list[Any], list[Any]]:
    """(renamings, stackings) of a model's family."""
    found = tables.get_model_conversion_mapping(template, add_legacy=legacy)
    if not legacy:  # as transformers does when it saves a model that was not loaded
        found = [x for x in found if not isinstance(x, conversions.PrefixChange)]
    renamings = [x for x in found if isinstance(x, conversions.WeightRenaming)]
    return renamings, [x for x in found if isinstance(x, conversions.WeightConverter)]


def _stacks(converter: Any) -> bool:
    """Whether it stacks experts' tensors, after putting the rows of several behind each other."""
    known = {"MergeModulelist": 0, "Concatenate": 1}
    steps = [type(step).__name__ for step in converter.operations]
    dims = [getattr(step, "dim", None) for step in converter.operations]
    several = len(converter.source_patterns) > 1
    return steps == list(known)[: 1 + several] and dims == list(known.values())[: 1 + several]


@dataclass(frozen=True)
class Origin:
    """Where a model's tensor lies in files: whole, or for each expert the names of what its rows consist of."""

    whole: str | None
    experts: tuple[tuple[str, ...], ...] = ()

    def names(self) -> list[str]:
        """Every name."""
        return [n for parts in self.experts for n in parts] if self.whole is None else [self.whole]


class _Found:
    """The names of a folder, sorted to the tensors of a model."""

    def __init__(self, template: Any) -> None:
        self.model = template
        self.shapes = {name: tuple(x.shape) for name, x in template.state_dict().items()}
        self.renamings, self.stackings = _tables(template, legacy=True)
        self.wholes: dict[str, str] = {}
        self.experts: dict[str, dict[tuple[int, int], str]] = {}
        """By the model's name: by (expert, which of its parts), the name in the file."""
        self.patterns: dict[str, list[str]] = {}
        self.extra: list[str] = []

    def sort(self, name: str) -> None:
        """The name stands where it belongs. ValueError if two names mean the same tensor."""
        prefix = self.model.base_model_prefix
        target, pattern = conversions.rename_source_key(name, self.renamings, self.stackings, prefix, self.shapes)
        if target not in self.shapes and name in self.shapes:
            target, pattern = name, None
        if target not in self.shapes:
            self.extra.append(name)
        elif pattern is None:
            if target in self.wholes:
                raise ValueError(f"{name} and {self.wholes[target]} are both {target}")
            self.wholes[target] = name
        else:
            self._sort_expert(target, pattern, name)

    def _sort_expert(self, target: str, pattern: str, name: str) -> None:
        converter = next(c for c in self.stackings if pattern in c.source_patterns)
        if not _stacks(converter):
            raise ValueError(f"{name}: {type(self.model).__name__} needs a conversion that is not supported")
        number = re.search(
            re.escape(pattern).replace(r"\*", r"(\d+)"), conversions.apply_renamings(name, self.renamings)
        )
        assert number is not None
        place = int(number[1]), converter.source_patterns.index(pattern)
        self.patterns[target] = [target, converter.target_patterns[0], *converter.source_patterns]
        known = self.experts.setdefault(target, {})
        if place in known:
            raise ValueError(f"{name} and {known[place]} are the same part of {target}")
        known[place] = name

    def origins(self) -> tuple[dict[str, Origin], list[str]]:
        """Each tensor's origin, and the names of what is missing."""
        found, missing = {}, []
        for target, shape in self.shapes.items():
            if target in self.wholes:
                if target in self.experts:
                    self.extra += self.experts[target].values()
                found[target] = Origin(self.wholes[target])
            elif target in self.experts:
                known, (_, end, *patterns) = self.experts[target], self.patterns[target]
                places = [[(e, i) for i in range(len(patterns))] for e in range(shape[0])]
                for e, i in (place for parts in places for place in parts if place not in known):
                    missing.append(target.replace(end, patterns[i].replace("*", str(e))))
                self.extra += [name for (e, _), name in known.items() if e >= shape[0]]
                found[target] = Origin(None, tuple(tuple(known.get(p, "") for p in parts) for parts in places))
            else:
                missing.append(target)
        return found, missing


def _ignored(template: Any, names: list[str], kind: str) -> set[str]:
    """Those of the names that the family says may be `kind`: missing or unexpected."""
    patterns = list(getattr(template, f"_keys_to_ignore_on_load_{kind}", None) or [])
    if kind == "unexpected":
        patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]  # buffers that old files carry along
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def find_origins(template: Any, tensors: Mapping[str, Shape]) -> dict[str, Origin]:
    """Where each of the model's tensors lies among tensors of these names and shapes.

    Of tied tensors, only the source is in the result, unless both are there. Tensors that the family may do without
    can be absent. ValueError naming all that is missing, all that is too much, or all whose shape is another.
    """
    sorted_names = _Found(template)
    for name in sorted(tensors, key=conversions.dot_natural_key):
        sorted_names.sort(name)
    found, missing = sorted_names.origins()
    for target, source in template.all_tied_weights_keys.items():
        if source not in found and target in found:
            found[source] = found.pop(target)
        missing = [name for name in missing if name not in (target, source) or source not in found]
    missing = sorted(set(missing) - _ignored(template, missing, "missing"))
    extra = sorted(set(sorted_names.extra) - _ignored(template, sorted_names.extra, "unexpected"))
    if missing or extra:
        parts = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise ValueError(f"these are not the tensors of {type(template).__name__}: the folder {'; it '.join(parts)}")
    wrong = [
        line for target, origin in found.items() for line in _misfits(sorted_names.shapes[target], origin, tensors)
    ]
    if wrong:
        raise ValueError(f"tensors do not fit {type(template).__name__}: {_some(wrong)}")
    return found


def _misfits(shape: Shape, origin: Origin, tensors: Mapping[str, Shape]) -> list[str]:
    if origin.whole is not None:
        there = tuple(tensors[origin.whole])
        return [] if there == shape else [f"{origin.whole} is {there} in the folder and {shape} in the model"]
    rows, *rest = shape[1:]
    found = []
    for parts in origin.experts:
        each = (rows // len(parts), *rest)
        found += [f"{n} is {tensors[n]} in the folder and {each} in the model" for n in parts if tensors[n] != each]
    return found


@dataclass(frozen=True)
class Piece:
    """Elements start to stop of a model's flattened tensor, or of one expert's part of it."""

    parameter: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Output:
    """A tensor of a file: its name and shape there, and the pieces that it consists of."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]


def _fused(name: str, shape: Shape, expert_names: set[str]) -> Output:
    if name not in expert_names:
        return Output(name, shape, (Piece(name, None, 0, math.prod(shape)),))
    size = math.prod(shape[1:])
    return Output(name, shape, tuple(Piece(name, e, 0, size) for e in range(shape[0])))


def _single(name: str, shape: Shape, converter: Any) -> list[Output]:
    """The outputs of a fused tensor, expert by expert."""
    patterns, end = converter.target_patterns, converter.source_patterns[0]
    rows = shape[1] // len(patterns)
    size = rows * math.prod(shape[2:])
    return [
        Output(
            name.replace(end, pattern.replace("*", str(e))),
            (rows, *shape[2:]),
            (Piece(name, e, i * size, (i + 1) * size),),
        )
        for e in range(shape[0])
        for i, pattern in enumerate(patterns)
    ]


def plan_outputs(template: Any, expert_names: set[str], layout: str) -> list[Output]:
    """The tensors of the files of a model, in its order.

    expert_names: those of the model's tensors that are kept expert by expert.
    layout: "fused" as in the model, "per_expert" as on the hub, or "auto", what transformers would write.
    ValueError for a family whose conversion is not supported, or that knows no names for single experts.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout ({layout!r}) must be one of {', '.join(LAYOUTS)}")
    shapes = shapes_of(template)
    if layout == "fused":
        return [_fused(name, shape, expert_names) for name, shape in shapes.items()]
    renamings, stackings = _tables(template, legacy=False)
    undo_names = [x.reverse_transform() for x in renamings[::-1]]
    undo_stacks = [x.reverse_transform() for x in stackings[::-1] if _stacks(x)]
    found: list[Output] = []
    for name, shape in shapes.items():
        _, pattern = conversions.apply_converters(name, undo_stacks)
        if pattern is None:
            outputs = [_fused(name, shape, expert_names)]
            if layout == "per_expert" and name in expert_names:
                raise ValueError(f"{type(template).__name__} has no names for single experts, which {name} needs")
        else:
            outputs = _single(name, shape, next(x for x in undo_stacks if pattern in x.source_patterns))
        found += [Output(conversions.apply_renamings(x.name, undo_names), x.shape, x.pieces) for x in outputs]
    _check_outputs(template, {x.name: x.shape for x in found}, shapes)
    return found


def _check_outputs(template: Any, found: dict[str, Shape], shapes: dict[str, Shape]) -> None:
    """Nothing, or ValueError if transformers would write other names or shapes; no memory is touched."""
    state = template.state_dict()
    theirs = conversions.revert_weight_conversion(template, {name: state[name] for name in shapes})
    expected = {name: tuple(x.shape) for name, x in theirs.items()}
    if found != expected:
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        family = type(template).__name__
        raise ValueError(f"{family} is written in a way that is not supported ({_some(wrong)}); layout 'fused' is")
