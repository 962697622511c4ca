"""Figures of explanations, and heat maps as images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_COLUMNS = 4
_STRENGTH = 0.65


def overlay(image: Image.Image, values: np.ndarray, *, highest: float | None = None) -> Image.Image:
    """A heat map over an image: the image in grey where the map is at or below 0, bright where it is highest.

    Args:
        values: float[g, g]; what is below 0 counts as 0.
        highest: value of the full colour; the map's own highest one by default.

    Example:
        >>> overlay(image, np.eye(2)).size == image.size
        True
    """
    values = np.clip(values.astype(np.float32), 0, None)
    heat = Image.fromarray(values / max(float(values.max()) if highest is None else highest, 1e-12)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    share = np.clip(np.asarray(heat), 0, 1)[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None].repeat(3, axis=2) * 0.8 + 40
    colours = matplotlib.colormaps["inferno"](share[..., 0])[..., :3] * 255
    mixed = grey * (1 - _STRENGTH * share) + colours * _STRENGTH * share
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def draw(explanation: Any, words: Sequence[int]) -> Figure:
    """Of an `Explanation`: the image, and the maps of the words, occlusion and beside it attention if there is any."""
    from matplotlib.figure import Figure

    assert explanation.image is not None
    maps = list(explanation.heat_maps.items())
    panels = len(words) * len(maps) + 1
    rows = -(-panels // _COLUMNS)
    figure = Figure(figsize=(3 * min(panels, _COLUMNS), 3.3 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, min(panels, _COLUMNS), place + 1) for place in range(panels)]
    axes[0].imshow(explanation.image)
    axes[0].set_title(explanation.text, wrap=True, fontsize=9)
    for place, axis in enumerate(axes[1:]):
        word, (kind, (values, highest)) = words[place // len(maps)], maps[place % len(maps)]
        axis.imshow(overlay(explanation.image, values[word], highest=highest))
        told = explanation.words[word].evidence
        evidence = "" if told is None else f"  {told:+.1f}"
        axis.set_title(f"{explanation.words[word].text}{evidence}  ({kind})", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    return figure
