"""Pydantic's errors as one line each: dotted key, value, expected value, and the nearest valid key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from frozenprefix.errors import Problem, SectionError, did_you_mean, shorten

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

Section = type[BaseModel]
Path = tuple[str | int, ...]


class Location(NamedTuple):
    """Where an error is: its path in the data, and the section that holds the last key.

    Attributes:
        union: the sections that `section` was chosen from, if there were several.
    """

    path: Path
    section: Section | None
    union: list[Section]

    @property
    def field(self) -> FieldInfo | None:
        return self.section.model_fields.get(str(self.path[-1])) if self.section and self.path else None


def collect_problems(errors: list[ErrorDetails], data: Any, schema: Section, prefix: str = "") -> list[Problem]:
    """Turn pydantic's errors on `data` into problems, in their order. The branches of a union become one problem.

    Args:
        prefix: put before every key; includes its dot.

    Example:
        >>> class Training(BaseModel):
        ...     epochs: int
        >>> try:
        ...     Training.model_validate({"epochs": "two"}, strict=True)
        ... except ValueError as error:
        ...     collect_problems(error.errors(), {"epochs": "two"}, Training)
        [Problem(text="got 'two', expected a whole number", keys=('epochs',))]
    """
    expectations: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for error in errors:
        place = _locate(error, data, schema)
        dotted = prefix + ".".join(map(str, place.path))
        clash = error.get("ctx", {}).get("error")
        if isinstance(clash, SectionError):
            problems += [
                Problem(text, tuple(f"{dotted}.{key}".strip(".") for key in keys)) for text, keys in clash.problems
            ]
        elif error["type"] == "default_factory_not_called":
            continue  # a consequence of another wrong value in its section
        elif error["type"] == "extra_forbidden":
            problems.append(Problem(_unknown_key(place, error["input"], schema), (dotted,)))
        elif error["type"] == "missing":
            problems.append(Problem(f"missing, expected {_description(place)}", (dotted,)))
        elif error["type"] == "value_error":
            message = str(clash)
            text = message if message.startswith("got ") else f"got {shorten(error['input'])}, {message}"
            problems.append(Problem(text, (dotted,)))
        elif error["type"] == "union_tag_not_found":
            tags = " | ".join(_tag(section) for section in sections_in(place.field))
            problems.append(Problem(f"missing, expected {tags}", (f"{dotted}.source",)))
        else:
            expected = expectations.setdefault(dotted, [])
            expected.append(_expected(error, place))
            text = f"got {shorten(error['input'])}, expected {' or '.join(expected)}"
            problems = [problem for problem in problems if problem.keys != (dotted,)] + [Problem(text, (dotted,))]
    return problems


def lines_of(problems: list[Problem]) -> list[str]:
    """One line per problem.

    Example:
        >>> lines_of([Problem("got 0, expected at least 1", ("training.epochs",))])
        ['training.epochs: got 0, expected at least 1']
    """
    return [f"{keys[0]}: {text}" for text, keys in problems]


def _locate(error: ErrorDetails, data: Any, schema: Section) -> Location:
    """Follow the error's location through data and schema; pydantic's entries for branches of unions are left out."""
    path: list[str | int] = []
    here: list[Section] = [schema]  # sections that are possible at `path`: several until the tag of a union is met
    union: list[Section] = []  # that `here` was chosen from
    place = Location((), None, [])
    for part in error["loc"]:
        tagged = [section for section in here if len(here) > 1 and _tag(section) == part]
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        in_dict = isinstance(data, dict) and part in data
        if tagged:
            union, here = here, tagged
        elif in_list:
            data = data[part]
            path.append(part)
            place = Location(tuple(path), None, [])
        elif in_dict or (error["type"] == "missing" and part == error["loc"][-1]):
            data = data[part] if in_dict else None
            path.append(part)
            place = Location(tuple(path), here[0] if here else None, union)
            here, union = sections_in(place.field), []
    return place


def sections_in(field: FieldInfo | None) -> list[Section]:
    """The sections that a field can hold."""
    return [] if field is None else list(_sections_of(field.annotation))


def _sections_of(annotation: Any) -> Iterator[Section]:
    # Python 3.10 takes list[int] for a class, until issubclass is asked
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inner in get_args(annotation):
        yield from _sections_of(inner)


def _tag(section: Section) -> str:
    """The `source` by which a section is chosen from its union."""
    field = section.model_fields.get("source")
    if field is None:
        return ""
    return "package.module:function" if field.is_required() else str(field.default)


def _expected(error: ErrorDetails, place: Location) -> str:
    kind, got = error["type"], error["input"]
    if kind in ("model_type", "dict_type"):
        return _description(place) if sections_in(place.field) else "a block of keys"
    if kind == "string_type":
        what = f"a string, {place.field.description}" if place.field and place.field.description else "a string"
        return f"{what} (put it in quotes)" if isinstance(got, (bool, int, float)) else what
    if kind == "literal_error":
        text = error["ctx"]["expected"]
        return text + did_you_mean(str(got), re.findall(r"'([^']*)'", text))
    text = re.sub(r"^\w+ should (be|have) ", "", error["msg"])
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text


def _description(place: Location) -> str:
    if place.field is None:
        return "a value"
    sections = sections_in(place.field)
    if sections:
        return f"a block of keys ({', '.join(dict.fromkeys(key for s in sections for key in s.model_fields))})"
    choices = " | ".join(map(str, get_args(place.field.annotation)))
    return place.field.description or choices or str(getattr(place.field.annotation, "__name__", "a value"))


def _unknown_key(place: Location, value: Any, schema: Section) -> str:
    """The message for a key that its section does not have."""
    if place.section is None or not place.path:  # a key without a name has no path
        return "unknown key"
    key = str(place.path[-1])
    owners = [_tag(section) for section in place.union if key in section.model_fields]
    if owners:
        hint = "remove it"
        if _tag(place.section) == "fused" and key in ("layer", "weights", "revision"):
            hint = "give it to the part it belongs to"
        return f"got {shorten(value)}, which has no effect with source '{_tag(place.section)}'; {hint}"
    near = did_you_mean(key, place.section.model_fields)
    if near:
        return f"unknown key{near}"
    elsewhere = [other for other in _all_keys(schema) if other.split(".")[-1] == key]
    if elsewhere:
        return f"unknown key (did you mean '{elsewhere[0]}'?)"
    return f"unknown key; known here: {', '.join(place.section.model_fields)}"


def _all_keys(schema: Section, prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for section in sections_in(field):
            yield from _all_keys(section, f"{prefix}{name}.")
