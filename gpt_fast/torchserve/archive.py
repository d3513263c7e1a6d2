"""Put handler, model_config.yaml and what they need of the package into an archive that TorchServe serves.

    gpt-fast archive                                  model_store/gpt-fast.tar.gz
    gpt-fast archive --format no-archive              model_store/gpt-fast/, whose yaml can be edited in place
    gpt-fast archive --bundle-only                    build/bundle/, to call torch-model-archiver by hand

The archiver copies the *contents* of `--extra-files DIR` to the archive's root, so the package is staged one
folder down: build/bundle/gpt_fast. Commands that measure, convert or quantize stay out (served_files.py).
Nothing is built when nothing changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from gpt_fast.cli.errors import one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.places import PACKAGE_HOME, home, nearest, shipped
from gpt_fast.files import locked
from gpt_fast.serve import frontend_keys
from gpt_fast.serve.archive_files import write_sums
from gpt_fast.serve.model_config import problems_of
from gpt_fast.torchserve.same_bytes import rewrite_folder, rewrite_tgz
from gpt_fast.torchserve.served_files import served_files

MODEL_NAME = "gpt-fast"
VERSION = "1.0"
CONFIG = "model_config.yaml"


def package_files(root: Path) -> list[Path]:
    """The package's files relative to root: git's own and new ones; without git, all but caches."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "gpt_fast"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        files = {Path(name) for name in names if name}
    except (OSError, subprocess.CalledProcessError):
        files = set()
    if not files:  # no repository, or one around a virtual environment that it ignores
        files = {p.relative_to(root) for p in (root / "gpt_fast").rglob("*") if "__pycache__" not in p.parts}
    return sorted(f for f in files if (root / f).is_file())


def stage_bundle(root: Path, bundle: Path, *, handler: Path | None = None, config: Path | None = None) -> None:
    """A fresh copy of what `handler` needs of the package, under bundle/gpt_fast, and the list of what is archived.

    config: the yaml that goes with it, unless it may be edited afterwards.
    """
    handler = handler or shipped("handler.py")
    shutil.rmtree(bundle, ignore_errors=True)
    archived = {handler.name: handler} | ({CONFIG: config} if config else {})
    for name in served_files(handler, package_files(root), root):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, bundle / name)
        archived[name.as_posix()] = bundle / name
    write_sums(bundle, archived)


def config_text(path: Path, model: str) -> str:
    """The yaml to ship: the file as it stands, or with handler.checkpoint_path set to `model`.

    Where its own checkpoint is a GGUF, published weights or a pulled model's name, to what that is converted to.
    """
    text = path.read_text(encoding="utf-8")
    model = model or own_model(text)
    if not model:
        return text
    config = frontend_keys.parse(text)
    config["handler"]["checkpoint_path"] = model
    return yaml.safe_dump(config, sort_keys=False)


def own_model(text: str) -> str:
    """The converted checkpoint of what a yaml names, "" where it can stand as it is; checks come later."""
    try:
        named = str(checkpoint_of(text, Path()))
        resolved = resolve_model(named, home())
    except ValueError:
        return ""
    return "" if resolved == named else resolved


def check_config(text: str, *, own_handler: bool) -> None:
    """Raises ValueError, one line of all problems, where TorchServe or our handler would not serve as the yaml says."""
    config = frontend_keys.parse(text)
    problems = problems_of(config, root=home()) if own_handler else frontend_keys.check_frontend_keys(config)
    if problems:
        raise ValueError("model_config.yaml: " + "; ".join(problems))


def checkpoint_of(text: str, root: Path) -> Path:
    """Where a yaml's checkpoint lies: relative paths count from root. Raises ValueError in one line."""
    try:
        path = yaml.safe_load(text)["handler"]["checkpoint_path"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"handler.checkpoint_path: not in the yaml (got {error!r}, allowed a path)") from error
    return root / str(path)


def resolve_model(model: str, root: Path) -> str:
    """MODEL of `make serve`: a checkpoint's path, org/name under checkpoints/, or a pulled org/name:quant.

    A GGUF and published weights are converted here and now. "" stays "".
    """
    if not model:
        return model
    named = root / model
    if (named.suffix == ".safetensors" and named.exists()) or (named / "manifest.json").exists():
        return model
    from gpt_fast.convert.named import converted, pulled  # which needs torch

    if named.exists():
        made = converted(str(named))
        return model if made == named else str(made)
    under = Path("checkpoints") / model
    if (root / under).is_dir():
        return str(under)
    if found := pulled(model):
        return str(found.absolute())
    raise ValueError(
        f"MODEL: no such checkpoint (got {model}, allowed a directory, a weights file, a GGUF or org/name of one under "
        f"checkpoints/; gpt-fast pull {model} makes one)"
    )


