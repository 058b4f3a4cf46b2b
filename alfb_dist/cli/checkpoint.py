"""`alfb checkpoint`: inspect, verify and convert checkpoints and transformers models."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alfb_dist.distributed.launch.signals import DONE

if TYPE_CHECKING:
    from alfb_dist.config.tables import ModelConfig

CHECKPOINT = "a checkpoint, such as runs/demo/checkpoints/step-00000200"
EITHER = f"{CHECKPOINT}, or the directory of a transformers model"


def add(commands: Any) -> None:
    """Add `alfb checkpoint` to the commands."""
    actions = commands.add_parser("checkpoint", help="inspect, verify and convert checkpoints").add_subparsers(
        required=True, metavar="ACTION"
    )
    inspect = actions.add_parser("inspect", help="describe a checkpoint or a transformers model")
    inspect.add_argument("path", type=Path, help=EITHER)
    inspect.set_defaults(run=_inspect)
    verify = actions.add_parser(
        "verify",
        help="check that one is undamaged, or that two compute the same",
        description="Check that a checkpoint or a transformers model is undamaged or, with --against, that two compute "
        "the same logits and have the same biases. Exit code 0: yes; 1: no.",
    )
    verify.add_argument("path", type=Path, help=EITHER)
    verify.add_argument(
        "--against", type=Path, metavar="OTHER", help="compare with OTHER, also a checkpoint or a transformers model"
    )
    verify.add_argument(
        "--tokens",
        default="256",
        metavar="N|FILE",
        help="compare on N random tokens, the ids in a text file, or the first 256 of a token file (default: 256)",
    )
    verify.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference of logits to accept (default: 0, equal bits)"
    )
    verify.add_argument(
        "--config", type=Path, help="config.json of the checkpoint's run (default: in the run's directory)"
    )
    verify.set_defaults(run=_verify)
    _add_conversions(actions)


def _add_conversions(actions: Any) -> None:
    export = actions.add_parser(
        "to-hf",
        help="convert a checkpoint to a model that transformers loads",
        description="Convert a checkpoint to a model that transformers loads, in one process.",
    )
    export.add_argument("path", type=Path, metavar="CHECKPOINT", help=CHECKPOINT)
    export.add_argument("out", type=Path, metavar="OUT", help="a new directory")
    export.add_argument("--config", type=Path, help="config.json of the run (default: in the run's directory)")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: the run's)")
    export.add_argument(
        "--bias-sidecar",
        action="store_true",
        help="write biases that the model's family has no place for to a file of their own",
    )
    export.set_defaults(run=_to_hf)
    start = actions.add_parser(
        "from-hf",
        help="make the directory of a run that continues from a released model",
        description="Make the directory of a run that continues from a released model, in one process.",
    )
    start.add_argument("path", type=Path, metavar="MODEL", help="the directory of a transformers model")
    start.add_argument("out", type=Path, metavar="RUN", help="a new directory, such as runs/mine")
    start.set_defaults(run=_from_hf)
    reshard = actions.add_parser(
        "reshard",
        help="change the layout of a transformers model",
        description="Change the layout of a transformers model, in one process. A checkpoint needs no change: it is "
        "only verified, and checked against --ep.",
    )
    reshard.add_argument("path", type=Path, help=EITHER)
    reshard.add_argument(
        "out",
        type=Path,
        nargs="?",
        metavar="OUT",
        help="a new directory; not for checkpoints, which load at any ep_degree",
    )
    reshard.add_argument("--ep", type=int, default=1, metavar="N", help="the ep_degree to load it with (default: 1)")
    reshard.add_argument(
        "--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="largest size of a file (default: 5e9)"
    )
    for parser in (export, reshard):
        parser.add_argument(
            "--layout",
            choices=("auto", "fused", "per_expert"),
            default="auto",
            help="of the experts: fused as in the model, per_expert as on the hub, auto as transformers does (default)",
        )
    reshard.set_defaults(run=_reshard)


def _is_checkpoint(path: Path) -> bool:
    from alfb_dist.checkpoint.manifest import NAME

    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    return (path / NAME).is_file() or not (path / "config.json").is_file()


def _model_of_run(checkpoint: Path, file: Path | None) -> ModelConfig:
    """Return the [model] table of a checkpoint's run. file: the run's config.json, if it is elsewhere."""
    import json

    from alfb_dist.config.tables import ModelConfig

    file = file or checkpoint.resolve().parent.parent / "config.json"
    try:
        return ModelConfig.model_validate(json.loads(file.read_text())["config"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not describe a model ({error}): give the run's config.json with --config"
        ) from error


def _inspect(arguments: argparse.Namespace) -> int:
    if _is_checkpoint(arguments.path):
        from alfb_dist.checkpoint import describe

        found = describe(arguments.path)
    else:
        from alfb_dist.pretrained import describe_folder

        found = describe_folder(arguments.path)
    for name, value in found.items():
        print(f"{name}: {value}")
    return DONE


def _to_hf(arguments: argparse.Namespace) -> int:
    import torch

    from alfb_dist.pretrained import to_hf
    from alfb_dist.training.model import transformers_config

    model = _model_of_run(arguments.path, arguments.config)
    to_hf(
        arguments.path,
        arguments.out,
        transformers_config(model),
        dtype=getattr(torch, arguments.dtype or model.dtype),
        layout=arguments.layout,
        bias_sidecar=arguments.bias_sidecar,
        origin=Path(model.path) if model.path else None,
    )
    print(arguments.out)
    return DONE


def _from_hf(arguments: argparse.Namespace) -> int:
    from alfb_dist.pretrained import from_hf

    print(from_hf(arguments.path, arguments.out))
    run = f"--set run.folder={arguments.out.parent} --set run.name={arguments.out.name} --set run.resume=true"
    print(f"continue with: alfb train CONFIG {run}")
    return DONE


def _reshard(arguments: argparse.Namespace) -> int:
    checkpoint = _is_checkpoint(arguments.path)
    if checkpoint:
        _check_undamaged(arguments.path)
    elif arguments.out is None:
        raise ValueError("OUT is missing: give the directory to write")
    for layer, count in _expert_counts(arguments.path, checkpoint).items():
        if arguments.ep < 1 or count % arguments.ep:
            raise ValueError(f"num_experts ({count}) of {layer} must be divisible by --ep ({arguments.ep})")
    if checkpoint:
        print(f"{arguments.path}: undamaged; it loads at ep_degree {arguments.ep} unchanged, nothing was written")
        return DONE
    from alfb_dist.pretrained import relayout

    relayout(arguments.path, arguments.out, layout=arguments.layout, max_shard_bytes=arguments.max_shard_bytes)
    print(arguments.out)
    return DONE


def _expert_counts(path: Path, checkpoint: bool) -> dict[str, int]:
    if checkpoint:
        from alfb_dist.checkpoint import describe

        found: dict[str, int] = describe(path)["num_experts"]
    else:
        from alfb_dist.pretrained import describe_folder

        found = describe_folder(path)["experts"]
    return found


def _check_undamaged(checkpoint: Path) -> None:
    from alfb_dist.checkpoint import verify

    if problems := verify(checkpoint):
        raise ValueError("; ".join(problems))


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.against is not None:
        return _compare(arguments)
    if not _is_checkpoint(arguments.path):
        from alfb_dist.pretrained import describe_folder

        found = describe_folder(arguments.path)
        print(f"{arguments.path}: all {found['tensors']} tensors of {found['model']} are present (it has no hashes)")
        return DONE
    from alfb_dist.checkpoint import verify

    problems = verify(arguments.path)
    print("\n".join(problems) if problems else f"{arguments.path}: undamaged")
    return 1 if problems else DONE


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from alfb_dist.pretrained.logits import compare

    paths = (arguments.path, arguments.against)
    configs = [_transformers_config(path, arguments.config) for path in paths]
    ids_T = _tokens(arguments.tokens, configs[0].get_text_config().vocab_size)
    found = compare([partial(_read_model, path, config) for path, config in zip(paths, configs)], ids_T)
    table = Table("quantity", "value", title=f"{arguments.against} against {arguments.path}")
    table.add_row("positions", str(found.positions))
    table.add_row("largest difference of logits", f"{found.max_logit_difference:.6g}")
    table.add_row("logits equal to the last bit", "yes" if found.same_bits else "no")
    table.add_row("positions with the same most likely token", f"{found.same_best} of {found.positions}")
    table.add_row("largest difference of biases", f"{found.max_bias_difference:.6g}")
    Console().print(table)
    same = found.within(arguments.tolerance)
    limit = f"within {arguments.tolerance:g}" if arguments.tolerance else "to the last bit"
    print(f"{'the same' if same else 'not the same'} (logits {limit}, biases to the last bit)")
    return DONE if same else 1


def _transformers_config(path: Path, file: Path | None) -> Any:
    from alfb_dist.pretrained import read_config
    from alfb_dist.training.model import transformers_config

    return transformers_config(_model_of_run(path, file)) if _is_checkpoint(path) else read_config(path)[0]


def _read_model(path: Path, config: Any) -> Any:
    from alfb_dist.pretrained.logits import read_checkpoint, read_folder

    return read_checkpoint(path, config) if _is_checkpoint(path) else read_folder(path)


def _tokens(given: str, vocab_size: int) -> Any:
    """Return the token ids that --tokens means: int64 (T,)."""
    import torch

    from alfb_dist.data import TokenFile
    from alfb_dist.data.token_file import MAGIC
    from alfb_dist.pretrained.logits import random_tokens

    if given.isdecimal() and int(given) > 0:
        return random_tokens(int(given), vocab_size)
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"--tokens ({given}) must be a number above 0 or a file")
    with open(path, "rb") as file:
        is_token_file = file.read(len(MAGIC)) == MAGIC
    if is_token_file:
        with TokenFile(path) as tokens:
            return torch.from_numpy(tokens.tokens(0, min(256, tokens.num_tokens)).astype("int64"))
    try:
        ids = [int(word) for word in path.read_text().replace(",", " ").strip(" []\n").split()]
    except ValueError as error:
        raise ValueError(f"--tokens ({given}) must contain token ids: {error}") from error
    if not ids or min(ids) < 0:
        raise ValueError(f"--tokens ({given}) must contain token ids of 0 or more")
    return torch.tensor(ids)
