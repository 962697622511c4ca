"""A confusion matrix as a small drawing in SVG."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_CELL, _TEXT, _MARGIN = 28, 12, 8
_LETTER = 0.6 * _TEXT  # about how wide one is
_LONGEST = 24  # letters of a label; a longer one is cut
# control characters and halves of surrogate pairs may not stand in XML
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def confusion_svg(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Draw counts as shades: each row is a true label, whose images are all of a full shade.

    Args:
        confusion: int[L, L], rows true, columns predicted, as `classification_report` gives it.

    Returns:
        an SVG document with a tooltip for every cell that is not empty.
    """
    names = [_shortened(label) for label in labels]
    side = round(max(map(len, names), default=0) * _LETTER) + 2 * _MARGIN
    left, top = side + 2 * _TEXT, side + 2 * _TEXT
    size = _CELL * len(names)
    width, height = left + size + _MARGIN, top + size + _MARGIN
    hits = sum(row[i] for i, row in enumerate(confusion))
    total = sum(map(sum, confusion))
    about = f"Confusion matrix of {len(names)} labels: {hits} of {total} images on the diagonal."
    middle = f"{left + size / 2:.0f}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="{_TEXT}" role="img" aria-label="{about}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{middle}" y="{_TEXT + 2}" text-anchor="middle" font-weight="bold">predicted</text>',
        f'<text transform="translate({_TEXT + 2} {top + size / 2:.0f}) rotate(-90)" text-anchor="middle" '
        'font-weight="bold">true</text>',
    ]
    for i, name in enumerate(names):
        middle_of_cell = i * _CELL + _CELL / 2
        lines.append(
            f'<text x="{left - _MARGIN}" y="{top + middle_of_cell + 4:.0f}" text-anchor="end">{_escape(name)}</text>'
        )
        lines.append(
            f'<text transform="translate({left + middle_of_cell + 4:.0f} {top - _MARGIN}) rotate(-90)">'
            f"{_escape(name)}</text>"
        )
        for j, count in enumerate(confusion[i]):
            lines += _cell(left + j * _CELL, top + i * _CELL, count, sum(confusion[i]), labels[i], labels[j])
    lines.append(f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#666666"/>')
    return "\n".join([*lines, "</svg>\n"])


def _cell(x: int, y: int, count: int, of: int, true: str, predicted: str) -> list[str]:
    if not count:
        return []
    share = count / of
    title = _escape(f"{true} taken for {predicted}: {count} of {of}")
    # from white to dark blue; white letters where black ones would be hard to read
    red, green, blue = (round(255 + (dark - 255) * share) for dark in (31, 78, 140))
    ink = "#ffffff" if share > 0.5 else "#000000"
    return [
        f'<g><title>{title}</title><rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" '
        f'fill="rgb({red},{green},{blue})"/>'
        f'<text x="{x + _CELL // 2}" y="{y + _CELL // 2 + 4}" text-anchor="middle" fill="{ink}">{count}</text></g>'
    ]


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"


def _escape(text: str) -> str:
    return html.escape(_FORBIDDEN.sub("\ufffd", text))
