"""The loss of a run as a chart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

#: Name in the log -> label in the legend, and the line's style.
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "loss": ("training", {"color": "#7a7a72", "linewidth": 1}),
    "validation/loss": ("validation", {"color": "#0b62b0", "linewidth": 2, "marker": "o"}),
    "validation/shuffled_loss": (
        "validation, shuffled images",
        {"color": "#a8480a", "linewidth": 2, "marker": "s", "linestyle": "--"},
    ),
}
# The chart is about 500 pixels wide: more points than this would overlap.
_MAX_POINTS = 240

Points = list[tuple[float, float]]


def loss_points(log: Sequence[dict[str, Any]], name: str) -> Points:
    """(step, value) of one logged value, at most 240 points; longer logs are averaged over neighbouring rows.

    Values that are not finite numbers are left out.

    Example:
        >>> loss_points([{"step": 1, "loss": 3.5}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 2}], "loss")
        [(1.0, 3.5), (3.0, 2.0)]
    """
    rows = [(row["step"], row[name]) for row in log if name in row]
    points = [(float(step), float(v)) for step, v in rows if isinstance(v, (int, float)) and math.isfinite(v)]
    size = math.ceil(len(points) / _MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def describe_loss(log: Sequence[dict[str, Any]]) -> str:
    """The chart in one sentence, for readers who do not see it; empty if the log holds no loss.

    Example:
        >>> describe_loss([{"step": 10, "loss": 2.0, "validation/loss": 2.5}])
        'Loss over 10 steps. At the end: training 2.000, validation 2.500.'
    """
    curves = {label: points for name, (label, _) in CURVES.items() if (points := loss_points(log, name))}
    if not curves:
        return ""
    last_step = max(points[-1][0] for points in curves.values())
    ends = ", ".join(f"{label} {points[-1][1]:.3f}" for label, points in curves.items())
    return f"Loss over {last_step:.0f} steps. At the end: {ends}."


def draw_loss(log: Sequence[dict[str, Any]]) -> bytes:
    """An SVG chart of training and validation loss over the steps. The same log gives the same bytes.

    Args:
        log: rows of `training.tracking.read_log`.

    Example:
        >>> draw_loss([{"step": 1, "loss": 3.5}, {"step": 2, "loss": 3.0}])[:5]
        b'<?xml'
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loss", "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss per token")
        for name, (label, style) in CURVES.items():
            if points := loss_points(log, name):
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(axis="y", color="#d9d9d2")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
