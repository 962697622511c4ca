"""One source file out of many: the definitions that a module needs, copied from the modules that it imports them from.

A checkpoint's code must be one file without this package. Here names are followed through the syntax trees of the
package, as an import would follow them; nothing is executed.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from frozenprefix.errors import ConfigError

PACKAGE = "frozenprefix"
_EXAMPLE = re.compile(r"\n[ \t]*\n[ \t]*Example:\n.*", flags=re.DOTALL)
_COMMENT = re.compile(r"[ \t]*#")


@dataclass(frozen=True)
class Place:
    """A name in a module."""

    module: str
    name: str


@dataclass
class _Module:
    """Definitions of a module by name, and what it imports: its name here -> (module, name there or "")."""

    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)


@cache
def _read(module: str) -> _Module:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    result = _Module(source.splitlines())
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            result.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            result.definitions.update({t.id: node for t in targets if isinstance(t, ast.Name)})
        elif isinstance(node, ast.ImportFrom):
            result.imports.update({a.asname or a.name: (str(node.module), a.name) for a in node.names})
        elif isinstance(node, ast.Import):
            result.imports.update({a.asname or a.name.split(".")[0]: (a.name, "") for a in node.names})
    return result


class Bundle:
    """Collects definitions, what they need before them.

    Args:
        replaced: places -> the place whose definition is used instead, or a line of source. A definition under another
            name is followed by an assignment to the name that is asked for.
        dropped: places of classes -> names of methods that are left out.

    Raises:
        ConfigError: by `add`, for two definitions of one name.

    Example:
        >>> bundle = Bundle()
        >>> bundle.add(Place("frozenprefix.models.mappers.blocks", "learned_tokens"))
        >>> "def learned_tokens(length: int, dim: int)" in bundle.source()
        True
    """

    def __init__(
        self,
        replaced: Mapping[Place, Place | str] | None = None,
        dropped: Mapping[Place, Collection[str]] | None = None,
    ):
        self.replaced, self.dropped = dict(replaced or {}), dict(dropped or {})
        self._texts: dict[Place, str] = {}
        self._owners: dict[str, Place] = {}
        self._imports: dict[tuple[str, str, str], None] = {}

    def add(self, place: Place) -> None:
        """Add a definition of the package, and before it all that it uses."""
        if place in self._texts:
            return
        self._texts[place] = ""  # against circles; takes its final place below
        other = self.replaced.get(place)
        if isinstance(other, str):
            text = other
        elif other is not None:
            self.add(other)
            text = "" if other.name == place.name else f"{place.name} = {other.name}"
        else:
            text = self._copy(place)
        del self._texts[place]
        self._texts[place] = text
        if text and self._owners.setdefault(place.name, place) != place:
            raise ConfigError(f"two definitions of {place.name}: in {self._owners[place.name].module}, {place.module}")

    def source(self) -> str:
        """The imports from elsewhere, then the definitions."""
        texts = list(filter(None, self._texts.values()))
        gaps = ["\n" if one.count("\n") + other.count("\n") == 0 else "\n\n\n" for one, other in pairwise(texts)]
        body = "".join(text + gap for text, gap in zip(texts, [*gaps, "\n"], strict=True))
        return "\n".join(self._import_lines()) + "\n\n\n" + body

    def _copy(self, place: Place) -> str:
        module = _read(place.module)
        node = module.definitions[place.name]
        dropped = self.dropped.get(place, ())
        for name in sorted(_names(node, dropped) - {place.name}):
            if name in module.definitions:
                self.add(Place(place.module, name))
            elif name in module.imports:
                self._follow(name, *module.imports[name])
            elif not hasattr(builtins, name) and name not in _bound(node):
                raise ConfigError(f"{place.module}: {place.name} uses '{name}', which the module does not define")
        return _text(node, module.lines, dropped)

    def _follow(self, name: str, module: str, there: str) -> None:
        """Add what an import names; through packages that pass on what their modules define."""
        if module.partition(".")[0] != PACKAGE:
            self._imports[(module, there, name)] = None
        elif there in _read(module).definitions or Place(module, there) in self.replaced:
            self.add(Place(module, there))
        elif there in _read(module).imports:
            self._follow(there, *_read(module).imports[there])
        else:
            raise ConfigError(f"'{there}' is not defined in {module}")

    def _import_lines(self) -> list[str]:
        # of two ways to import one name, such as `import torch.nn.functional as F`, the first
        imports = {name: (module, there, name) for module, there, name in sorted(self._imports, reverse=True)}.values()
        whole = sorted(
            f"import {module}" + (f" as {name}" if name != module.split(".")[0] else "")
            for module, there, name in imports
            if not there
        )
        names: dict[str, list[str]] = {}
        for module, there, name in sorted(imports):
            if there:
                names.setdefault(module, []).append(there if there == name else f"{there} as {name}")
        parts = [_from_line(module, found) for module, found in sorted(names.items())]
        return [*whole, *parts]


def _from_line(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) <= 120 else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"


def _names(node: ast.stmt, dropped: Collection[str]) -> set[str]:
    """Names that a definition reads, without those in methods that are left out."""
    found: set[str] = set()
    todo: list[ast.AST] = [node]
    while todo:
        one = todo.pop()
        if isinstance(one, ast.Name):
            found.add(one.id)
        is_left_out = isinstance(one, ast.FunctionDef) and one.name in dropped
        todo += [] if is_left_out else list(ast.iter_child_nodes(one))
    return found


def _bound(node: ast.stmt) -> set[str]:
    """Names that a definition itself gives a value: arguments, variables, inner functions and imports."""
    bound: set[str] = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            bound.add(one.id)
        elif isinstance(one, ast.arg):
            bound.add(one.arg)
        elif isinstance(one, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(str(one.name))
        elif isinstance(one, ast.ImportFrom | ast.Import):
            bound.update(alias.asname or alias.name for alias in one.names)
    return bound


def _text(node: ast.stmt, lines: list[str], dropped: Collection[str]) -> str:
    """The source of a definition: comments above it, no examples, no methods that are left out."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
    while first > 0 and _COMMENT.match(lines[first - 1]):
        first -= 1
    kept = dict(enumerate(lines[first : node.end_lineno], first))
    for one in ast.walk(node):
        if isinstance(one, ast.FunctionDef) and one.name in dropped:
            start = min([one.lineno, *(d.lineno for d in one.decorator_list)]) - 1
            while not kept.get(start - 1, "-").strip():  # blank lines above it
                start -= 1
            for number in range(start, one.end_lineno or 0):
                kept.pop(number, None)
        elif isinstance(one, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(one):
            docstring = one.body[0]
            start, end = docstring.lineno - 1, (docstring.end_lineno or 0) - 1
            if start in kept and end in kept:
                text = _EXAMPLE.sub("", "\n".join(kept.get(n, "") for n in range(start, end + 1)))
                if not text.rstrip().endswith('"""'):
                    text += '"""' if "\n" not in text else "\n" + " " * docstring.col_offset + '"""'
                kept[start] = text
                for number in range(start + 1, end + 1):
                    kept.pop(number)
    return "\n".join(text for _, text in sorted(kept.items())).rstrip()
