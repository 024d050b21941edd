"""The modules that a source file imports, for the tests of who may import what."""

import ast
from pathlib import Path


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions; `from a import b` counts as a and a.b.

    The name of a relative import begins with a dot.
    """
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            modules |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return modules
