"""The machine a run happens on: who uses its CPUs, how much memory a process took, what it is.

Linux's /proc; elsewhere foreign load is None (not known) and nothing is dropped for it.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gpt_fast.ops.cpu import build

LOCAL = ("127.0.0.1", "localhost", "::1")
TICKS = os.sysconf("SC_CLK_TCK")
WINDOW_SECONDS = 0.25  # /proc/stat counts in ticks of 10 ms: over less than this, a quiet machine looks busy
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # user nice system irq softirq steal; guest is part of user


@dataclass(frozen=True)
class Reading:
    """CPU seconds so far: of the whole machine and of what is being measured; `wall` is a clock."""

    wall: float
    busy: float | None
    own: float


class CpuMeter:
    """Reads the CPU time of the machine, and of this process, its ended children and the processes `pids`."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self.pids = pids

    def read(self) -> Reading:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + children.ru_utime + children.ru_stime + sum(map(process_seconds, self.pids))
        return Reading(time.perf_counter(), busy_seconds(), own)


def busy_seconds() -> float | None:
    """CPU seconds of everything since boot, stolen time included."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return busy_of(file.readline())
    except OSError:
        return None


def busy_of(line: str) -> float | None:
    """CPU seconds of everything by the first line of /proc/stat; None for "", where there is no such file."""
    values = line.split()[1:]
    return sum(int(values[i]) for i in BUSY_FIELDS) / TICKS if values else None


def foreign_share(before: Reading, after: Reading) -> float | None:
    """The share of the machine's CPU time between two readings that others used, 0..1."""
    if before.busy is None or after.busy is None:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    available = (after.wall - before.wall) * (os.cpu_count() or 1)
    return max(0.0, others / available) if available > 0 else 0.0


def foreign_shares(readings: Sequence[Reading], *, window: float = WINDOW_SECONDS) -> list[float | None]:
    """The foreign share of each interval between readings, each looked at over at least `window` seconds around it."""
    shares = []
    for index in range(len(readings) - 1):
        first, last = index, index + 1
        while readings[last].wall - readings[first].wall < window and (first > 0 or last < len(readings) - 1):
            first, last = max(first - 1, 0), min(last + 1, len(readings) - 1)
        shares.append(foreign_share(readings[first], readings[last]))
    return shares


# ------------------------------------------------------------------------------------ other processes


def process_seconds(pid: int) -> float:
    """CPU seconds of a running process; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


class ShareMeter:
    """What share of the machine's CPUs this process and each of `pids` use, by program name, from now to `read`."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.names = {pid: process_name(pid) for pid in pids}
        self.before = self._seconds()
        self.started = time.perf_counter()

    def read(self) -> dict[str, float]:
        available = (time.perf_counter() - self.started) * (os.cpu_count() or 1)
        after = self._seconds()
        return {name: (after[name] - self.before[name]) / available for name in after}

    def _seconds(self) -> dict[str, float]:
        total = {"generator": time.process_time()} | dict.fromkeys(self.names.values(), 0.0)
        for pid, name in self.names.items():
            total[name] += process_seconds(pid)
        return total


def process_name(pid: int) -> str:
    """As the system calls it; "ended" when it has."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"


def process_tree(root: int) -> list[int]:
    """`root` and all its descendants that run now."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def server_processes(url: str) -> list[int]:
    """The processes that serve a URL of this machine; none where it is elsewhere or not ours to see."""
    parts = urlsplit(url)
    server = listener(parts.port or 80) if parts.hostname in LOCAL else None
    return process_tree(server) if server else []


def listener(port: int) -> int | None:
    """The process that listens on a TCP port of this machine, where we may know."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        rows = [line.split() for line in lines]
        inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    names = {f"socket:[{inode}]" for inode in inodes}
    for path in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) in names for fd in path.iterdir()):
                return int(path.parent.name)
        except OSError:  # not ours, or gone
            continue
    return None


def peak_rss_bytes(pid: int | str = "self") -> int | None:
    """The most memory a process has held. Not getrusage: its figure starts with the parent's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


# ------------------------------------------------------------------------------------------ its name


def description(program: str, arguments: Sequence[str]) -> dict[str, str | int | None]:
    """What a result is worth nothing without."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": build.processor(),
        "cpus": os.cpu_count(),
        "compiler": first_line([os.environ.get("CXX", "g++"), "--version"]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([program, *map(without_place, arguments)]),
    }


def without_place(argument: str) -> str:
    """An argument with only the last part of an absolute path: where things lie here means nothing elsewhere."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if value.startswith("/") else argument


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that holds `folder`, with a + when files of gpt_fast that git knows have changed."""
    name = first_line(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    changed = first_line(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", ":/gpt_fast"])
    return f"{name}+" if name and changed else name


def first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.splitlines() or [None])[0] if done.returncode == 0 else None  # type: ignore[list-item]
