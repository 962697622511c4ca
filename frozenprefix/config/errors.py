"""Pydantic's errors as one line each: dotted path, what it got, what is expected, and the nearest valid key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from frozenprefix.errors import did_you_mean

# Pydantic's words → words for someone who writes YAML.
_WORDS = {
    "a valid array": "a list",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
}

Path = tuple[str | int, ...]


class Problem(NamedTuple):
    """One line of a report, and the dotted keys that it is about."""

    keys: tuple[str, ...]
    line: str


class Clash(ValueError):
    """Raised by a section's validator: values that are right by themselves and wrong together."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(problem.line for problem in problems))


def collect_problems(errors: list[ErrorDetails], data: Any, schema: type[BaseModel], prefix: str = "") -> list[Problem]:
    """Turn pydantic's errors on `data` into problems, in their order; the branches of a union become one.

    `prefix` stands before every path, with its dot.
    """
    found: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for error in errors:
        clash = error.get("ctx", {}).get("error")
        if isinstance(clash, Clash):
            problems += clash.problems
            continue
        if error["type"] == "default_factory_not_called":
            continue  # it follows from another wrong value of its section
        path = _path_in(data, error)
        dotted = prefix + ".".join(map(str, path))
        if error["type"] == "extra_forbidden":
            problems.append(Problem((dotted,), f"{dotted}: unknown key{_nearest_key(path, schema, prefix)}"))
        elif error["type"] == "missing":
            problems.append(Problem((dotted,), f"{dotted}: missing, expected {_description(path, schema)}"))
        else:
            expected = found.setdefault(dotted, [])
            expected.append(_expected(error, path, schema))
            line = f"{dotted}: got {shorten(error['input'])}, expected {' or '.join(expected)}"
            problems = [problem for problem in problems if problem.keys != (dotted,)] + [Problem((dotted,), line)]
    return problems


def shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _path_in(data: Any, error: ErrorDetails) -> Path:
    """The error's place, without what pydantic adds for the branches of a union."""
    path: list[str | int] = []
    for part in error["loc"]:
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, dict) and part in data):
            data = data[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(part)
    return tuple(path)


def _expected(error: ErrorDetails, path: Path, schema: type[BaseModel]) -> str:
    kind, got = error["type"], error["input"]
    if kind in ("model_type", "dict_type"):
        section = section_at(path, schema)
        return f"a block of keys ({', '.join(section.model_fields)})" if section else "a block of keys"
    if kind == "string_type":
        field = _field_at(path, schema)
        what = f"a string, {field.description}" if field and field.description else "a string"
        return f"{what} (put it in quotes)" if isinstance(got, (bool, int, float)) else what
    if kind == "literal_error":
        text = error["ctx"]["expected"]
        return text + did_you_mean(str(got), re.findall(r"'([^']*)'", text))
    text = re.sub(r"^\w+ should (be|have) ", "", error["msg"])
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text


def section_at(path: Path, schema: type[BaseModel]) -> type[BaseModel] | None:
    """The section that stands at `path`, or None where there is a plain value."""
    for part in path:
        field = schema.model_fields.get(str(part))
        inner = [a for a in (field.annotation, *get_args(field.annotation)) if _is_section(a)] if field else []
        if not inner:
            return None
        schema = inner[0]
    return schema


def _is_section(annotation: Any) -> bool:
    # Python 3.10 takes list[int] for a class, until issubclass is asked
    is_class = isinstance(annotation, type) and get_origin(annotation) is None
    return is_class and issubclass(annotation, BaseModel)


def _field_at(path: Path, schema: type[BaseModel]) -> FieldInfo | None:
    parent = section_at(path[:-1], schema)
    return parent.model_fields.get(str(path[-1])) if parent and path else None


def _description(path: Path, schema: type[BaseModel]) -> str:
    section = section_at(path, schema)
    if section is not None:
        return f"a block of keys ({', '.join(section.model_fields)})"
    field = _field_at(path, schema)
    if field is None:
        return "a value"
    choices = " | ".join(map(str, get_args(field.annotation)))
    return field.description or choices or str(getattr(field.annotation, "__name__", "a value"))


def _nearest_key(path: Path, schema: type[BaseModel], prefix: str) -> str:
    parent = section_at(path[:-1], schema)
    if parent is None:
        return ""
    prefix += "".join(f"{part}." for part in path[:-1])
    near = did_you_mean(str(path[-1]), parent.model_fields)
    if near:
        return near.replace("'", f"'{prefix}", 1)
    elsewhere = [key for key in _all_keys(schema) if key.split(".")[-1] == path[-1]]
    if elsewhere:
        return f" (did you mean '{elsewhere[0]}'?)"
    return f"; known here: {', '.join(parent.model_fields)}"


def _all_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in schema.model_fields:
        yield prefix + name
        section = section_at((name,), schema)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")
