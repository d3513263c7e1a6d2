"""What must hold of TorchServe's own settings before a model is served with them. Standard library only."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import psutil

# What the handler prints in front of the one line that says why it cannot start; `make serve` looks for it.
STARTUP_ERROR = "gpt-fast cannot start: "

BLANKS = " \t\f"  # what java.util.Properties takes for space
ADDRESSES = (
    "inference_address",
    "management_address",
    "metrics_address",
    "grpc_inference_address",
    "grpc_management_address",
)
FORBIDDEN = {
    "enable_envvars_config": "TS_* environment variables would override this file",
    "install_py_dep_per_model": "an archive could install packages",
}


def parse_properties(text: str) -> dict[str, str]:
    """A .properties file as java.util.Properties.load reads it; the last of equal keys wins.

    Raises ValueError for a malformed \\uXXXX, at which Java gives up too.
    """
    return dict(map(_key_and_value, _logical_lines(text)))


def _logical_lines(text: str) -> Iterator[str]:
    """Lines without comments, each joined with those that a backslash at its end continues.

    A comment is not continued, whatever it ends with; a line that is continued may go on with # as with any character.
    """
    lines = iter(re.split("\r\n|\r|\n", text))
    for first in lines:
        line = first.lstrip(BLANKS)
        if not line or line[0] in "#!":
            continue
        while re.search(r"(?<!\\)(\\\\)*\\$", line):
            line = line[:-1] + next(lines, "").lstrip(BLANKS)
        yield line


def _key_and_value(line: str) -> tuple[str, str]:
    """The key ends at the first =, : or blank that no backslash escapes."""
    match = re.match(r"((?:\\.|[^\\=: \t\f])*)[ \t\f]*[=:]?[ \t\f]*(.*)", line, re.DOTALL)
    assert match is not None  # all of it may be empty
    return _unescape(match[1]), _unescape(match[2])


def check_properties(text: str, *, arguments: Sequence[str] = ()) -> list[str]:
    """The problems of a config.properties, one line each, empty when it is fit to serve with.

    arguments: TorchServe's command line, where `--disable-token-auth` and `--enable-model-api` win over the file.
    """
    try:
        properties = parse_properties(text)
    except ValueError as error:
        return [str(error)]
    problems = [
        f"{key}: {why} (got true, allowed false)" for key, why in FORBIDDEN.items() if is_true(properties.get(key, ""))
    ]
    urls = properties.get("allowed_urls", ".*")
    if is_true(properties.get("enable_model_api", "")) or "--enable-model-api" in arguments:
        problems += [
            f"allowed_urls: the model API could load from anywhere (got {url}, allowed file:// patterns or none)"
            for url in urls.split(",")
            if not (url.startswith("file://") or url == "none")
        ]
    if not asks_for_token(properties, arguments):
        problems += [
            f"{key}: not a loopback address while the token is off (got {properties[key]}, allowed 127.0.0.1, "
            "localhost or [::1]; any address with disable_token_authorization=false)"
            for key in ADDRESSES
            if key in properties and not is_loopback(properties[key])
        ]
    return problems


def asks_for_token(properties: Mapping[str, str], arguments: Sequence[str] = ()) -> bool:
    """Whether TorchServe answers only those who have its keys."""
    return not (is_true(properties.get("disable_token_authorization", "")) or "--disable-token-auth" in arguments)


def check_frontend(command: Sequence[str], *, cwd: Path, environ: dict[str, str]) -> list[str]:
    """`check_properties` for a running frontend, from its command line, working directory and environment."""
    return check_properties(frontend_settings(command, cwd=cwd, environ=environ), arguments=command)


def frontend_settings(command: Sequence[str], *, cwd: Path, environ: dict[str, str]) -> str:
    """The text of the file that a frontend reads: $TS_CONFIG_FILE, else `-f`, else ./config.properties; "": none."""
    flag = command[command.index("-f") + 1] if "-f" in command else "config.properties"
    path = cwd / environ.get("TS_CONFIG_FILE", flag)
    return path.read_text(encoding="latin-1") if path.is_file() else ""


def own_frontend() -> psutil.Process | None:
    """The TorchServe that started this process; None outside TorchServe."""
    import psutil

    parents = psutil.Process(os.getpid()).parents()
    return next((parent for parent in parents if "org.pytorch.serve.ModelServer" in parent.cmdline()), None)


def check_own_frontend() -> list[str]:
    """`check_frontend` for the TorchServe that started this process; empty outside TorchServe."""
    frontend = own_frontend()
    if frontend is None:
        return []
    return check_frontend(frontend.cmdline(), cwd=Path(frontend.cwd()), environ=frontend.environ())


def own_frontend_asks_for_token() -> bool:
    """`asks_for_token` for the TorchServe that started this process; False outside TorchServe."""
    frontend = own_frontend()
    if frontend is None:
        return False
    command = frontend.cmdline()
    text = frontend_settings(command, cwd=Path(frontend.cwd()), environ=frontend.environ())
    return asks_for_token(parse_properties(text), command)


def close_key_file() -> None:
    """Make the keys of the TorchServe that started this process its user's alone: a copy may have been left open."""
    frontend = own_frontend()
    keys = Path(frontend.cwd()) / "key_file.json" if frontend else None
    if keys is not None and keys.is_file() and keys.stat().st_uid == os.geteuid():
        keys.chmod(0o600)


def is_true(value: str) -> bool:
    """Java's Boolean.parseBoolean."""
    return value.lower() == "true"


def is_loopback(address: str) -> bool:
    """Whether `http://host:port`, `host` or a unix socket is reachable from this machine only."""
    if address.startswith("unix:"):
        return True
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(address: str) -> str:
    """The host of `http://host:port`, `host:port` or a bare host, IPv6 with or without brackets; "" of what is none."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        pass
    try:
        return urlsplit(address if "//" in address else "//" + address).hostname or ""
    except ValueError:  # half a bracket
        return ""


def _unescape(text: str) -> str:
    letters = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}

    def plain(match: re.Match[str]) -> str:
        code, letter = match.groups()
        if letter == "u":
            raise ValueError(f"malformed \\u escape (got {text!r}, allowed four hexadecimal digits after it)")
        return chr(int(code, 16)) if code else letters.get(letter, letter)

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.?))", plain, text, flags=re.DOTALL)
