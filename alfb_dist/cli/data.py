"""`alfb data`: prepare token files."""

from __future__ import annotations

import argparse
from typing import Any

from alfb_dist.distributed.launch.signals import DONE


def add(commands: Any) -> None:
    """Add `alfb data` to the commands."""
    data = commands.add_parser("data", help="prepare token files").add_subparsers(required=True, metavar="ACTION")
    prepare = data.add_parser(
        "prepare",
        help="turn text into token files",
        description="Turn text into two token files, one for training and one for validation.",
    )
    prepare.add_argument("source", nargs="+", help='text files, directories, or "python-stdlib"')
    prepare.add_argument("--cache", default="data-cache", help="directory for the token files (default: data-cache)")
    prepare.add_argument(
        "--tokenizer",
        default="bytes",
        help='"bytes" (default), a tokenizer.json, or the directory of a transformers tokenizer',
    )
    prepare.add_argument(
        "--end-token", help="the tokenizer's end-of-document token, if it is not one of the usual ones"
    )
    prepare.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        help="fraction of the files to keep for validation (default: 0.05)",
    )
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
    print(f"skipped: {prepared.num_empty} empty and {prepared.num_undecodable} undecodable files")
    return DONE
