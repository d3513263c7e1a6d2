"""gpt-fast serve: OpenAI's and Anthropic's APIs at http://127.0.0.1:8000/v1, without TorchServe.

gpt-fast serve                                                # what ./model_config.yaml serves, as TorchServe would
gpt-fast serve --checkpoint_path DIR --port 9000
GPT_FAST_API_KEY=... gpt-fast serve --host 0.0.0.0 --ssl-certfile cert.pem --ssl-keyfile key.pem
torchrun --standalone --nproc_per_node=N -m gpt_fast.serve    # one model on N ranks

Ctrl-C or SIGTERM: running requests end, new ones get 503; a second one ends all.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt_fast.cli.errors import at_least, one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.serve.frontend_keys import parse
from gpt_fast.serve.model_config import ServeConfig, read_config

CONFIG = Path("model_config.yaml")
DEFAULTS = {"continuousBatching": True, "batchSize": 64, "handler": {"max_num_seqs": 16, "max_new_tokens": 256}}
OVERRIDES: dict[str, Callable[[str], Any]] = {  # of the configuration's `handler:` keys, by flags of their names
    "checkpoint_path": str,
    "served_model_name": str,
    "device": str,
    "dtype": str,
    "kv_cache": str,
    "max_seq_len": at_least(0),
    "max_num_seqs": at_least(1),
    "threads": at_least(0),
    "draft_checkpoint_path": str,
    "speculate": str,
}
PATHS = ("checkpoint_path", "draft_checkpoint_path")  # relative to where the command runs
NEEDED = ("uvicorn", "starlette", "prometheus_client")
INSTALL = "pip install 'uvicorn>=0.49' 'starlette>=1.0' 'prometheus_client>=0.22'"
KEY_VARIABLE = "GPT_FAST_API_KEY"


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast serve", description=__doc__)
    add = flags.add_argument
    add("--config", type=Path, help=f"TorchServe's model configuration (default: ./{CONFIG} where there is one)")
    add("--host", default="127.0.0.1", help="other than loopback only with a key (default: 127.0.0.1)")
    add("--port", type=port_number, default=8000, help="0: any that is free (default: 8000)")
    add(*both("api-key-file"), type=Path, metavar="FILE", help=f"keys, one a line, mode 600; or one in ${KEY_VARIABLE}")
    add(
        *both("cors-origin"),
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of it may ask; * only with keys",
    )
    add(*both("ssl-certfile"), type=Path, metavar="PEM", help="serve HTTPS")
    add(*both("ssl-keyfile"), type=Path, metavar="PEM", help="where the certificate's file does not hold the key")
    add(*both("drain-seconds"), type=at_least(0), default=60, help="for running requests to end (default: 60)")
    model = flags.add_argument_group("instead of the configuration's handler keys (docs/serving.md)")
    for name, kind in OVERRIDES.items():
        model.add_argument(f"--{name}", type=kind, help=f"handler.{name}")
    return flags


def both(name: str) -> tuple[str, str]:
    """A flag as servers spell it, and as gpt-fast does."""
    return f"--{name}", f"--{name.replace('-', '_')}"


def port_number(value: str) -> int:
    if not value.isdecimal() or int(value) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port (got {value!r}, allowed 0..65535)")
    return int(value)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with one_line_errors():
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise ValueError(f"{missing[0]}: not installed (the extra `server` has it: {INSTALL})")
        configs = read_configs(args)
        with at_rest():
            from gpt_fast.engine import ranks
    ranks.run_command(lambda group: run(args, *configs, group))


def run(args: argparse.Namespace, engine_config: EngineConfig, serve_config: ServeConfig, group: Any) -> None:
    """The command itself; on ranks, rank 0 serves and the others compute with it."""
    from gpt_fast.load.engine import start_following
    from gpt_fast.serve.asgi.guard import Rules, check_origins, check_reach, read_keys
    from gpt_fast.serve.asgi.serving import Serving, Site
    from gpt_fast.serve.asgi.uvicorn_server import read_tls
    from gpt_fast.serve.startup import prepare

    if group is not None and not group.leads:
        return start_following(prepare(engine_config, group), group)()
    check_origins(args.cors_origin)
    rules = Rules(read_keys(args.api_key_file, os.environ.get(KEY_VARIABLE)), tuple(args.cors_origin))
    check_reach(args.host, rules)
    tls = read_tls(args.ssl_certfile, args.ssl_keyfile)
    site = Site(host=args.host, port=args.port, rules=rules, tls=tls, drain_seconds=args.drain_seconds)
    try:
        Serving(site, prepare(engine_config, group), serve_config, group).run()
    except RuntimeError as error:
        sys.exit(f"gpt-fast gives up, to be started again: {error}")


def read_configs(args: argparse.Namespace) -> tuple[EngineConfig, ServeConfig]:
    """The configuration's file, or the defaults where there is none, with what the flags say instead."""
    path = args.config or (CONFIG if CONFIG.is_file() else None)
    yaml: dict[str, Any] = parse(path.read_text(encoding="utf-8")) if path else dict(DEFAULTS)
    check_ranks(yaml)
    handler = yaml.get("handler")
    given = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    given |= {name: checkpoint_of(given[name]) for name in PATHS if name in given}
    if isinstance(handler, dict):
        yaml = yaml | {"handler": handler | given}
        if "checkpoint_path" not in yaml["handler"]:
            raise ConfigError("--checkpoint_path", "is required where there is no ./model_config.yaml")
    root = Path(os.environ.get("GPT_FAST_ROOT") or (path.parent if path else "."))
    return read_config(yaml, root=root)


def check_ranks(yaml: dict[str, Any]) -> None:
    """ConfigError for a configuration of ranks where torchrun, which starts them, did not start this process."""
    if yaml.get("parallelType") and "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = yaml.get("torchrun")
        count = torchrun.get("nproc-per-node", 2) if isinstance(torchrun, dict) else 2
        way = f"torchrun --standalone --nproc_per_node={count} -m gpt_fast.serve ..., or a file without it"
        raise ConfigError("parallelType", f"its ranks are torchrun's to start (got one process, allowed {way})")


def checkpoint_of(name: str) -> str:
    """What a flag names, converted where it has to be: a directory, a weights file, a GGUF, a pulled ORG/NAME."""
    from gpt_fast.convert.named import converted  # all that converts: not for the help

    return str(converted(name).absolute())


if __name__ == "__main__":
    main()
