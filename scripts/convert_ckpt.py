#!/usr/bin/env python3
"""Convert a trained draft model in Hugging Face form to a draft checkpoint for one target model.

    python scripts/convert_ckpt.py --checkpoint_dir DRAFT --target_dir checkpoints/REPO_ID --out_dir checkpoints/draft

A draft proposes the target's token ids, so both must have one vocabulary: the target's tokenizer is copied into the
draft, and a draft whose vocabulary size or tokenizer differs is refused with the first difference named.
"""

import argparse
from pathlib import Path

from gpt_fast.cli.errors import one_line_errors
from gpt_fast.convert.draft import draft_job
from gpt_fast.convert.run import DTYPES, convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="the draft, as saved by transformers")
    parser.add_argument("--target_dir", type=Path, required=True, help="the target's converted checkpoint")
    parser.add_argument("--out_dir", type=Path, required=True, help="the draft checkpoint directory to write")
    parser.add_argument("--dtype", choices=["keep", *DTYPES], default="keep", help="of the weights written (keep)")
    args = parser.parse_args()
    convert(draft_job(args.checkpoint_dir, args.target_dir), args.out_dir, dtype=args.dtype)
    print(f"converted {args.checkpoint_dir} to {args.out_dir}, a draft for {args.target_dir}")


if __name__ == "__main__":
    with one_line_errors("convert_ckpt"):
        main()
