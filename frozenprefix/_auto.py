"""Registration with transformers' Auto classes, without importing transformers.

`import frozenprefix` calls `install`. The parts of transformers that hold the Auto classes are told of this package's
classes right after each of them is imported, whichever comes first. They are given stand-ins that import the model
when it is first asked for something: importing it there and then could meet half-imported modules of whoever imported
transformers. No module of this package is imported by a static statement here: `frozenprefix` itself imports this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIG = ("frozenprefix.models.configuration", "FrozenPrefixConfig")
_MODEL = ("frozenprefix.models.modeling", "FrozenPrefixForConditionalGeneration")
_PROCESSOR = ("frozenprefix.models.processing", "FrozenPrefixProcessor")
_AUTO = "transformers.models.auto"

#: Module of transformers → its Auto classes, and what each is to give for the config.
#: AutoModel gives the same class: there is no part of the model that would be of use without its head.
_WANTED: dict[str, dict[str, tuple[str, str]]] = {
    f"{_AUTO}.configuration_auto": {"AutoConfig": _CONFIG},
    f"{_AUTO}.modeling_auto": {
        "AutoModel": _MODEL,
        "AutoModelForImageTextToText": _MODEL,
        "AutoModelForMultimodalLM": _MODEL,  # what `transformers serve` loads; not in every version
    },
    f"{_AUTO}.processing_auto": {"AutoProcessor": _PROCESSOR},
}


class _StandIn:
    """Is taken for a class by the Auto mappings, and imports it when it is used."""

    def __init__(self, place: tuple[str, str], config_class: type):
        self.__name__ = place[1]
        self.config_class = config_class
        self._place = place

    def _real(self) -> Any:
        return getattr(import_module(self._place[0]), self._place[1])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy, pickle and inspect, of an object that may not be set up yet
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)


class _AfterImport(MetaPathFinder):
    """Calls `_register` after the import of every module that has to do with it."""

    def __init__(self, names: set[str]):
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._names:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in later if hasattr(finder, "find_spec"))
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register with what is imported by now, and with the rest as soon as it is. Safe to call again."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport({*_WANTED, _CONFIG[0], _MODEL[0], _PROCESSOR[0]}))
    _register()


def _register() -> None:
    """Tell every Auto class that is imported by now. A second call puts real classes for stand-ins."""
    ready = [(m, name, place) for m, autos in _WANTED.items() for name, place in autos.items() if _imported(m, name)]
    if not ready or (_CONFIG[0] in sys.modules and not _imported(*_CONFIG)):
        return  # nothing to tell, or the config is being imported: this is called again after that
    config_class = getattr(import_module(_CONFIG[0]), _CONFIG[1])
    for module, name, place in ready:
        auto = getattr(sys.modules[module], name)
        if place == _CONFIG:
            auto.register(config_class.model_type, config_class, exist_ok=True)
        else:
            known = getattr(sys.modules[place[0]], place[1]) if _imported(*place) else _StandIn(place, config_class)
            auto.register(config_class, known, exist_ok=True)


def _imported(module: str, name: str) -> bool:
    return hasattr(sys.modules.get(module), name)
