"""`alfb bench`: time an MoE block of given sizes against transformers' own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alfb_dist.bench.sizes import AXES, DTYPES, ROUTINGS, Case, scaled
from alfb_dist.config import load_config
from alfb_dist.distributed.launch.signals import DONE

SIZES = {
    "tokens": "tokens per rank",
    "hidden": "model width",
    "inter": "width of an expert",
    "experts": "number of experts",
    "topk": "experts per token",
    "ranks": "number of ranks",
}


def add(commands: Any) -> None:
    """Add `alfb bench` to the commands."""
    bench = commands.add_parser(
        "bench",
        help="time an MoE block against transformers' own",
        description="Time an MoE block against transformers' own, in turns in one run.",
    )
    bench.add_argument(
        "config", nargs="?", type=Path, help="configuration file to take the sizes from; options override it"
    )
    for name, about in SIZES.items():
        default = getattr(Case(), name)
        bench.add_argument(f"--{name}", type=int, metavar="N", help=f"{about} (default: {default})")
    bench.add_argument(
        "--routing", choices=ROUTINGS, default="balanced", help="how tokens are routed (default: balanced)"
    )
    bench.add_argument("--dtype", choices=DTYPES, help="dtype of weights and tokens (default: float32)")
    bench.add_argument("--seconds", type=float, default=20.0, metavar="N", help="seconds per case (default: 20)")
    bench.add_argument("--scaling", choices=tuple(AXES), help="vary this size and print a table")
    bench.add_argument("--values", help="values for --scaling, such as 16,64,256")
    bench.add_argument("--out", type=Path, help="directory for bench.json, bench.md and bench.html")
    bench.set_defaults(run=_bench)


def _sizes_of(path: Path) -> dict[str, Any]:
    """Return the sizes of a configuration's first MoE block and of its micro-batch."""
    config = load_config(path, [])

    from alfb_dist.moe.families.blocks import moe_blocks
    from alfb_dist.training.model import meta_model

    model: Any = meta_model(config)
    block = next(iter(moe_blocks(model)), None)
    gate_up = None if block is None else getattr(block.module.experts, "gate_up_proj", None)
    if block is None or gate_up is None or gate_up.dim() != 3:
        raise ValueError(f"{path}: {type(model).__name__} has no MoE block with fused SwiGLU experts to benchmark")
    return {
        "tokens": config.train.micro_batch * config.data.sequence_length,
        "hidden": gate_up.shape[2],
        "inter": gate_up.shape[1] // 2,
        "experts": block.num_experts,
        "topk": block.gate.top_k,
        "ranks": config.parallel.ep_degree,
        "dtype": config.model.dtype,
    }


def _case(arguments: argparse.Namespace) -> Case:
    sizes = {} if arguments.config is None else _sizes_of(arguments.config)
    given = {name: getattr(arguments, name) for name in (*SIZES, "dtype")}
    sizes |= {name: value for name, value in given.items() if value is not None}
    case = Case(**sizes, routing=arguments.routing)
    case.check()
    return case


def _values(arguments: argparse.Namespace) -> list[int] | None:
    if arguments.values is None:
        return None
    if arguments.scaling is None:
        raise ValueError("--values needs --scaling")
    try:
        return [int(value) for value in arguments.values.split(",")]
    except ValueError:
        raise ValueError(f"--values must be comma-separated integers, got {arguments.values!r}") from None


def _bench(arguments: argparse.Namespace) -> int:
    import os

    if not arguments.seconds > 0:
        raise ValueError(f"--seconds must be more than 0, got {arguments.seconds:g}")
    case, values = _case(arguments), _values(arguments)
    cases = [case]
    if arguments.scaling:
        cases = scaled(case, arguments.scaling, values, len(os.sched_getaffinity(0)))

    from rich.console import Console

    from alfb_dist.bench.spawn import measure
    from alfb_dist.bench.tables import machine

    console = Console(highlight=False)
    figures = measure(cases, arguments.seconds, console.print, with_memory=arguments.scaling is None)
    _show(console, figures, arguments.scaling)
    console.print(machine())
    if arguments.out is not None:
        _write(arguments.out, figures, arguments.scaling)
    return DONE


def _table(figures: list[dict[str, Any]], axis: str | None) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    from alfb_dist.bench.tables import HEAD, case_rows, scaling_rows, title

    if axis is None:
        return title(figures[0]), HEAD, case_rows(figures[0])
    head, rows = scaling_rows(figures, axis)
    return f"{title(figures[0])}; {axis} varies. Milliseconds, and times the products alone", head, rows


def _show(console: Any, figures: list[dict[str, Any]], axis: str | None) -> None:
    from rich.table import Table

    heading, head, rows = _table(figures, axis)
    table = Table(*head, title=heading, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _write(folder: Path, figures: list[dict[str, Any]], axis: str | None) -> None:
    import json

    from alfb_dist.bench.plot import document
    from alfb_dist.bench.tables import machine, markdown

    heading, head, rows = _table(figures, axis)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")
    (folder / "bench.md").write_text(f"{heading}\n\n{markdown(head, rows)}\n{machine()}\n")
    (folder / "bench.html").write_text(document(figures, axis, machine()))
    print(folder / "bench.html")
