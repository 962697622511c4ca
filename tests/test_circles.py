"""No module of the package imports itself through others; late, type-only and registered imports are counted."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import frozenprefix

PACKAGE = Path(frozenprefix.__file__).parent


def modules() -> dict[str, ast.Module]:
    """Name and syntax tree of every module."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("frozenprefix", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Those of `names` that a module imports, anywhere in its code, or that it registers as "module:attribute"."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in names else str(node.module) for name in submodules}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            imported.add(node.value.split(":")[0])
    return imported & names


def test_no_circles():
    trees = modules()
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    assert len(graph) > 150
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"these modules import each other: {' <- '.join(error.args[1])}") from None


def test_a_circle_is_found():
    tree = ast.parse("def f():\n    from a.b import c\n\nENTRIES = {'x': 'a.d:X'}\n")
    assert imports(tree, {"a", "a.b", "a.b.c", "a.d"}) == {"a.b.c", "a.d"}
