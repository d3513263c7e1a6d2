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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_fast.cli.errors import at_least, one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.serve.model_config import ServeConfig
from gpt_fast.serve.model_flags import add_model_flags, read_configs

NEEDED = ("uvicorn", "starlette", "prometheus_client")
INSTALL = "pip install 'uvicorn>=0.49' 'starlette>=1.0' 'prometheus_client>=0.22'"
KEY_VARIABLE = "GPT_FAST_API_KEY"


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast serve", description=__doc__)
    add = flags.add_argument
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
    add_model_flags(flags)
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
        configs = read_configs(args, check_ranks)
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


def check_ranks(yaml: dict[str, Any]) -> None:
    """ConfigError for a configuration of ranks where torchrun, which starts them, did not start this process."""
    if yaml.get("parallelType") and "TORCHELASTIC_RUN_ID" not in os.environ:
        torchrun = yaml.get("torchrun")
        count = torchrun.get("nproc-per-node", 2) if isinstance(torchrun, dict) else 2
        way = f"torchrun --standalone --nproc_per_node={count} -m gpt_fast.serve ..., or a file without it"
        raise ConfigError("parallelType", f"its ranks are torchrun's to start (got one process, allowed {way})")


if __name__ == "__main__":
    main()
