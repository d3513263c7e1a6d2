"""Which of the package's files a handler needs: all modules it imports, however deep and late, and data beside them.

Found by reading the sources, so that an import inside a function counts too; nothing is imported to find out. What a
module names as text (importlib.import_module) is not found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "gpt_fast"


def served_files(handler: Path, package_files: Iterable[Path], root: Path) -> list[Path]:
    """Those of `package_files` (relative to `root`) that serving with `handler` reads.

    A data file goes with the package that it lies in: C++ sources with the decoder that compiles them, a page with the
    server.
    """
    files = sorted(package_files)
    modules = imported_modules(handler, root)
    code = {file.parent for file in files if file.suffix == ".py"}
    served = {module.parent for module in modules}

    def is_served(file: Path) -> bool:
        if file.suffix == ".py":
            return file in modules
        return next(folder for folder in file.parents if folder in code) in served

    return [file for file in files if is_served(file)]


def imported_modules(handler: Path, root: Path) -> set[Path]:
    """The package's modules that `handler` imports, directly or through one another, relative to `root`."""
    found: set[Path] = set()
    unread = [handler]
    while unread:
        new = {file for name in imported_names(unread.pop()) for file in files_of(name, root)} - found
        found |= new
        unread += [root / file for file in new]
    return found


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that an import statement may mean: of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(name: str, root: Path) -> Iterator[Path]:
    """The module's file and those of the packages around it, as far as they are this package's."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1 if parts[0] == PACKAGE else 0):
        stem = Path(*parts[:end])
        yield from (file for file in (stem.with_suffix(".py"), stem / "__init__.py") if (root / file).is_file())
