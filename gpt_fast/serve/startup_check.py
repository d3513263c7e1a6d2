"""What must hold of TorchServe's own settings before a model is served with them. Standard library only."""

import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

# What the handler prints in front of the one line that says why it cannot start; `make serve` looks for it.
STARTUP_ERROR = "gpt-fast cannot start: "

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
    """Java's .properties format: `key=value`, `key: value` or `key value`; `\\` escapes and joins lines."""
    properties = {}
    for line in re.sub(r"\\\r?\n[ \t]*", "", text).splitlines():
        if match := re.match(r"\s*((?:\\.|[^\\#!:=\s])(?:\\.|[^\\:=\s])*)\s*[:=]?\s*(.*?)\s*$", line):
            properties[_unescape(match[1])] = _unescape(match[2])
    return properties


def check_properties(text: str, *, arguments: Sequence[str] = ()) -> list[str]:
    """The problems of a config.properties, one line each, empty when it is fit to serve with.

    arguments: TorchServe's command line, where `--disable-token-auth` and `--enable-model-api` win over the file.
    """
    properties = parse_properties(text)
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
    if is_true(properties.get("disable_token_authorization", "")) or "--disable-token-auth" in arguments:
        problems += [
            f"{key}: not a loopback address while the token is off (got {properties[key]}, allowed 127.0.0.1, "
            "localhost or [::1]; any address with disable_token_authorization=false)"
            for key in ADDRESSES
            if key in properties and not is_loopback(properties[key])
        ]
    return problems


def check_frontend(command: Sequence[str], *, cwd: Path, environ: dict[str, str]) -> list[str]:
    """`check_properties` for a running frontend, from its command line, working directory and environment.

    It reads the file that the frontend reads: $TS_CONFIG_FILE, else `-f`, else ./config.properties.
    """
    flag = command[command.index("-f") + 1] if "-f" in command else "config.properties"
    path = cwd / environ.get("TS_CONFIG_FILE", flag)
    text = path.read_text(encoding="latin-1") if path.is_file() else ""
    return check_properties(text, arguments=command)


def check_own_frontend() -> list[str]:
    """`check_frontend` for the TorchServe that started this process; empty outside TorchServe."""
    import psutil

    for parent in psutil.Process(os.getpid()).parents():
        command = parent.cmdline()
        if "org.pytorch.serve.ModelServer" in command:
            return check_frontend(command, cwd=Path(parent.cwd()), environ=parent.environ())
    return []


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
    """The host of `http://host:port`, `host:port` or a bare host, IPv6 with or without brackets."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return urlsplit(address if "//" in address else "//" + address).hostname or ""


def _unescape(text: str) -> str:
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", text)
