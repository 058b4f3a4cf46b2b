"""`alfb data`: token files."""

from __future__ import annotations

import argparse
from typing import Any

from alfb_dist.distributed.launch.signals import DONE


def add(commands: Any) -> None:
    """The command and its options."""
    data = commands.add_parser("data", help="prepare token files").add_subparsers(required=True, metavar="ACTION")
    prepare = data.add_parser("prepare", help="turn text into token files")
    prepare.add_argument("source", nargs="+", help='files, folders, or "python-stdlib"')
    prepare.add_argument("--cache", default="data-cache", help="folder of the token files (default: data-cache)")
    prepare.add_argument("--tokenizer", default="bytes", help='"bytes", a tokenizer.json, or a transformers folder')
    prepare.add_argument("--end-token", help="the tokenizer's end-of-document token, if it is not a usual one")
    prepare.add_argument("--validation-fraction", type=float, default=0.05, help="share of the files (default: 0.05)")
    prepare.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from alfb_dist.data import TokenFile, prepare

    prepared = prepare(
        arguments.source,
        arguments.cache,
        tokenizer=arguments.tokenizer,
        end_token=arguments.end_token,
        validation_fraction=arguments.validation_fraction,
        progress=True,
    )
    for path in (prepared.train, prepared.validation):
        with TokenFile(path) as file:
            print(f"{path}: {file.num_tokens:,} tokens in {file.num_documents:,} documents")
    print(f"left out: {prepared.num_empty} empty and {prepared.num_undecodable} undecodable files")
    return DONE
