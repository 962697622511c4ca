"""Every public class and function shows in its docstring how it is used."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest

import frozenprefix

PACKAGES = ["frozenprefix"] + [
    module.name for module in pkgutil.walk_packages(frozenprefix.__path__, "frozenprefix.") if module.ispkg
]


def exports(package: str) -> dict[str, object]:
    """The classes and functions of a package's `__all__` that this project defines."""
    module = import_module(package)
    values = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    return {
        f"{value.__module__}.{name}": value
        for name, value in values.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("frozenprefix.")
    }


def has_example(value: object) -> bool:
    """Whether the docstring has an example; a class may have it in a public method."""
    docstrings = [value.__doc__ or ""]
    if inspect.isclass(value):
        docstrings += [getattr(member, "__doc__", None) or "" for name, member in vars(value).items() if name[0] != "_"]
    return any(">>>" in docstring for docstring in docstrings)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_has_an_example(package):
    assert sorted(name for name, value in exports(package).items() if not has_example(value)) == []
