#!/usr/bin/env python3
"""Convert one GGUF file (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K) to a checkpoint directory.

Architecture, tokenizer and chat template come from the file's metadata. Weights are dequantized; float32 (the
default) keeps their exact values, bfloat16 and float16 round them. Needs `pip install 'gguf>=0.17'`.
"""

import argparse
from pathlib import Path

from gpt_fast.cli.errors import one_line_errors
from gpt_fast.convert.gguf import gguf_job
from gpt_fast.convert.run import DTYPES, convert
from gpt_fast.text.gguf_tokenizer import tokenizer_json_from_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="the file to read")
    parser.add_argument("--out_dir", type=Path, required=True, help="the checkpoint directory to write")
    parser.add_argument("--dtype", choices=[*DTYPES], default="float32", help="of the weights written (float32)")
    args = parser.parse_args()
    job = gguf_job(args.gguf, make_tokenizer=tokenizer_json_from_gguf)
    convert(job, args.out_dir, dtype=args.dtype)
    print(f"converted {args.gguf} to {args.out_dir}")


if __name__ == "__main__":
    with one_line_errors("convert_gguf"):
        main()
