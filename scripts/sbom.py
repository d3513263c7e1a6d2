#!/usr/bin/env python3
"""Write build/sbom.json (CycloneDX): every installed package with its licence, what TorchServe's Java archive has, and
the chat page's libraries.

The archive has lost its own notices, so what is in it is listed here, by hand; a class that no entry accounts for is
an error. Licences are printed, with how many components have each.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import vendor

ROOT = Path(__file__).resolve().parents[1]
SBOM = ROOT / "build" / "sbom.json"
# Where classes lie -> Maven's name of what brings them, its version as far as the archive tells, and its licence.
# Versions: META-INF/io.netty.versions.properties, groovy-release-info.properties; the rest: TorchServe 0.12's
# build.gradle and gradle.properties.
JAR = {
    "org/pytorch/": ("org.pytorch/torchserve-frontend", "0.12.0", "Apache-2.0"),
    "io/netty/": ("io.netty/netty-all", "4.1.53.Final", "Apache-2.0"),
    "io/grpc/": ("io.grpc/grpc-netty-shaded", "1.50.0", "Apache-2.0"),
    "com/google/protobuf/": ("com.google.protobuf/protobuf-java", "", "BSD-3-Clause"),
    "com/google/gson/": ("com.google.code.gson/gson", "2.9.0", "Apache-2.0"),
    "com/google/": ("com.google.guava/guava", "", "Apache-2.0"),
    "org/yaml/": ("org.yaml/snakeyaml", "2.1", "Apache-2.0"),
    "org/apache/logging/": ("org.apache.logging.log4j/log4j-core", "2.17.1", "Apache-2.0"),
    "org/apache/log4j/": ("org.apache.logging.log4j/log4j-core", "2.17.1", "Apache-2.0"),
    "org/slf4j/": ("org.slf4j/slf4j-api", "", "MIT"),
    "org/apache/commons/": ("org.apache.commons/commons-compress", "1.25.0", "Apache-2.0"),
    "org/apache/tools/": ("org.apache.ant/ant", "", "Apache-2.0"),
    "org/apache/groovy/": ("org.codehaus.groovy/groovy-all", "3.0.9", "Apache-2.0"),
    "org/codehaus/": ("org.codehaus.groovy/groovy-all", "3.0.9", "Apache-2.0"),
    "groovy": ("org.codehaus.groovy/groovy-all", "3.0.9", "Apache-2.0"),
    "io/prometheus/": ("io.prometheus/simpleclient_servlet", "0.9.0", "Apache-2.0"),
    "com/lmax/": ("com.lmax/disruptor", "", "Apache-2.0"),
    "com/beust/": ("com.beust/jcommander", "", "Apache-2.0"),
    "com/github/javaparser/": ("com.github.javaparser/javaparser-core", "", "Apache-2.0"),
    "com/thoughtworks/": ("com.thoughtworks.qdox/qdox", "", "Apache-2.0"),
    "org/checkerframework/": ("org.checkerframework/checker-qual", "", "MIT"),
    "org/junit/": ("org.junit.platform/junit-platform-engine", "", "EPL-2.0"),
    "junit/": ("junit/junit", "", "EPL-1.0"),
    "org/hamcrest/": ("org.hamcrest/hamcrest-core", "", "BSD-3-Clause"),
    "org/testng/": ("org.testng/testng", "", "Apache-2.0"),
    "org/opentest4j/": ("org.opentest4j/opentest4j", "", "Apache-2.0"),
    "org/fusesource/": ("org.fusesource.jansi/jansi", "", "Apache-2.0"),
    "jline/": ("jline/jline", "", "BSD-3-Clause"),
    "picocli/": ("info.picocli/picocli", "", "Apache-2.0"),
    "io/perfmark/": ("io.perfmark/perfmark-api", "", "Apache-2.0"),
    "javax/annotation/": ("com.google.code.findbugs/jsr305", "", "Apache-2.0"),
    "android/annotation/": ("com.google.android/annotations", "", "Apache-2.0"),
}


def main() -> int:
    import ts

    jar = Path(ts.__file__).parent / "frontend" / "model-server.jar"
    SBOM.parent.mkdir(exist_ok=True)
    command = [str(Path(sys.argv[1]) / "cyclonedx-py"), "environment", sys.executable, "--of", "JSON", "-o", str(SBOM)]
    subprocess.run([*command, "--no-validate"], check=True, stderr=subprocess.DEVNULL)
    bom = json.loads(SBOM.read_text(encoding="utf-8"))
    with zipfile.ZipFile(jar) as archive:
        bom["components"] += jar_components(archive.namelist())
    bom["components"] += vendor.components(vendor.read_list())
    for component in bom["components"]:
        component["externalReferences"] = public(component.get("externalReferences", []))
    SBOM.write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")
    licences = collections.Counter(licence_of(component) for component in bom["components"])
    for licence, count in licences.most_common():
        print(f"{count:4} {licence}")
    print(f"sbom: wrote {SBOM.relative_to(ROOT)}: {len(bom['components'])} components")
    return 0


def jar_components(names: Iterable[str]) -> list[dict[str, Any]]:
    """What a fat Java archive of these files consists of. Raises ValueError for classes that no entry accounts for."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if not name.endswith(".class") or name.startswith("META-INF/") or "/" not in name:
            continue
        prefix = next((prefix for prefix in JAR if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"model-server.jar: nobody has said what brings {name}")
        full, version, licence = JAR[prefix]
        group, artifact = full.split("/")
        at = f"@{version}" if version else ""
        found[full] = {
            "type": "library",
            "bom-ref": f"pkg:maven/{full}{at}",
            "group": group,
            "name": artifact,
            **({"version": version} if version else {}),
            "purl": f"pkg:maven/{full}{at}",
            "licenses": [{"license": {"id": licence}}],
        }
    return list(found.values())


def public(references: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that are addresses of the web; where this machine got a package from is nobody's business."""
    return [each for each in references if each["url"].startswith(("https://", "http://")) and " " not in each["url"]]


def licence_of(component: Mapping[str, Any]) -> str:
    names = [
        each.get("expression") or each["license"].get("id") or each["license"]["name"]
        for each in component.get("licenses", ())
    ]
    return min(names, key=len) if names else "not said"


if __name__ == "__main__":
    sys.exit(main())
