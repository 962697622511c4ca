"""Objects by name, imported when first used: a typed registry for what recipes name, and exports of packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from frozenprefix.errors import ConfigError, did_you_mean

T = TypeVar("T")
_PERMISSION = "FROZENPREFIX_ALLOW_CODE"


def allow_code(allowed: bool = True) -> None:
    """Allow recipes and checkpoints to name code as `package.module:Class`, in this process and those it starts.

    Such code runs with your rights. The command line has `--allow-code`, the environment `FROZENPREFIX_ALLOW_CODE=1`.

    Example:
        >>> allow_code(False)
        >>> Registry("mapper", group="frozenprefix.mappers").get("mine.mappers:Tiny")
        Traceback (most recent call last):
        frozenprefix.errors.ConfigError: mapper 'mine.mappers:Tiny' is code from outside this package...
    """
    os.environ[_PERMISSION] = "1" if allowed else "0"


class Registry(Generic[T]):
    """Name → object.

    Args:
        kind: of the entries, for error messages: "mapper", "data source".
        lazy: entries as `"package.module:attribute"`, which are imported when first used.
        group: entry points of this group, in any installed distribution, are entries too; and so is every
            "package.module:attribute" once `allow_code` was called.
        base: class that such an entry has to be a subclass of.

    Example:
        >>> colours = Registry("colour")
        >>> colours.register("red")(0xFF0000) == colours.get("red")
        True
    """

    def __init__(
        self, kind: str, lazy: dict[str, str] | None = None, *, group: str | None = None, base: type | None = None
    ):
        self.kind, self.group, self.base = kind, group, base
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
        """Return the entry.

        Raises:
            ConfigError: for an unknown name, with the nearest one; and for code that is not allowed or not there.
        """
        if name not in self._entries:
            return cast(T, self._get_external(name))
        entry = self._entries[name]
        if isinstance(entry, str):
            module, attribute = entry.split(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return cast(T, entry)

    def names(self) -> list[str]:
        """All names, those of entry points included."""
        return sorted({*self._entries, *_entry_points(self.group)})

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in _entry_points(self.group)

    def _get_external(self, name: str) -> Any:
        what, reference = f"{self.kind} '{name}'", _entry_points(self.group).get(name, name)
        if self.group is None or not is_external(name, self.group):
            known = ", ".join(self.names())
            raise ConfigError(f"unknown {what}{did_you_mean(name, self.names())}; known: {known}")
        if reference is name and os.environ.get(_PERMISSION) != "1":
            raise ConfigError(
                f"{what} is code from outside this package, which runs with your rights; if you trust it, allow it "
                f"with --allow-code, {_PERMISSION}=1 or frozenprefix.allow_code()"
            )
        entry = _import(reference, what)
        if self.base is not None and not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise ConfigError(f"{what}: got {entry!r}, expected a subclass of {self.base.__name__}")
        return entry


def lazy_exports(package: str, modules: dict[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """A `__getattr__` for a package, which imports a public name when it is first used: torch is slow to import.

    Args:
        modules: module below the package → its public names.

    Example:
        >>> get = lazy_exports("frozenprefix", {"errors": ("DataError",)})
        >>> get("DataError").__name__
        'DataError'
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return get


def is_external(name: str, group: str) -> bool:
    """Whether `name` is a `package.module:attribute`, or an entry point of `group` in an installed distribution.

    Example:
        >>> is_external("mine.mappers:Tiny", "frozenprefix.mappers"), is_external("mlp", "frozenprefix.mappers")
        (True, False)
    """
    return ":" in name or name in _entry_points(group)


def _entry_points(group: str | None) -> dict[str, str]:
    """name -> "package.module:attribute"."""
    from importlib.metadata import entry_points

    return {} if group is None else {point.name: point.value for point in entry_points(group=group)}


def _import(reference: str, what: str) -> Any:
    module, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path:  # a command does not look for modules in the working folder
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} cannot be imported ({error}); install its package, or set PYTHONPATH") from error
