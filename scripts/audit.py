#!/usr/bin/env python3
"""Ask the vulnerability service about every locked package. Exit code 1: a flaw that audit-ignore.txt does not excuse.

A line of audit-ignore.txt is an id, the day until which it is excused, and why. Exit code 2: the service did not
answer.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IGNORED = ROOT / "audit-ignore.txt"


def main() -> int:
    try:
        excused = read_excuses(IGNORED.read_text(encoding="utf-8"), today=datetime.date.today())
    except ValueError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    report = ask(ROOT / "requirements.lock")
    if report is None:
        print("audit: the vulnerability service did not answer; nothing is known", file=sys.stderr)
        return 2
    flaws = unexcused(report, excused)
    for flaw in flaws:
        print(f"audit: {flaw}", file=sys.stderr)
    print(f"audit: {len(report)} packages, {len(flaws)} flaw(s) not excused, {len(excused)} excused")
    return 1 if flaws else 0


def read_excuses(text: str, *, today: datetime.date) -> dict[str, str]:
    """Id -> why. Raises ValueError for a line of another form, and for an excuse whose day has passed."""
    excuses = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Z]+-[\w-]+) (\d{4}-\d\d-\d\d) (\S.*)", line)
        if match is None:
            raise ValueError(f"{IGNORED.name}: not an id, a day and a reason (got {line!r})")
        if datetime.date.fromisoformat(match[2]) < today:
            raise ValueError(f"{IGNORED.name}: {match[1]} was excused until {match[2]}: look at it again")
        excuses[match[1]] = match[3]
    return excuses


def ask(lock: Path) -> list[Mapping[str, Any]] | None:
    """pip-audit's word on each package; None where it could look up none."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(lock), "--no-deps", "--disable-pip", "-f", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        packages: list[Mapping[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None
    answered = [package for package in packages if "skip_reason" not in package]
    return answered or None


def unexcused(packages: list[Mapping[str, Any]], excused: Mapping[str, str]) -> list[str]:
    """One line a flaw."""
    return [
        f"{package['name']} {package['version']}: {flaw['id']} (mended in {', '.join(flaw['fix_versions']) or 'none'})"
        for package in packages
        for flaw in package["vulns"]
        if not {flaw["id"], *flaw.get("aliases", ())} & excused.keys()
    ]


if __name__ == "__main__":
    sys.exit(main())
