"""Curves of several runs as charts: SVG that needs nothing else, the same bytes for the same logs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from frozenprefix.interpret.loss_curve import Points, loss_points

#: Colours that people tell apart whatever they see (Okabe and Ito 2008), and marks for print.
COLOURS = ("#0b62b0", "#d55e00", "#00825c", "#a8438c", "#8a6d00", "#4a4a46")
MARKS = ("o", "s", "^", "D", "v", "P")


class Curve(NamedTuple):
    """One line of a chart.

    Attributes:
        run: number of the run, which gives the colour.
        label: for the legend; None for a line that the legend explains with another.
        style: "line", "dashed" (the same run, shuffled images) or "faint" (many noisy points).
    """

    run: int
    label: str | None
    points: Points
    style: str = "line"


class Chart(NamedTuple):
    """What is drawn in one image."""

    title: str
    x: str
    y: str
    curves: list[Curve]
    from_zero: bool = True

    def description(self) -> str:
        """The chart in a sentence, for readers who do not see it."""
        ends = [f"{curve.label} {curve.points[-1][1]:.3g}" for curve in self.curves if curve.label and curve.points]
        return f"{self.title}, {self.y} over {self.x}. At the end: {', '.join(ends)}."


def charts_of(logs: Mapping[str, Sequence[dict[str, Any]]]) -> list[Chart]:
    """The charts of some runs: losses over steps and over minutes, other measures of validation, speed and memory.

    Args:
        logs: name of a run → rows of `training.tracking.read_log`.

    Example:
        >>> [chart.title for chart in charts_of({"a": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]})]
        ['Training loss']
    """
    charts = [
        _chart("Training loss", "step", "loss per token", logs, ["loss"], style="faint"),
        _chart(
            "Validation loss",
            "step",
            "loss per token",
            logs,
            ["validation/loss", "validation/shuffled_loss"],
            from_zero=False,
        ),
        _chart("Validation loss", "minutes", "loss per token", logs, ["validation/loss"], clock=True, from_zero=False),
        _chart("Validation CIDEr-D", "step", "CIDEr-D", logs, ["validation/cider_d"]),
        _chart("Captions that end", "step", "share", logs, ["validation/ended_share"]),
        _chart("Speed", "step", "targets per second", logs, ["targets_per_s"]),
        _chart("Memory at the peak", "step", "GB", logs, ["memory_gb"]),
    ]
    return [chart for chart in charts if any(len(curve.points) > 1 for curve in chart.curves)]


def _chart(
    title: str,
    x: str,
    y: str,
    logs: Mapping[str, Sequence[dict[str, Any]]],
    names: Sequence[str],
    *,
    style: str = "line",
    clock: bool = False,
    from_zero: bool = True,
) -> Chart:
    curves = []
    for number, (run, rows) in enumerate(logs.items()):
        for place, name in enumerate(names):
            points = loss_points(rows, name)
            if clock:
                minutes = _minutes(rows)
                points = [(minutes[step], value) for step, value in points if step in minutes]
            if points:
                label = run if place == 0 else f"{run}, shuffled images"
                curves.append(Curve(number, label, points, "dashed" if place else style))
    return Chart(title, x, y, curves, from_zero)


def _minutes(rows: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Step → minutes of training, from rows that tell; steps in between by the nearest earlier one."""
    found: dict[float, float] = {}
    minutes = 0.0
    told = any("seconds" in row for row in rows)
    for row in rows if told else ():
        minutes = row["seconds"] / 60 if isinstance(row.get("seconds"), int | float) else minutes
        found[float(row["step"])] = minutes
    return found


def draw(chart: Chart) -> bytes:
    """A chart as SVG.

    Example:
        >>> draw(Chart("Loss", "step", "loss", [Curve(0, "a", [(1.0, 3.0), (2.0, 2.0)])]))[:5]
        b'<?xml'
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.add_subplot(xlabel=chart.x, ylabel=chart.y)
        for curve in chart.curves:
            colour, faint = COLOURS[curve.run % len(COLOURS)], curve.style == "faint"
            few = len(curve.points) <= 40
            axes.plot(
                *zip(*curve.points, strict=True),
                label=curve.label,
                color=colour,
                linewidth=1.2 if faint else 2,
                linestyle="--" if curve.style == "dashed" else "-",
                marker=MARKS[curve.run % len(MARKS)] if few and not faint else None,
                markersize=4,
            )
        highest = max((y for curve in chart.curves for _, y in curve.points), default=1.0)
        axes.set_xlim(0, None)
        if chart.from_zero:
            axes.set_ylim(0, highest * 1.08 or 1.0)
        axes.set_title(chart.title, loc="left", fontsize=11)
        axes.grid(axis="y", color="#d9d9d2")
        axes.spines[["top", "right"]].set_visible(False)
        if len(chart.curves) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def best_of(rows: Sequence[dict[str, Any]], name: str = "validation/loss") -> tuple[int, float] | None:
    """(step, value) of the lowest validation loss.

    Example:
        >>> best_of([{"step": 1, "validation/loss": 2.0}, {"step": 2, "validation/loss": 1.5}])
        (2, 1.5)
    """
    values = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return min((pair for pair in values if math.isfinite(pair[1])), key=lambda pair: pair[1], default=None)
