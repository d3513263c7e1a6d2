#!/usr/bin/env python3
"""Start, watch and stop TorchServe with the gpt-fast model.

serve.py start     start, wait until the model is ready, post request.json; a running one is reused
serve.py stop      refuse new requests, let the running ones end, stop, leave no process
serve.py watch     start anew what dies or is wedged (`start` leaves one in the background, in whose place this one
                   comes); on SIGTERM or Ctrl-C as `stop`
serve.py status    what runs; exit code 0 when the model is ready, 3 when not
serve.py env       export lines for a shell (see scripts/env.sh)
"""

import argparse
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from instance import ROOT, Instance, render_properties
from lifecycle import ServeError, end_watch, launch, locked, say, shut_down, wait_until_ready
from watch import Watch

from gpt_fast.serve.startup_check import check_properties
from gpt_fast.torchserve.archive import MODEL_NAME


def checked_properties(args: argparse.Namespace) -> str:
    """The settings to start with. Raises ServeError when they are not safe."""
    text = render_properties(args.properties, token=args.token)
    if problems := check_properties(text):
        raise ServeError("\n".join([f"{args.properties}: refused", *problems]))
    return text


def served_state(properties: str, archive: Path) -> str:
    """Changes when the settings or the archive do."""
    made = archive / "MAR-INF" / "MANIFEST.json" if archive.is_dir() else archive
    return hashlib.sha256(f"{properties}{archive}{made.stat().st_mtime_ns}".encode()).hexdigest()


def start(args: argparse.Namespace) -> None:
    instance = Instance(args.run_dir)
    properties = checked_properties(args)
    if not args.archive.exists():
        raise ServeError(f"--archive: no such file or directory (got {args.archive}, allowed what archive.py made)")
    state = served_state(properties, args.archive)
    with locked(instance):
        if instance.frontend():
            if instance.served().get("state") == state:
                say("already running; stop it with: make stop")
            else:
                say("already running with another archive or other settings: restarting")
                end_watch(instance)
                shut_down(instance, drain_seconds=args.drain_seconds)
        if not instance.frontend():
            end_watch(instance)  # of an instance that died
            instance.prepare(properties)
            launch(instance, args.archive)
        if not instance.is_ready():
            wait_until_ready(instance, args.start_seconds)
        instance.serve({"state": state, "archive": str(args.archive), "start_seconds": args.start_seconds})
        if not instance.watcher():
            start_watch(instance, args.drain_seconds)
    post_request(instance, args.request)
    print_next_steps(instance, args.request)


def start_watch(instance: Instance, drain_seconds: float) -> None:
    """`serve.py watch` in a session of its own; it has watched since when this returns."""
    command = [sys.executable, str(Path(__file__).resolve()), "watch", "--run-dir", str(instance.run_dir)]
    with open(instance.logs / "watch.log", "a") as log:
        process = subprocess.Popen(
            [*command, "--drain-seconds", str(drain_seconds)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o077,
        )
    while not instance.watcher():
        if process.poll() is not None:
            raise ServeError(f"the watch did not start; see {instance.logs}/watch.log")
        time.sleep(0.02)


class Stopped(BaseException):
    """Somebody asked the watch to end."""


def watch(args: argparse.Namespace) -> None:
    instance = Instance(args.run_dir)
    if not instance.served():
        raise ServeError(f"nothing is served in {instance.run_dir}; start it with: make serve")

    def stop_on(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # once is enough: the drain is bounded
        raise Stopped

    end_watch(instance)
    instance.watch_here()
    try:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, stop_on)
        Watch(instance, lambda text: say(f"{time.strftime('%FT%T%z')} {text}")).run()
    except Stopped:
        with locked(instance):
            shut_down(instance, drain_seconds=args.drain_seconds)
        say("stopped")
    finally:
        instance.watch_file.unlink(missing_ok=True)


def predict_command(instance: Instance, request: Path) -> list[str]:
    url = f"{instance.url('inference_address')}/predictions/{MODEL_NAME}"
    command = ["curl", "-sS", "-N", "--max-time", "600", url, "-T", os.path.relpath(request)]
    if key := instance.token("inference"):
        command += ["-H", f"Authorization: Bearer {key}"]
    return command


def post_request(instance: Instance, request: Path) -> None:
    """Send the example with curl, which shows each piece as it arrives."""
    say(f"posting {request.name}: {request.read_text().strip()}")
    timing = "\n[HTTP %{http_code}, %{time_total} s]\n"
    result = subprocess.run([*predict_command(instance, request), "--fail-with-body", "-w", timing])
    if result.returncode:
        raise ServeError(f"the example request failed (curl {result.returncode}); the server is up")


def print_next_steps(instance: Instance, request: Path) -> None:
    command = [arg for arg in predict_command(instance, request) if arg not in ("-sS", "--max-time", "600")]
    say("the server stays up. Next:")
    print("  " + shlex.join(command))
    print(f"  curl {instance.url('metrics_address')}/metrics")
    print(f"  logs: {os.path.relpath(instance.logs)}/     stop: make stop", flush=True)


def stop(args: argparse.Namespace) -> None:
    instance = Instance(args.run_dir)
    end_watch(instance)
    if not instance.processes():
        instance.clean()
        say("nothing runs")
        return
    with locked(instance):
        shut_down(instance, drain_seconds=args.drain_seconds)
    say("stopped")


def status(args: argparse.Namespace) -> int:
    instance = Instance(args.run_dir)
    frontend = instance.frontend()
    if frontend is None:
        say("not running")
        return 3
    say(f"TorchServe runs (pid {frontend.pid}), logs in {os.path.relpath(instance.logs)}/")
    for worker in instance.workers():
        say(f"worker {worker['id']}: {worker['status']} (pid {worker['pid']})")
    return 0 if instance.is_ready() else 3


def env(args: argparse.Namespace) -> None:
    instance = Instance(args.run_dir)
    instance.prepare(checked_properties(args))
    for name, value in instance.variables().items():
        print(f"export {name}={shlex.quote(value)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["start", "stop", "watch", "status", "env"])
    parser.add_argument("--archive", type=Path, default=ROOT / "model_store" / f"{MODEL_NAME}.tar.gz")
    parser.add_argument("--properties", type=Path, default=ROOT / "deploy" / "config.properties")
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".run", help="one folder per instance")
    parser.add_argument("--request", type=Path, default=ROOT / "request.json")
    parser.add_argument("--token", choices=["on", "off", ""], default="", help="default: as the properties say")
    parser.add_argument("--start-seconds", type=float, default=900.0, help="longest wait for the model")
    parser.add_argument("--drain-seconds", type=float, default=60.0, help="longest wait for running requests")
    args = parser.parse_args()
    args.run_dir = args.run_dir.resolve()
    args.archive = args.archive.absolute()
    return args


def main() -> int:
    args = parse_args()
    commands = {"start": start, "stop": stop, "watch": watch, "status": status, "env": env}
    try:
        return commands[args.command](args) or 0
    except (ServeError, ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
