#!/usr/bin/env python3
"""Bring the chat page's libraries from their npm packages, as vendor.json pins them, and say what differs.

    scripts/vendor.py            npm pack NAME@VERSION, then each file must have the sha256 that is listed
    scripts/vendor.py --update   the list takes the hashes of what came: after a version was changed in it

Nothing is built: a file is one of the package, byte for byte, its licence included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "gpt_fast" / "serve" / "page" / "vendor"
LIST = "vendor.json"

Package = dict[str, Any]  # package, version, license, files: {name: {from: its path in the package, sha256}}


def read_list(folder: Path = VENDOR) -> list[Package]:
    return json.loads((folder / LIST).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def problems(folder: Path = VENDOR) -> list[str]:
    """How a folder differs from its list, one line each."""
    listed = {name: file["sha256"] for package in read_list(folder) for name, file in package["files"].items()}
    there = {path.name for path in folder.iterdir()} - {LIST}
    found = [f"{name}: listed in {LIST} and not there" for name in sorted(listed.keys() - there)]
    found += [f"{name}: not listed in {LIST}" for name in sorted(there - listed.keys())]
    for name in sorted(there & listed.keys()):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != listed[name]:
            found.append(f"{name}: differs from what was published (bring it anew: scripts/vendor.py)")
    return found


def components(packages: list[Package]) -> list[dict[str, Any]]:
    """The libraries as parts of a CycloneDX bill of materials."""
    return [
        {
            "type": "library",
            "bom-ref": purl_of(package),
            "name": package["package"],
            "version": package["version"],
            "purl": purl_of(package),
            "licenses": [{"license": {"id": package["license"]}}],
        }
        for package in packages
    ]


def purl_of(package: Package) -> str:
    return f"pkg:npm/{package['package'].replace('@', '%40')}@{package['version']}"


def bring(package: Package, folder: Path) -> None:
    """Write a package's files into the folder, as npm has them."""
    name = f"{package['package']}@{package['version']}"
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["npm", "pack", name, "--silent"], cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        (packed,) = Path(temporary).glob("*.tgz")
        with tarfile.open(packed) as archive:
            for target, file in package["files"].items():
                member = archive.extractfile(f"package/{file['from']}")
                if member is None:
                    raise ValueError(f"{name}: no file (got {file['from']})")
                (folder / target).write_bytes(member.read())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="list what came instead of comparing it")
    args = parser.parse_args()
    packages = read_list()
    for package in packages:
        bring(package, VENDOR)
    if args.update:
        for package in packages:
            for name, file in package["files"].items():
                file["sha256"] = hashlib.sha256((VENDOR / name).read_bytes()).hexdigest()
        (VENDOR / LIST).write_text(json.dumps(packages, indent=2) + "\n", encoding="utf-8")
    for problem in (found := problems()):
        print(f"vendor: {problem}", file=sys.stderr)
    print(f"vendor: {len(packages)} packages in {VENDOR.relative_to(ROOT)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
