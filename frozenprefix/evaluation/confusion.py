"""A confusion matrix as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from frozenprefix.utils import atomic_file

_LONGEST_LABEL = 24  # letters; a longer label is cut


def draw_confusion(labels: Sequence[str], confusion: Sequence[Sequence[int]], path: Path) -> None:
    """Draw counts as shades into an image file: a row is a true label, and its shades add up to the darkest one.

    Args:
        confusion: int[L, L], rows true, columns predicted, as `classification_report` gives it.
        path: .svg, .png or .pdf.

    Example:
        >>> draw_confusion(["cat", "dog"], [[3, 1], [0, 2]], tmp_path / "confusion.svg")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: takes half a second to import
    from matplotlib.figure import Figure

    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [_plain(label) for label in labels]
    size = 1.5 + 0.4 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="predicted",
        ylabel="true",
        title=f"{int(np.trace(counts))} of {int(counts.sum())} images on the diagonal",
    )
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.xaxis.tick_top()
    for row, column in zip(*counts.nonzero(), strict=True):
        ink = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=ink)
    with atomic_file(path) as draft:
        figure.savefig(draft, format=path.suffix.removeprefix("."))


def _plain(label: str) -> str:
    """A label in one short line of printable characters."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in label)
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
