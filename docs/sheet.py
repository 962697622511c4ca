"""A drawing of images and text, saved as SVG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from frozenprefix.data import load_image
from frozenprefix.models import IMAGE_TOKEN

SIDE, GAP, LINE, MARGIN = 64, 16, 20, 12  # of a drawing, between drawings, of a line of text, around everything
GREY, BLUE, RED = "#666666", "#1f4e8c", "#a32020"


@dataclass
class Sheet:
    """An SVG drawing that grows with its contents; positions are in pixels from the upper left corner."""

    parts: list[str] = field(default_factory=list)
    width: float = 0
    height: float = 0

    def image(self, image: Image.Image | Path, x: float, y: float, side: float = SIDE) -> None:
        """An image in a thin frame."""
        image = load_image(image) if isinstance(image, Path) else image
        buffer = io.BytesIO()
        image.resize((SIDE, SIDE)).quantize(64).save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        place = f'x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"'
        self.parts.append(f'<image {place} href="data:image/png;base64,{data}"/>')
        self.parts.append(f'<rect {place} fill="none" stroke="#cccccc"/>')
        self._grow(x + side, y + side)

    def text(
        self, words: str, x: float, y: float, *, ink: str = "#000000", bold: bool = False, mono: bool = True
    ) -> float:
        """A line of text, whose base is at `y`. Returns where it ends."""
        font = "monospace" if mono else "sans-serif"
        weight = ' font-weight="bold"' if bold else ""
        length = len(words) * (7.8 if mono else 7.0)  # about; a monospaced line is set to it exactly
        fit = f' textLength="{length:.0f}"' if mono and words else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{ink}" font-family="{font}"{weight}{fit} xml:space="preserve">'
            f"{html.escape(words)}</text>"
        )
        self._grow(x + length, y + 6)
        return x + length

    def title(self, words: str) -> None:
        """What the sheet shows, above everything else."""
        self.text(words, MARGIN, 22, bold=True, mono=False)

    def line(self, x: float, y: float, to_x: float) -> None:
        self.parts.append(f'<path d="M{x:g} {y:g}H{to_x:g}" stroke="#999999"/>')
        self._grow(to_x, y)

    def box(self, x: float, y: float, width: float, height: float, *, fill: str, ink: str = "#999999") -> None:
        """A filled rectangle with a thin frame."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{ink}"/>')
        self._grow(x + width, y + height)

    def arrow(self, x: float, y: float, to_x: float) -> None:
        """A horizontal line with a head at its end."""
        self.parts.append(f'<path d="M{x:g} {y:g}H{to_x:g}m-5 -4l5 4l-5 4" stroke="#666666" fill="none"/>')
        self._grow(to_x, y + 4)

    def save(self, path: Path) -> None:
        width, height = round(self.width + MARGIN), round(self.height + MARGIN)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-size="13"><rect width="{width}" height="{height}" fill="#ffffff"/>'
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([head, *self.parts, "</svg>\n"]), encoding="utf-8")

    def _grow(self, x: float, y: float) -> None:
        self.width, self.height = max(self.width, x), max(self.height, y)


def draw_prompt(
    sheet: Sheet,
    prompt: str,
    images: Iterable[Image.Image | Path],
    x: float,
    y: float,
    *,
    answer: str = "",
    columns: int = 80,
) -> float:
    """A prompt as the language model reads it, a small image at every `<image>`, and its answer in blue.

    Returns:
        where the next line goes.
    """
    shown, side, room = iter(images), 40, 48
    for number, line in enumerate(lines := prompt.split("\n")):
        at, height = x, room if IMAGE_TOKEN in line else LINE
        for place, part in enumerate(line.split(IMAGE_TOKEN)):
            if place:
                sheet.image(next(shown), at, y, side)
                at += side + 6
            base = y + height / 2 + 5
            at = sheet.text(part, at, base)
        if answer and number == len(lines) - 1:
            sheet.text(answer, at + 8 if line else at, base, ink=BLUE, bold=True)
        y += height
    return y