def digest(paths: list[Path], extra: str) -> str:
    """One hash over names and bytes."""
    state = hashlib.sha256(extra.encode())
    for path in paths:
        state.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return state.hexdigest()


def archiver() -> str:
    """The program of the environment that runs us, which need not be on PATH, else the one that is."""
    found = shutil.which("torch-model-archiver", path=Path(sys.executable).parent) or shutil.which(
        "torch-model-archiver"
    )
    if found is None:
        raise ValueError("torch-model-archiver: not installed (pip install torch-model-archiver==0.12.0)")
    return found


def run_archiver(handler: Path, config: Path, bundle: Path, fmt: str, out: Path) -> Path:
    """torch-model-archiver into the empty folder `out`; what it made, the same bytes from the same files.

    It works in a folder of the temporary directory that is named after the model alone, so it gets a directory of its
    own.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [archiver(), "--model-name", MODEL_NAME]
    command += ["--version", VERSION, "--handler", str(handler), "--config-file", str(config)]
    command += ["--extra-files", str(bundle), "--archive-format", fmt, "--export-path", str(out)]
    with tempfile.TemporaryDirectory() as own:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"TMPDIR": own})
    made = next(out.iterdir())
    if made.is_dir():
        rewrite_folder(made)
    else:
        rewrite_tgz(made)
    return made


def replace(made: Path, target: Path) -> None:
    """Move into the store; a folder's old version goes first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(made, target)


def build(*, handler: Path, config: Path, model: str, fmt: str, store: Path, work: Path) -> Path:
    """Stage, archive and put into the store, unless the store's archive was made from the same bytes."""
    text = config_text(config, model)
    check_config(text, own_handler=handler == shipped("handler.py"))
    with locked(work / "lock"):
        return build_checked(text, handler=handler, fmt=fmt, store=store, work=work)


def build_checked(text: str, *, handler: Path, fmt: str, store: Path, work: Path) -> Path:
    staged_config = work / CONFIG
    staged_config.write_text(text, encoding="utf-8")
    stage_bundle(PACKAGE_HOME, work / "bundle", handler=handler, config=staged_config if fmt == "tgz" else None)
    sources = [handler, staged_config, *sorted(p for p in (work / "bundle").rglob("*") if p.is_file())]
    target = store / (f"{MODEL_NAME}.tar.gz" if fmt == "tgz" else MODEL_NAME)
    stamp = work / f"{fmt}.stamp"

    def fingerprint() -> str:  # an archive that someone else put there is replaced
        return digest(sources, f"{target} {target.stat().st_mtime_ns}")

    if target.exists() and stamp.exists() and stamp.read_text() == fingerprint():
        print(f"archive: {target} is up to date")
        return target
    replace(run_archiver(handler, staged_config, work / "bundle", fmt, work / "out"), target)
    stamp.write_text(fingerprint())
    print(f"archive: built {target}")
    return target


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast archive", description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--handler", type=Path, help="a handler of your own instead of the package's")
    flags.add_argument("--config", type=Path, default=nearest(CONFIG), help="the yaml to serve with")
    flags.add_argument("--model", default="", help="serve this checkpoint instead of the yaml's")
    flags.add_argument("--format", choices=["tgz", "no-archive"], default="tgz", help="a packed archive, or a folder")
    flags.add_argument("--model-store", type=Path, default=home() / "model_store", help="where it goes")
    flags.add_argument("--work-dir", type=Path, default=home() / "build" / "archive", help="for what it is made from")
    flags.add_argument("--bundle-only", action="store_true", help="stage build/bundle/gpt_fast and stop")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors("archive"):
        run(parser().parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.bundle_only:
        with locked(home() / "build" / "lock"):
            stage_bundle(PACKAGE_HOME, home() / "build" / "bundle")
        print("bundle: build/bundle/gpt_fast")
        return
    build(
        handler=args.handler or shipped("handler.py"),
        config=args.config,
        model=resolve_model(args.model, home()),
        fmt=args.format,
        store=args.model_store,
        work=args.work_dir,
    )
