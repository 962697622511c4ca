"""A typed registry for everything that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from frozenprefix.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Name → object.

    Args:
        kind: of the entries, for error messages: "mapper", "data source".
        lazy: entries as `"package.module:attribute"`, which are imported when first used.

    Example:
        >>> colours = Registry("colour")
        >>> colours.register("red")(0xFF0000) == colours.get("red")
        True
    """

    def __init__(self, kind: str, lazy: dict[str, str] | None = None):
        self.kind = kind
        self._entries: dict[str, Any] = dict(lazy or {})

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an object under `name`. A name that is taken raises `ValueError`."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry, or raise `ConfigError` with the nearest name."""
        if name not in self._entries:
            known = ", ".join(self.names())
            raise ConfigError(f"unknown {self.kind} '{name}'{did_you_mean(name, self._entries)}; known: {known}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, attribute = entry.split(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return cast(T, entry)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
