"""Options of mappers, fusions and adapters: the keyword arguments of their constructors, checked by type and bounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.registry import Registry

C = TypeVar("C")
# Types of options, with their bounds
Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def register_part(registry: Registry[Any], name: str, structural: set[str]) -> Callable[[C], C]:
    """Decorator that registers a class of the user's own, whose constructor takes the `structural` arguments.

    Raises:
        ConfigError: as `Registry.register`, and for a constructor that lacks an argument.

    Example:
        >>> @register_part(Registry("mapper"), "tiny", {"lm_dim"})
        ... class Tiny:
        ...     def __init__(self, *, encoder_dim): ...
        Traceback (most recent call last):
        frozenprefix.errors.ConfigError: mapper 'tiny': the constructor lacks the argument lm_dim; it has: encoder_dim
    """

    def add(part: C) -> C:
        registry.check(name, part)
        constructor: Any = part
        missing = missing_arguments(constructor, structural)
        if missing:
            has = ", ".join(inspect.signature(constructor).parameters) or "none"
            raise ConfigError(
                f"{registry.kind} '{name}': the constructor lacks the argument {', '.join(missing)}; it has: {has}"
            )
        return registry.register(name)(part)

    return add


def missing_arguments(build: Callable[..., Any], structural: set[str]) -> list[str]:
    """The `structural` arguments that a constructor or function does not take by name."""
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return sorted(structural - parameters.keys())


def option_problems(
    registry: Registry[Any], field: str, name: str, options: dict[str, Any], structural: set[str]
) -> list[str]:
    """Check the name of a part and its options, without building it; return one line per problem.

    Args:
        registry: where `name` is looked up.
        field: dotted key of the part in a recipe, such as "model.mapper".
        name: name of the part, such as "mlp".
        options: values by name.
        structural: arguments of the constructor that the model supplies, which are not options.

    Example:
        >>> from frozenprefix.models.mappers import MAPPERS, STRUCTURAL
        >>> option_problems(MAPPERS, "model.mapper", "mlp", {"dropout": 2.0}, STRUCTURAL)
        ['model.mapper.dropout: Input should be less than 1, got 2.0']
    """
    try:
        build: Callable[..., Any] = registry.get(name)
    except ConfigError as error:
        return [f"{field}.type: {problem}" for problem in error.problems]
    constructor = build.__init__ if inspect.isclass(build) else build
    hints = get_type_hints(constructor, include_extras=True)
    parameters = inspect.signature(constructor).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = missing_arguments(build, structural)
    if missing:
        return [f"{field}.type: the constructor of {registry.kind} '{name}' lacks the argument {', '.join(missing)}"]
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if key not in structural | {"self"} and not variable:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[key] = (hints.get(key, Any), default)
    known = ", ".join(fields) or "none"
    problems = [
        f"{field}.{key}: {registry.kind} '{name}' has no such option{did_you_mean(key, fields)}; it has: {known}"
        for key in options
        if key not in fields and not open_ended
    ]
    schema = create_model("Options", __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)
    try:
        schema.model_validate({key: value for key, value in options.items() if key in fields})
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"]))
            problems.append(f"{field}.{key}: {detail['msg']}, got {detail['input']!r}")
    return problems
