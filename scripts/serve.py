#!/usr/bin/env python3
"""Start, watch and stop TorchServe with the gpt-fast model.

serve.py start     start, wait until the model is ready, post request.json; a running one is reused
serve.py stop      refuse new requests, let the running ones end, stop, leave no process
serve.py status    what runs; exit code 0 when the model is ready, 3 when not
serve.py env       export lines for a shell (see scripts/env.sh)
"""

import argparse
import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from instance import ROOT, Instance, alive, render_properties, startup_error

from gpt_fast.serve.startup_check import check_properties
from gpt_fast.torchserve.archive import MODEL_NAME

KILL_SECONDS = 15  # TorchServe's own shutdown takes about 3 s


class ServeError(Exception):
    """Why a command failed, in one line."""


def say(text: str) -> None:
    print(f"serve: {text}", flush=True)


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
            if (instance.run_dir / "served").exists() and (instance.run_dir / "served").read_text() == state:
                say("already running; stop it with: make stop")
            else:
                say("already running with another archive or other settings: restarting")
                shut_down(instance, drain_seconds=args.drain_seconds)
        if not instance.frontend():
            instance.prepare(properties)
            launch(instance, args.archive)
            (instance.run_dir / "served").write_text(state)
        if not instance.is_ready():
            wait_until_ready(instance, args.start_seconds)
    post_request(instance, args.request)
    print_next_steps(instance, args.request)


def launch(instance: Instance, archive: Path) -> None:
    """torchserve --start in a session of its own."""
    if leftover := instance.processes():
        end_processes(leftover)  # orphans of an instance that was killed
    if taken := instance.taken_ports():
        raise ServeError(
            f"port: in use by another program (got {', '.join(map(str, taken))}, allowed free ports; "
            "set others in deploy/config.properties or a copy given as PROPERTIES=)"
        )
    (instance.logs / "model_log.log").unlink(missing_ok=True)
    command = [str(Path(sys.executable).parent / "torchserve"), "--start", "--ncs"]
    command += ["--model-store", str(archive.parent), "--models", f"{MODEL_NAME}={archive.name}"]
    say("starting TorchServe: " + shlex.join(command))
    with open(instance.logs / "console.log", "w") as console:
        subprocess.run(
            command,
            cwd=instance.run_dir,
            env=os.environ | instance.variables(),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
            umask=0o077,
            check=True,
        )
    if not instance.frontend():
        raise ServeError(f"TorchServe did not start; see {instance.logs}/console.log")


def wait_until_ready(instance: Instance, seconds: float) -> None:
    """Return when a worker is READY; on failure stop everything and raise ServeError with the worker's own line."""
    begin = said = time.monotonic()
    first_worker: int | None = None
    try:
        while not instance.is_ready():
            now = time.monotonic()
            first_worker = first_worker or worker_pid(instance)
            failed = failure(instance, first_worker, now - begin > seconds)
            if failed:
                raise ServeError(failed)
            if now - said > 5:
                said = now
                say(f"{now - begin:.0f} s: {last_word(instance)}")
            time.sleep(0.2)
    except BaseException:  # a half-started server helps nobody, after Ctrl-C neither
        shut_down(instance, drain_seconds=0)
        raise
    say(f"ready after {time.monotonic() - begin:.1f} s")


def worker_pid(instance: Instance) -> int | None:
    pids = [worker["pid"] for worker in instance.workers() if worker["pid"] > 0]
    return pids[0] if pids else None


def failure(instance: Instance, first_worker: int | None, too_late: bool) -> str | None:
    """Why the model will not become ready, None while it still may."""
    lines = instance.worker_lines()
    if instance.frontend() is None:
        return f"TorchServe ended; see {instance.logs}/console.log"
    if problem := instance.load_failure():
        return f"TorchServe could not load {problem}; build the archive again with: make archive"
    worker_died = first_worker is not None and not psutil.pid_exists(first_worker)
    if worker_died or any("Backend worker process died" in line for line in lines):
        time.sleep(0.5)  # let its last lines reach the log
        return startup_error(instance.worker_lines()) or f"the worker died without a word; see {instance.logs}"
    if too_late:
        return f"the model is not ready after START_SECONDS; see {instance.logs}"
    return None


def last_word(instance: Instance) -> str:
    """The handler's latest line about its progress."""
    lines = [line for line in instance.worker_lines() if line.startswith("gpt-fast")]
    return lines[-1] if lines else "loading and warming up the model"


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
    if not instance.processes():
        instance.clean()
        say("nothing runs")
        return
    with locked(instance):
        shut_down(instance, drain_seconds=args.drain_seconds)
    say("stopped")


def shut_down(instance: Instance, *, drain_seconds: float) -> None:
    """Drain, stop the frontend, end whatever is left, clean up."""
    if drain_seconds:
        drain(instance, drain_seconds)
    processes = instance.processes()
    if frontend := instance.frontend():
        frontend.terminate()
        wait_gone([frontend], KILL_SECONDS)
    end_processes(processes)
    end_processes(instance.processes())
    instance.clean()


def drain(instance: Instance, seconds: float) -> None:
    """Let running requests end. TorchServe has no drain: the handler refuses new ones while the drain file exists."""
    instance.drain_file.touch()
    end = time.monotonic() + seconds
    if active := instance.active_requests():
        say(f"waiting up to {seconds:.0f} s for running requests to end ({active:.0f} in flight)")
    quiet = 0  # looks in a row that saw none: the count of a request admitted just now may still be on its way
    while quiet < 2 and time.monotonic() < end:
        time.sleep(0.2)
        active = instance.active_requests()
        quiet = 0 if active else quiet + 1
    if active:
        say(f"{active:.0f} still in flight: cut")


def end_processes(processes: list[psutil.Process]) -> None:
    """Ask, wait 3 s, kill."""
    for signal_them in (psutil.Process.terminate, psutil.Process.kill):
        for process in filter(alive, processes):
            try:
                signal_them(process)
            except psutil.NoSuchProcess:
                continue
        wait_gone(processes, 3)


def wait_gone(processes: list[psutil.Process], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)


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


@contextmanager
def locked(instance: Instance) -> Iterator[None]:
    """One start or stop at a time."""
    instance.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(instance.run_dir / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServeError(f"another start or stop is under way in {instance.run_dir}") from error
        yield


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["start", "stop", "status", "env"])
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
    commands = {"start": start, "stop": stop, "status": status, "env": env}
    try:
        return commands[args.command](args) or 0
    except (ServeError, ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
