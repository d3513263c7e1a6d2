"""An instance's life: launched, waited for, drained, ended. Each step of it under the instance's lock."""

import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from instance import Instance, alive, startup_error

from gpt_fast.torchserve.archive import MODEL_NAME

KILL_SECONDS = 15  # TorchServe's own shutdown takes about 3 s


class ServeError(Exception):
    """Why a command failed, in one line."""


class UnderWay(ServeError):
    """Somebody else is at it."""


def say(text: str) -> None:
    print(f"serve: {text}", flush=True)


@contextmanager
def locked(instance: Instance) -> Iterator[None]:
    """One start or stop at a time. Raises UnderWay when there is one."""
    instance.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(instance.run_dir / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnderWay(f"another start, restart or stop is under way in {instance.run_dir}") from error
        yield


def launch(instance: Instance, archive: Path, *, tell: Callable[[str], None] = say) -> None:
    """torchserve --start in a session of its own."""
    if leftover := instance.processes():
        end_processes(leftover)  # orphans of an instance that was killed
    if taken := instance.taken_ports():
        raise ServeError(
            f"port: in use by another program (got {', '.join(map(str, taken))}, allowed free ports; "
            "set others in deploy/config.properties or a copy given as PROPERTIES=)"
        )
    instance.keep_last_logs()
    command = [str(Path(sys.executable).parent / "torchserve"), "--start", "--ncs"]
    command += ["--model-store", str(archive.parent), "--models", f"{MODEL_NAME}={archive.name}"]
    tell("starting TorchServe: " + shlex.join(command))
    with open(instance.logs / "console.log", "a") as console:
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


def wait_until_ready(instance: Instance, seconds: float, *, tell: Callable[[str], None] = say) -> None:
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
                tell(f"{now - begin:.0f} s: {last_word(instance)}")
            time.sleep(0.2)
    except BaseException:  # a half-started server helps nobody, after Ctrl-C neither
        shut_down(instance, drain_seconds=0)
        raise
    tell(f"ready after {time.monotonic() - begin:.1f} s")


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


def end_processes(processes: list[psutil.Process], *, patience: float = 3.0) -> None:
    """Ask, wait for `patience` seconds, kill."""
    for signal_them in (psutil.Process.terminate, psutil.Process.kill)[not patience :]:
        for process in filter(alive, processes):
            try:
                signal_them(process)
            except psutil.NoSuchProcess:
                continue
        wait_gone(processes, patience or 3.0)


def end_watch(instance: Instance) -> None:
    """Kill the watch, and what it may be launching just now; the lock that it may hold goes with it."""
    if watcher := instance.watcher():
        with suppress(psutil.NoSuchProcess):
            watcher.suspend()  # it starts nothing more
            end_processes([watcher, *watcher.children(recursive=True)], patience=0)
    instance.watch_file.unlink(missing_ok=True)


def wait_gone(processes: list[psutil.Process], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
