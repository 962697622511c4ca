"""Text as HTML."""

from __future__ import annotations

import html
import re
from typing import Any

# What a page may not hold: control characters, and halves of surrogate pairs, which cannot be written as UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def escape(value: Any) -> str:
    """Text for anywhere in a page, attributes included; characters that a page may not hold become U+FFFD.

    Example:
        >>> escape("<b>")
        '&lt;b&gt;'
    """
    return html.escape(_FORBIDDEN.sub("\ufffd", str(value)))


def foreign(text: str) -> str:
    """Escaped text of a model or a data set: its writing direction does not spill over; nothing is shown as such."""
    return f"<bdi>{escape(text)}</bdi>" if text.strip() else "<em>(nothing)</em>"


def number(value: Any) -> str:
    """A score as it stands in a table: three decimals, counts without any."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else escape(value)
    whole = isinstance(value, int) or (abs(value) > 1 and value.is_integer())
    return f"{value:.0f}" if whole else f"{value:.3f}"
