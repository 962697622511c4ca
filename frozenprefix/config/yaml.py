"""YAML 1.2 for recipes, overrides and options of commands, and overrides of the form `a.b.0.c=value`."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter

from frozenprefix.errors import ConfigError

MAX_VALUES = 1_000_000  # of a document with its aliases written out


class _Constructor(SafeConstructor):
    """Reads a date as text: no key here is a date."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    """Writes a value that occurs twice twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # in other quotes these separators are read as spaces
        style = '"' if set(data) & set("\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def read_yaml(text: str, name: str) -> Any:
    """Parse YAML 1.2: `1e-4` is a number, `off` and `1:30` are text, a repeated key is an error.

    Args:
        name: name of the text in errors, such as its file.

    Raises:
        ConfigError: for text that is not YAML, with line and column, or whose aliases grow beyond `MAX_VALUES` values.

    Example:
        >>> read_yaml("learning_rate: 1e-4", "example")
        {'learning_rate': 0.0001}
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        data = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = error.problem or error.context
        if isinstance(error, DuplicateKeyError):
            problem = str(problem).partition(" with value")[0]  # the value may be a whole block
        raise ConfigError(f"{name}{where}: not valid YAML: {problem}") from error
    except YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: not valid YAML: lists or blocks are nested too deeply") from error
    _check_size(data, name)
    return data


def write_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in their order; `read_yaml` gives the same data back.

    Example:
        >>> print(write_yaml({"name": "1e-4", "betas": [0.9, 0.98]}), end="")
        name: '1e-4'
        betas:
        - 0.9
        - 0.98
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.width = False, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set `a.b.0.c=value` in nested dicts and lists, in place. Values are YAML.

    Returns:
        One line per override that cannot be applied.

    Example:
        >>> data = {"train": [{"path": "a"}]}
        >>> apply_overrides(data, ["train.0.limit=10", "seed=1"])
        []
        >>> data
        {'train': [{'path': 'a', 'limit': 10}], 'seed': 1}
    """
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


def _check_size(data: Any, name: str) -> None:
    """Refuse aliases that repeat each other (`a: &a [*b, *b]`), which grow exponentially or without end."""
    values, stack = 0, [data]
    while stack:
        here = stack.pop()
        values += 1
        if isinstance(here, (dict, list)):
            stack += here.values() if isinstance(here, dict) else here
        if values > MAX_VALUES:
            raise ConfigError(f"{name}: not valid YAML: its aliases repeat more than {MAX_VALUES:,} values")
