"""YAML as people mean it (the 1.2 core schema), and `a.b.0.c=value` overrides.

YAML 1.1, which PyYAML reads, takes `1e-4` for a string, `off` for false and `1:30` for 90. The readers here take only
true/false for booleans and every usual spelling of a number for a number, and refuse a key that is given twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from frozenprefix.errors import ConfigError

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string whenever YAML 1.1 or 1.2 would read it as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _tag, _pattern, _first in _SCALARS:
    _regex = re.compile(rf"^(?:{_pattern})$")
    _characters = [character if character != "\0" else "" for character in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regex, _characters)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regex, _characters)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def read_yaml(text: str, name: str) -> Any:
    """Parse YAML text; `name` is what an error calls it.

    Raises:
        ConfigError: with line and column, for text that is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error


def write_yaml(data: Any) -> str:
    """Dump plain data so that `read_yaml` gives the same back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set `a.b.0.c=value` in nested dicts and lists, in place; a value is read as YAML. Return one line per problem."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"override '{override}': expected KEY=VALUE, as in training.learning_rate=1e-4")
            continue
        try:
            _set(data, key.split("."), read_yaml(text, f"override '{override}'"))
        except ConfigError as error:
            problems += error.problems
    return problems


def _set(data: Any, parts: list[str], value: Any) -> None:
    here = data
    for depth, part in enumerate(parts):
        path, last = ".".join(parts[: depth + 1]), depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise ConfigError(f"{path}: no such item, expected a number from 0 to {len(here) - 1}")
            index: Any = int(part)
        elif isinstance(here, dict):
            index = part
            if not last and here.get(part) is None:
                here[part] = {}
        else:
            raise ConfigError(f"{path}: cannot be set, '{'.'.join(parts[:depth])}' is the value {here!r}")
        if last:
            here[index] = value
        else:
            here = here[index]
