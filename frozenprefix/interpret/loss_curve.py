"""The loss of a run as a small drawing in SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from frozenprefix.interpret.markup import escape, number

#: Name in the log → (class in the style sheet, name in the legend).
CURVES = {
    "loss": ("train", "training"),
    "validation/loss": ("validation", "validation"),
    "validation/shuffled_loss": ("shuffled", "validation, shuffled images"),
}
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 466, 10, 252
# A pixel holds no more; each point is then the mean of as many neighbours as it takes.
_MOST_POINTS = 240

Points = list[tuple[float, float]]


def loss_curve(log: Sequence[dict[str, Any]]) -> str:
    """HTML of the loss over the steps, with the validation losses as a table behind it.

    Args:
        log: rows of `training.tracking.read_log`; values that are not finite numbers are left out.
    """
    curves = {name: points for name in CURVES if (points := points_of(log, name))}
    if not curves:
        return "<p>The log holds no loss.</p>"
    last_step = max(step for points in curves.values() for step, _ in points)
    highest = max(value for points in curves.values() for _, value in points)
    x_ticks, y_ticks = nice_ticks(last_step), nice_ticks(highest)

    def place(step: float, value: float) -> tuple[float, float]:
        across = _LEFT + (_RIGHT - _LEFT) * step / max(x_ticks[-1], last_step)
        return across, _BOTTOM - (_BOTTOM - _TOP) * value / y_ticks[-1]

    lines = [_curve(CURVES[name][0], [place(*point) for point in points]) for name, points in curves.items()]
    ends = ", ".join(f"{CURVES[name][1]} {number(points[-1][1])}" for name, points in curves.items())
    label = escape(f"Loss over {last_step:.0f} steps. At the end: {ends}.")
    drawing = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">',
        *(_y_tick(place(0, value)[1], value) for value in y_ticks),
        *(_x_tick(place(step, 0)[0], step) for step in x_ticks),
        f'<text x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">step</text>',
        f'<text transform="translate(13 {(_TOP + _BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "loss per token</text>",
        *lines,
        "</svg>",
    ]
    return "\n".join(
        ['<figure class="curve">', *drawing, f"<figcaption>{_legend(curves)}</figcaption>", "</figure>", _table(log)]
    )


def points_of(log: Sequence[dict[str, Any]], name: str) -> Points:
    """(step, value) of one value, at most 240 of them; beyond that, means of neighbours."""
    rows = [(row["step"], row[name]) for row in log if name in row]
    points = [(float(step), float(v)) for step, v in rows if isinstance(v, (int, float)) and math.isfinite(v)]
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def nice_ticks(highest: float) -> list[float]:
    """Three to six round numbers from 0 to the first at or above `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * m for m in (0.2, 0.25, 0.5, 1, 2) if power * m * 5 >= highest)
    return [round(i * step, 12) for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _curve(style: str, points: Points) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line {style}" points="{line}"></polyline>' + "".join(_marker(style, *p) for p in points)


def _marker(style: str, x: float, y: float) -> str:
    if style == "validation":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"></circle>'
    return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"></rect>' if style == "shuffled" else ""


def _y_tick(y: float, value: float) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"></line>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _x_tick(x: float, step: float) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 5}"></line>'
    return f'{line}<text x="{x:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{step:g}</text>'


def _legend(curves: dict[str, Points]) -> str:
    entries = []
    for style, name in (CURVES[key] for key in curves):
        sample = f'<line class="{style}" x1="0" x2="40" y1="8" y2="8"></line>{_marker(style, 20, 8)}'
        entries.append(f'<li><svg viewBox="0 0 40 16" aria-hidden="true">{sample}</svg> {escape(name)}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _table(log: Sequence[dict[str, Any]]) -> str:
    names = [name for name in CURVES if name != "loss"]
    rows = [row for row in log if any(name in row for name in names)]
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(CURVES[name][1])}</th>' for name in names)
    body = [
        f'<tr><th scope="row">{row["step"]}</th>{"".join(f"<td>{number(row.get(name))}</td>" for name in names)}</tr>'
        for row in rows
    ]
    table = [
        "<table>",
        f'<thead><tr><th scope="col">step</th>{head}</tr></thead>',
        "<tbody>",
        *body,
        "</tbody></table>",
    ]
    return "\n".join(
        [
            "<details>",
            "<summary>Validation losses as a table</summary>",
            '<div class="scroll">',
            *table,
            "</div></details>",
        ]
    )
