"""The sizes of a benchmark: one MoE block, how its tokens are routed, and which sizes `--scaling` varies."""

from __future__ import annotations

from dataclasses import dataclass, replace

ROUTINGS = ("balanced", "hot_expert", "hot_rank")
FLOOR = "products alone"
"""What all contestants are compared with: the block's matrix products and nothing else."""
DTYPES = ("float32", "bfloat16", "float16")
AXES = {
    "experts": (16, 32, 64, 128, 256, 512),
    "topk": (1, 2, 4, 8, 16),
    "tokens": (512, 1024, 2048, 4096, 8192),
    "ranks": (1, 2, 4, 8),
}
"""The sizes that `--scaling` can vary, each with its default values."""


@dataclass(frozen=True)
class Case:
    """One MoE block: `tokens` on each rank, SwiGLU experts of width `inter`, one shared expert.

    routing: "balanced" is random and even; in "hot_expert" half of the tokens choose expert 0, in "hot_rank" half of
    the tokens choose only experts of the first half.
    """

    tokens: int = 2048
    hidden: int = 256
    inter: int = 128
    experts: int = 32
    topk: int = 4
    ranks: int = 1
    routing: str = "balanced"
    dtype: str = "float32"

    @property
    def rows(self) -> int:
        """Routed rows on each rank, one for each expert of each token."""
        return self.tokens * self.topk

    def check(self) -> None:
        """Raise ValueError naming the first field that is out of range."""
        for name in ("tokens", "hidden", "inter", "experts", "topk", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, valid in (("routing", ROUTINGS), ("dtype", DTYPES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}")
        if self.topk > self.experts:
            raise ValueError(f"topk ({self.topk}) must not be more than experts ({self.experts})")
        if self.routing == "hot_rank" and self.experts < 2 * self.topk:
            raise ValueError(
                f"hot_rank needs topk ({self.topk}) experts in each half: experts ({self.experts}) must be at least "
                f"{2 * self.topk}"
            )
        if self.experts % self.ranks:
            raise ValueError(f"experts ({self.experts}) must be divisible by ranks ({self.ranks})")

    def describe(self) -> str:
        """Return the sizes in one line."""
        return (
            f"{self.tokens} tokens a rank, hidden {self.hidden}, inter {self.inter}, {self.experts} experts, "
            f"top {self.topk}, {self.ranks} rank(s), {self.routing}, {self.dtype}"
        )


def scaled(case: Case, axis: str, values: list[int] | None, cores: int) -> list[Case]:
    """Return the case with each value of the axis; without `values`, with each of AXES that is valid for it.

    By default there are no more ranks than cores. Raises ValueError if one of `values` is not valid.
    """
    cases = [replace(case, **{axis: value}) for value in values or AXES[axis]]  # type: ignore[arg-type]
    if values:
        for scaled_case in cases:
            scaled_case.check()
        return cases
    return [c for c in cases if _valid(c) and (axis != "ranks" or c.ranks <= cores)]


def _valid(case: Case) -> bool:
    try:
        case.check()
    except ValueError:
        return False
    return True
