#!/usr/bin/env python3
"""Download a model's config, tokenizer and weights from the Hugging Face Hub into checkpoints/REPO_ID/hf.

Only files that conversion can use are fetched: safetensors where the repository has them, else .bin, else Meta's
consolidated .pth. The revision is resolved to a commit first and noted in hf/download.json. Next:

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/REPO_ID
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from gpt_fast.checkpoint.side_names import is_side_file
from gpt_fast.cli.errors import one_line_errors
from gpt_fast.cli.hub import why_unreachable
from gpt_fast.convert.hf import DOWNLOADED
from gpt_fast.files import write_json

WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
    r"consolidated\.\d+\.pth|params\.json",
)


def choose_files(names: Iterable[str]) -> list[str]:
    """The files to fetch: config, tokenizer, and the first kind of weights there is."""
    names = list(names)
    for pattern in WEIGHTS:
        weights = [name for name in names if re.fullmatch(pattern, name)]
        if any(name.endswith((".safetensors", ".bin", ".pth")) for name in weights):
            return sorted({*weights, *(name for name in names if name == "config.json" or is_side_file(name))})
    raise ValueError(f"no weights at the top of the repository (got {', '.join(sorted(names)) or 'no files'})")


def download(repo_id: str, out_dir: Path, *, revision: str | None, token: str | None) -> str:
    """Fetch the chosen files of one commit into out_dir; the commit's hash."""
    problem = why_unreachable()
    if problem is not None:
        raise ValueError(f"{repo_id}: {problem}")
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi(token=token).model_info(repo_id, revision=revision)
    names = choose_files(sibling.rfilename for sibling in info.siblings or ())
    (out_dir / DOWNLOADED).unlink(missing_ok=True)
    snapshot_download(repo_id, revision=info.sha, allow_patterns=names, local_dir=out_dir, token=token)
    write_json({"repo_id": repo_id, "commit": info.sha}, out_dir / DOWNLOADED)
    return str(info.sha)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, help="e.g. meta-llama/Llama-2-7b-chat-hf")
    parser.add_argument("--hf_token", help="access token of a gated repository (else HF_TOKEN, else a saved login)")
    parser.add_argument("--revision", help="branch, tag or commit (the default branch)")
    parser.add_argument("--out_dir", type=Path, help="where to put the files (checkpoints/REPO_ID/hf)")
    args = parser.parse_args()
    out_dir = args.out_dir or Path("checkpoints") / args.repo_id / "hf"
    commit = download(args.repo_id, out_dir, revision=args.revision, token=args.hf_token)
    print(f"downloaded {args.repo_id} at {commit} to {out_dir}")


if __name__ == "__main__":
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with one_line_errors("download", also=(HFValidationError, *HfHubHTTPError.__bases__)):  # its HTTP library's too
        main()
