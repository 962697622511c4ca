"""Models of this package in other people's evaluations: lmms-eval and VLMEvalKit."""

from typing import TYPE_CHECKING

from frozenprefix.registry import lazy_exports

if TYPE_CHECKING:
    from frozenprefix.interop.requests import Answerer, Request
    from frozenprefix.interop.vlmevalkit import FrozenPrefixVLM

__all__ = ["Answerer", "FrozenPrefixVLM", "Request"]
__getattr__ = lazy_exports(__name__, {"requests": ("Answerer", "Request"), "vlmevalkit": ("FrozenPrefixVLM",)})
