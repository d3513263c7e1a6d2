#!/usr/bin/env python3
"""Download a model's config, tokenizer and weights from the Hugging Face Hub into checkpoints/REPO_ID/hf.

Only files that conversion can use are fetched: safetensors where the repository has them, else .bin, else Meta's
consolidated .pth. The revision is resolved to a commit first and noted in hf/download.json. Next:

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/REPO_ID
"""

import argparse
from pathlib import Path

from gpt_fast.cli.errors import one_line_errors
from gpt_fast.cli.hub import why_unreachable
from gpt_fast.convert.hf import DOWNLOADED
from gpt_fast.convert.hub_files import choose_files
from gpt_fast.files import write_json


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
