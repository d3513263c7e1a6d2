"""gpt-fast pull: a model from the Hugging Face Hub, or from what its cache holds, as a checkpoint on this machine.

gpt-fast pull ORG/NAME                  its weights as they are
gpt-fast pull ORG/NAME:int8             and an int8 file of them; also :int4, :int4.g64, :int4-gptq, :int4-gptq.g64
gpt-fast pull ORG/NAME:Q4_0             of a repository of GGUFs: that one
gpt-fast pull DIR:int8, FILE.gguf       what is on this machine already

Whatever is there is not fetched, converted or quantized again, and a pull that was cut goes on where it stopped.
HF_TOKEN opens gated repositories; HF_HOME says where the cache is, HF_HUB_OFFLINE=1 that nothing else is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gpt_fast.checkpoint.choice import choose_weights
from gpt_fast.checkpoint.directory import find_weights, list_shards
from gpt_fast.checkpoint.manifest import read_manifest
from gpt_fast.cli.errors import one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.progress import Bar
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.convert.hub_files import Snapshot, choose_files, choose_gguf, fetch

with at_rest():
    from gpt_fast.convert.named import HUB_NAME, convert_into, converted, read_quant, root_to_pull_to
    from gpt_fast.convert.quantized import describe, quantize_checkpoint
    from gpt_fast.convert.run import DTYPES
    from gpt_fast.measure.calibration import calibration


class Pulled(NamedTuple):
    weights: Path  # what was asked for: a checkpoint's directory, or a file in it
    fetched: Snapshot | None  # None for what was on this machine


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast pull", description=__doc__)
    flags.add_argument("name", metavar="NAME[:QUANT]", help="ORG/NAME on the Hub, a directory or a GGUF")
    flags.add_argument("--revision", help="branch, tag or commit; the default branch unless said")
    flags.add_argument(
        "--out_dir", type=Path, help="the checkpoint directory to write; checkpoints/ORG/NAME unless said"
    )
    flags.add_argument(
        "--dtype", choices=["keep", *DTYPES], default="keep", help="of the weights that are not quantized"
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    args = parser().parse_args(argv)
    with one_line_errors("pull", also=(HFValidationError, *HfHubHTTPError.__bases__)):  # its HTTP library's too
        local, tag = read_local(args.name)
        if local is not None:
            pulled = pull_local(local, tag)
        else:
            pulled = pull(args.name, revision=args.revision, out_dir=args.out_dir, dtype=args.dtype)
        print(report(args.name, pulled))


def read_local(name: str) -> tuple[Path | None, str]:
    """The path on this machine that is meant, None for a name of the Hub, and the tag behind it."""
    if Path(name).exists():
        return Path(name), ""
    path, _, tag = name.rpartition(":")
    return (Path(path), tag) if path and Path(path).exists() else (None, "")


def pull_local(path: Path, tag: str) -> Pulled:
    made = converted(str(path))
    if not tag:
        find_weights(made)
        return Pulled(made, None)
    if (quant := read_quant(tag)) is None:
        raise ValueError(f":{tag}: no such quantization (allowed int8, int4, int4.gN, int4-gptq, int4-gptq.gN)")
    return Pulled(quantize_once(made if made.is_dir() else made.parent, *quant), None)


def pull(name: str, *, revision: str | None, out_dir: Path | None, dtype: str) -> Pulled:
    """Fetch, convert and quantize what is missing of ORG/NAME[:QUANT].

    Raises:
        ValueError: one line: a name that is none, no network and nothing in the cache, weights that do not convert.
    """
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: is no path on this machine and no name of the Hub (allowed ORG/NAME[:QUANT])")
    repo, tag = match[1], match[2] or ""
    quant = read_quant(tag)
    of_gguf = tag != "" and quant is None
    snapshot = fetch(repo, partial(choose_gguf, tag=tag) if of_gguf else choose_files, revision=revision)
    directory = out_dir or root_to_pull_to() / repo / (tag.upper() if of_gguf else "")
    source = snapshot.directory / snapshot.names[0] if of_gguf else snapshot.directory
    origin = {"repo_id": repo, "commit": snapshot.commit} | ({"gguf": snapshot.names[0]} if of_gguf else {})
    convert_into(directory, source, origin, dtype=dtype)
    return Pulled(quantize_once(directory, *quant) if quant else converted(str(directory)), snapshot)


def quantize_once(directory: Path, mode: str, groupsize: int) -> Path:
    """The quantized file beside the directory's weights, made unless its manifest has it."""
    kind = describe(mode, groupsize)
    weights = directory / f"model_{kind}.safetensors"
    listed = read_manifest(directory)
    if {weights.name, f"{weights.name}.index.json"} & listed.keys():
        return weights
    with Bar(kind) as bar:
        return quantize_checkpoint(
            directory,
            mode=mode,
            groupsize=groupsize,
            calibration=calibration(directory) if mode == "int4-gptq" else None,
            progress=bar,
        )


def report(name: str, pulled: Pulled) -> str:
    """What lies where and how large it is, and what to do with it."""
    weights = choose_weights(pulled.weights)
    directory = weights.weights.parent
    written = sum((directory / file).stat().st_size for file in read_manifest(directory))
    lines = [f"checkpoint: {size(written)} in {directory}"]
    if pulled.fetched is not None:
        lines.insert(0, f"fetched:    {size(pulled.fetched.nbytes)} in {pulled.fetched.directory}")
    served = sum(shard.stat().st_size for shard in list_shards(weights.weights))
    lines.append(f"serves:     {weights.weights.name}, {size(served)}")
    return "\n".join([*lines, f"next:       gpt-fast chat --checkpoint_path {name}"])


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
