"""Objects by name, imported when first used: a typed registry for what recipes name, and exports of packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from frozenprefix.errors import ConfigError, did_you_mean

T = TypeVar("T")
E = TypeVar("E")
_PERMISSION = "FROZENPREFIX_ALLOW_CODE"
# group of entry points → name → the registry that it was added to by `Registry.register` in this process
_REGISTERED: dict[str, dict[str, Any]] = {}


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
        base: class that an entry from outside has to be a subclass of.

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

    def register(self, name: str) -> Callable[[E], E]:
        """Decorator that adds an object under `name`, from outside this package or from within.

        A class whose definition is run again, in a notebook, replaces the former one.

        Raises:
            ConfigError: for a name that is taken, or that reads as code, and for an object that is no `base`.
        """

        def add(entry: E) -> E:
            self.check(name, entry)
            self._entries[name] = entry
            if self.group is not None:
                _REGISTERED.setdefault(self.group, {})[name] = self
            return entry

        return add

    def check(self, name: str, entry: Any) -> None:
        """Raise `ConfigError` for what `register` refuses."""
        if not isinstance(name, str) or not name.strip() or ":" in name:
            raise ConfigError(f"{self.kind} {name!r}: expected a name to be registered under, without ':'")
        former = self._entries.get(name)
        if former is not None and _definition(former) != _definition(entry):
            raise ConfigError(f"{self.kind} '{name}' is registered twice; choose another name")
        self._check_base(f"{self.kind} '{name}'", entry)

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
            raise ConfigError(self._unknown(name))
        if reference is name and os.environ.get(_PERMISSION) != "1":
            raise ConfigError(
                f"{what} is code from outside this package, which runs with your rights; if you trust it, allow it "
                f"with --allow-code, {_PERMISSION}=1 or frozenprefix.allow_code()"
            )
        if " and " in reference:
            raise ConfigError(f"{what}: got {reference} as entry points of that name; uninstall the package of one")
        entry = _import(reference, what)
        self._check_base(what, entry)
        return entry

    def _unknown(self, name: str) -> str:
        hint = did_you_mean(name, self.names())
        message = f"unknown {self.kind} '{name}'{hint}; known: {', '.join(self.names())}"
        if hint or self.group is None:
            return message
        return f"{message}. One of your own: import the module that registers it, or install its package"

    def _check_base(self, what: str, entry: Any) -> None:
        if self.base is not None and not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise ConfigError(f"{what}: got {entry!r}, expected a subclass of {self.base.__name__}")


@contextmanager
def undoing_registrations() -> Iterator[None]:
    """What is registered inside the block is gone after it, in tests.

    Example:
        >>> mappers = Registry("mapper", group="frozenprefix.mappers")
        >>> with undoing_registrations():
        ...     _ = mappers.register("mine")(dict)
        >>> "mine" in mappers
        False
    """
    before = {group: set(names) for group, names in _REGISTERED.items()}
    try:
        yield
    finally:
        for group, names in _REGISTERED.items():
            for name in names.keys() - before.get(group, set()):
                names.pop(name)._entries.pop(name)


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
    """Whether `name` is from outside this package: `package.module:attribute`, an entry point, or registered.

    Example:
        >>> is_external("mine.mappers:Tiny", "frozenprefix.mappers"), is_external("mlp", "frozenprefix.mappers")
        (True, False)
    """
    return ":" in name or name in _REGISTERED.get(group, ()) or name in _entry_points(group)


def origin_of(name: str, group: str) -> str | None:
    """Where a name from outside this package comes from, as `package.module:attribute`; None for other names.

    Example:
        >>> Registry("mapper", group="frozenprefix.mappers").register("mine")(dict) is dict
        True
        >>> origin_of("mine", "frozenprefix.mappers"), origin_of("mlp", "frozenprefix.mappers")
        ('builtins:dict', None)
    """
    registry = _REGISTERED.get(group, {}).get(name)
    if registry is None:
        return _entry_points(group).get(name)
    entry = registry.get(name)
    return f"{getattr(entry, '__module__', '')}:{getattr(entry, '__qualname__', type(entry).__qualname__)}"


def _entry_points(group: str | None) -> dict[str, str]:
    """name -> "package.module:attribute"; a name that two packages have is joined by " and ", and is no reference."""
    from importlib.metadata import entry_points

    found: dict[str, dict[str, None]] = {}
    for point in () if group is None else entry_points(group=group):
        found.setdefault(point.name, {})[f"{point.module}:{point.attr}"] = None
    return {name: " and ".join(references) for name, references in found.items()}


def _definition(entry: Any) -> Any:
    """What two runs of the same definition have in common."""
    place = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
    return entry if None in place else place


def _import(reference: str, what: str) -> Any:
    module, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path:  # a command does not look for modules in the working folder
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} cannot be imported ({error}); install its package, or set PYTHONPATH") from error
