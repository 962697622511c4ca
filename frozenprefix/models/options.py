"""Options of exchangeable parts: the keyword arguments of their constructors, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.registry import Registry

# Types of options, with their bounds
Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def option_problems(
    registry: Registry[Any], field: str, name: str, options: dict[str, Any], structural: set[str]
) -> list[str]:
    """Check the name of a part and its options; return one line per problem.

    Args:
        registry: where `name` is looked up; field: dotted key of the part in a recipe, "model.mapper".
        structural: arguments of the constructor that are no options, because the model gives them.
    """
    try:
        build: Callable[..., Any] = registry.get(name)
    except ConfigError as error:
        return [f"{field}.type: {problem}" for problem in error.problems]
    constructor = build.__init__ if inspect.isclass(build) else build
    hints = get_type_hints(constructor, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], parameter.default)
        for key, parameter in inspect.signature(constructor).parameters.items()
        if key not in structural | {"self"}
    }
    problems = [
        f"{field}.{key}: {registry.kind} '{name}' has no such option{did_you_mean(key, fields)}; "
        f"it has: {', '.join(fields) or 'none'}"
        for key in options
        if key not in fields
    ]
    schema = create_model("Options", __config__=ConfigDict(strict=True), **fields)
    try:
        schema.model_validate({key: value for key, value in options.items() if key in fields})
    except ValidationError as error:
        problems += [f"{field}.{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
    return problems
