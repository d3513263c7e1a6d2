"""gpt-fast convert: published weights, a GGUF, or a draft that was trained for a model, into a checkpoint directory.

gpt-fast convert --source HF_DIR --out_dir DIR
gpt-fast convert --source FILE.gguf --out_dir DIR
gpt-fast convert --source DRAFT --draft_for TARGET --out_dir DIR      the target's vocabulary and tokenizer

A source may be safetensors or .bin (sharded or not) with config.json, Meta's consolidated.NN.pth with params.json,
gpt-fast's own model.pth or model_int8.pth, or a GGUF, whose Q4_0, Q4_1 and Q8_0 blocks are kept beside its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt_fast.cli.errors import one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.progress import Bar
from gpt_fast.convert.draft import draft_job
from gpt_fast.convert.named import converted
from gpt_fast.convert.published import convert_published
from gpt_fast.convert.run import DTYPES, convert


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast convert", description=__doc__)
    add = flags.add_argument
    add("--source", type=Path, required=True, help="directory, .pth or .gguf file to read")
    add("--out_dir", type=Path, required=True, help="the checkpoint directory to write")
    add("--draft_for", type=Path, metavar="TARGET", help="the converted checkpoint that it will propose tokens to")
    add(
        "--dtype",
        choices=["keep", *DTYPES],
        default="keep",
        help="of the weights; keep: the source's, a GGUF's float32",
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors("convert"):
        if args.source.resolve() == args.out_dir.resolve():
            raise ValueError("--out_dir: must be another directory than --source")
        if args.draft_for is not None:
            convert(draft_job(args.source, converted(str(args.draft_for))), args.out_dir, dtype=args.dtype)
        else:
            with Bar("blocks") as bar:
                convert_published(args.source, args.out_dir, dtype=args.dtype, progress=bar)
        print(f"converted {args.source} to {args.out_dir}")


if __name__ == "__main__":
    main()
