"""Why a model wrote a text about an image: evidence, heat maps, alternatives, nearest words of the prefix."""

from frozenprefix.interpret.explain.explainer import Explainer, explain
from frozenprefix.interpret.explain.explanation import (
    TRUSTED,
    Choice,
    ExplainedWord,
    Explanation,
    PrefixPosition,
    trusted,
)
from frozenprefix.interpret.explain.figure import overlay
from frozenprefix.interpret.explain.page import write_explanations

__all__ = [
    "TRUSTED",
    "Choice",
    "ExplainedWord",
    "Explainer",
    "Explanation",
    "PrefixPosition",
    "explain",
    "overlay",
    "trusted",
    "write_explanations",
]
