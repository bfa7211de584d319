"""Every import of every file, at whatever depth it stands: the circles they make, and those that point upwards."""

from __future__ import annotations

import ast
from pathlib import Path


def module_name(path: Path, root: Path) -> str:
    """hubsae/core/sae.py -> hubsae.core.sae."""
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name or "") for each import in a file: inside functions and type-only ones too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which module of the package under `root` imports which others of it."""
    files = {module_name(path, root): path for path in root.rglob("*.py") if "_data" not in path.parts}
    graph = {}
    for module, path in files.items():
        wanted = {f"{base}.{name}" if f"{base}.{name}" in files else base for base, name in imports_of(path)}
        graph[module] = {target for target in wanted if target in files and target != module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def upward(graph: dict[str, set[str]], rooms: list[str]) -> list[str]:
    """Imports of a room above (`rooms` from the top down), as text."""

    def floor(module: str) -> int | None:
        part = module.split(".")[1] if "." in module else ""
        return rooms.index(part) if part in rooms else None

    pairs = [(module, target) for module, targets in sorted(graph.items()) for target in sorted(targets)]
    floors = [(module, target, floor(module), floor(target)) for module, target in pairs]
    return [f"{m} imports {t}" for m, t, a, b in floors if a is not None and b is not None and b < a]
