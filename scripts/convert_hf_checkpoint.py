#!/usr/bin/env python3
"""Convert published weights to a checkpoint directory: model.safetensors, config, tokenizer and manifest.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/REPO_ID

reads checkpoints/REPO_ID/hf, where scripts/download.py puts a model, and writes into checkpoints/REPO_ID. Weights
may be safetensors or .bin (sharded or not), Meta's consolidated.NN.pth with params.json, or gpt-fast's own
model.pth / model_int8.pth (give the file, with config.json beside it). The architecture comes from config.json
(else params.json) and never from a name; whatever is unknown is refused by name.
"""

import argparse
from pathlib import Path

from gpt_fast.cli.errors import one_line_errors
from gpt_fast.convert.hf import is_gpt_fast_int8, open_job
from gpt_fast.convert.run import DTYPES, convert
from gpt_fast.convert.upstream_int8 import convert_int8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="the directory to write")
    parser.add_argument("--source", type=Path, help="directory or .pth file to read (CHECKPOINT_DIR/hf)")
    parser.add_argument("--dtype", choices=["keep", *DTYPES], default="keep", help="of the weights written (keep)")
    args = parser.parse_args()
    source = args.source or args.checkpoint_dir / "hf"
    if source.resolve() == args.checkpoint_dir.resolve():
        raise ValueError(
            "--source: must be another directory than --checkpoint_dir, whose model.safetensors is written"
        )
    if is_gpt_fast_int8(source):
        convert_int8(open_job(source), args.checkpoint_dir)
    else:
        convert(open_job(source), args.checkpoint_dir, dtype=args.dtype)
    print(f"converted {source} to {args.checkpoint_dir}")


if __name__ == "__main__":
    with one_line_errors("convert_hf_checkpoint"):
        main()
