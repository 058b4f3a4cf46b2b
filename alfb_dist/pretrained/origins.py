"""Find the tensors in a directory that make up each tensor of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import core_model_loading as conversions

from alfb_dist.checkpoint.safetensors_file import first_keys
from alfb_dist.pretrained.names import (
    Shape,
    added_shapes,
    expert_counts,
    family_tables,
    is_supported,
    plain_name,
    stacks_experts,
)


@dataclass(frozen=True)
class Origin:
    """The tensors in files that make up a model's tensor: one, or the names of its parts.

    parts: the names for each expert, none for an expert that the directory may omit; one tuple for a dense tensor.
    stacked: whether it is an expert tensor.
    """

    whole: str | None
    parts: tuple[tuple[str, ...], ...] = ()
    stacked: bool = True

    def names(self) -> list[str]:
        """Return every name."""
        return [n for parts in self.parts for n in parts] if self.whole is None else [self.whole]


@dataclass
class _Parts:
    """The names of the parts of a tensor, by (expert, index of the pattern), and their converter."""

    converter: Any
    known: dict[tuple[int, int], str]

    def origin(self, target: str, rows: int, num_experts: int) -> tuple[Origin, list[str], list[str]]:
        """Return the origin, and the names that are missing and those that are unknown. rows: of the model's tensor."""
        patterns, missing, found = self.converter.source_patterns, [], []
        stacked = stacks_experts(self.converter)
        for e in range(rows if stacked else 1):
            names = [self.known.get((e, i), "") for i in range(len(patterns))]
            if e >= num_experts and not any(names):
                names = []
            for pattern, name in zip(patterns, names):
                if not name:
                    part = plain_name(pattern).replace("*", str(e))
                    missing.append(target.replace(self.converter.target_patterns[0], part))
            found.append(tuple(names))
        extra = [name for (e, _), name in self.known.items() if e >= rows]
        return Origin(None, tuple(found), stacked), missing, extra


class _SortedNames:
    """The names in a directory, sorted by the model's tensors."""

    def __init__(self, template: Any) -> None:
        self.model = template
        self.added = added_shapes(template)
        self.shapes = {name: tuple(x.shape) for name, x in template.state_dict().items()} | self.added
        self.renamings, self.converters = family_tables(template, legacy=True)
        self.wholes: dict[str, str] = {}
        self.parts: dict[str, _Parts] = {}
        self.extra: list[str] = []

    def sort(self, name: str) -> None:
        """Assign a name to its tensor. Raises ValueError if two names mean the same."""
        prefix = self.model.base_model_prefix
        target, pattern = conversions.rename_source_key(name, self.renamings, self.converters, prefix, self.shapes)
        if target not in self.shapes and name in self.shapes:
            target, pattern = name, None
        if target not in self.shapes:
            self.extra.append(name)
        elif pattern is None:
            if target in self.wholes:
                raise ValueError(f"{name} and {self.wholes[target]} both mean {target}: remove one")
            self.wholes[target] = name
        else:
            self._sort_part(target, pattern, name)

    def _sort_part(self, target: str, pattern: str, name: str) -> None:
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        if not is_supported(converter):
            raise ValueError(f"{name}: {type(self.model).__name__} needs a conversion that is not supported")
        expert = 0
        if stacks_experts(converter):
            number = re.search(pattern.replace("*", r"(\d+)"), conversions.apply_renamings(name, self.renamings))
            assert number is not None
            expert = int(number[1])
        place = expert, converter.source_patterns.index(pattern)
        known = self.parts.setdefault(target, _Parts(converter, {})).known
        if place in known:
            raise ValueError(f"{name} and {known[place]} are the same part of {target}: remove one")
        known[place] = name

    def origins(self) -> tuple[dict[str, Origin], list[str]]:
        """Return each tensor's origin, and the names that are missing."""
        found, missing, counts = {}, [], expert_counts(self.model)
        for target, shape in self.shapes.items():
            if target in self.wholes:
                found[target] = Origin(self.wholes[target])
                self.extra += self.parts[target].known.values() if target in self.parts else ()
            elif target in self.parts:
                rows = shape[0]
                found[target], lacking, extra = self.parts[target].origin(target, rows, counts.get(target, rows))
                missing += lacking
                self.extra += extra
            elif target not in self.added:
                missing.append(target)
        return found, missing


def _ignored(template: Any, names: list[str], kind: str) -> set[str]:
    """Return the names that the family's own list allows to be `kind`: missing or unexpected."""
    patterns = list(getattr(template, f"_keys_to_ignore_on_load_{kind}", None) or [])
    if kind == "unexpected":
        patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]  # buffers in old files
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def find_origins(template: Any, tensors: Mapping[str, Shape], *, part: bool = False) -> dict[str, Origin]:
    """Return the origin of each of the model's tensors among tensors of these names and shapes.

    Of tied tensors, only the source is in the result, unless both are stored. Tensors that the family allows to be
    missing and biases that balancing adds may be absent. part: whether the model is part of a larger one, whose
    tensors outside the model's prefix are ignored. Raises ValueError naming tensors that are missing, unknown or
    mis-shaped.
    """
    sorted_names = _SortedNames(template)
    for name in sorted(tensors, key=conversions.dot_natural_key):
        sorted_names.sort(name)
    found, missing = sorted_names.origins()
    for target, source in template.all_tied_weights_keys.items():
        if source not in found and target in found:
            found[source] = found.pop(target)
        missing = [name for name in missing if name not in (target, source) or source not in found]
    missing = sorted(set(missing) - _ignored(template, missing, "missing"))
    if part:
        sorted_names.extra = [n for n in sorted_names.extra if n.startswith(f"{template.base_model_prefix}.")]
    extra = sorted(set(sorted_names.extra) - _ignored(template, sorted_names.extra, "unexpected"))
    if missing or extra:
        parts = [f"{word} {first_keys(names)}" for word, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise ValueError(f"these are not the tensors of {type(template).__name__}: the directory {'; it '.join(parts)}")
    wrong = [
        line
        for target, origin in found.items()
        for line in _shape_problems(sorted_names.shapes[target], origin, tensors)
    ]
    if wrong:
        raise ValueError(f"tensors do not have the shapes of {type(template).__name__}: {first_keys(wrong)}")
    return found


def _shape_problems(shape: Shape, origin: Origin, tensors: Mapping[str, Shape]) -> list[str]:
    if origin.whole is not None:
        there = tuple(tensors[origin.whole])
        return [] if there == shape else [f"{origin.whole} is {there} in the directory and {shape} in the model"]
    rows, *rest = shape[1:] if origin.stacked else shape
    found = []
    for parts in origin.parts:
        each = (rows // max(1, len(parts)), *rest)
        found += [f"{n} is {tensors[n]} in the directory and {each} in the model" for n in parts if tensors[n] != each]
    return found
