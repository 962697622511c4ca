"""The drawings of concepts.md: the model, and how captions share a row.

    python docs/make_concepts.py

The packed row, its positions and its mask are those that `frozenprefix.pack` returns for the captions in the drawing.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from sheet import BLUE, GREY, MARGIN, Sheet

from frozenprefix import Target, pack

IMAGES = Path(__file__).with_name("images")
FROZEN, TRAINED, EMPTY, PREFIX, SEEN = "#e3ecf7", "#ffe2c2", "#f2f2f2", "#ffe2c2", "#6f9bd1"
CELL, HEIGHT = 66, 26
CAPTIONS = ("a man runs", "a man sits", "a dog sits")
PREFIX_LENGTH = 2
IMAGE_ID, END_ID = 100, 99


# ── the model ──


def model(path: Path) -> None:
    """The parts from left to right, with the shape of what passes between them."""
    sheet = Sheet()
    parts = (
        ("image encoder", "frozen", FROZEN),
        ("mapper", "trained", TRAINED),
        ("fusion", "", EMPTY),
        ("language model", "frozen", FROZEN),
    )
    between = ("image features", "prefix embeddings", "with words")
    shapes = ("[B, N, D_enc]", "[B, P, D_lm]", "[B, T, D_lm]")
    x, y, width, gap = float(MARGIN) + 62, 34.0, 126.0, 148.0
    places = [x + number * (width + gap) for number in range(len(parts))]
    sheet.text("image", MARGIN, y + 30)
    sheet.arrow(MARGIN + 42, y + 26, x - 2)
    for (name, state, fill), at in zip(parts, places, strict=True):
        sheet.box(at, y, width, 52, fill=fill)
        sheet.text(name, at + (width - len(name) * 7.8) / 2, y + (24 if state else 31))
        sheet.text(state, at + (width - len(state) * 7.8) / 2, y + 42, ink=BLUE)
    for (left, right), name, shape in zip(pairwise(places), between, shapes, strict=True):
        sheet.arrow(left + width + 2, y + 26, right - 2)
        sheet.text(name, left + width + (gap - len(name) * 7.8) / 2, y + 16, ink=GREY)
        sheet.text(shape, left + width + (gap - len(shape) * 7.8) / 2, y + 44, ink=GREY)
    sheet.arrow(places[-1] + width + 2, y + 26, places[-1] + width + 40)
    sheet.text("text", places[-1] + width + 46, y + 30)
    cache_from = places[0] + width + gap / 2
    sheet.text("feature cache: each image is encoded once", cache_from - 160, y + 86, ink=GREY)
    sheet.parts.append(f'<path d="M{cache_from:g} {y + 52:g}v16" stroke="#666666" stroke-dasharray="3 3"/>')
    sheet.save(path)


# ── packing ──


def packing(path: Path) -> None:
    """Three captions as a plain batch, as one packed row, and the mask of that row."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    targets = [
        Target([IMAGE_ID] * PREFIX_LENGTH + [words.index(word) for word in caption.split()] + [END_ID], PREFIX_LENGTH)
        for caption in CAPTIONS
    ]
    plain, packed = (
        pack([targets], image_token_id=IMAGE_ID, prefix_length=PREFIX_LENGTH, packing=how) for how in ("none", "trie")
    )

    def name(token: int) -> str:
        return {IMAGE_ID: "prefix", END_ID: "end"}.get(token) or words[token]

    sheet = Sheet()
    y = 24.0
    sheet.text(f"plain batch: {plain.input_ids.numel()} places", MARGIN, y, bold=True, mono=False)
    for row in plain.input_ids.tolist():
        y += HEIGHT + 4
        for column, token in enumerate(row):
            cell(sheet, name(token), MARGIN + column * CELL, y - HEIGHT + 10)
    row, depth, ends = (each[0].tolist() for each in (packed.input_ids, packed.position_ids, packed.subtree_end))
    y += 50
    sheet.text(f"packed: one row of {len(row)}", MARGIN, y, bold=True, mono=False)
    for column, token in enumerate(row):
        cell(sheet, name(token), MARGIN + column * CELL, y + 14)
        sheet.text(str(depth[column]), MARGIN + column * CELL + CELL / 2 - 4, y + HEIGHT + 30, ink=GREY)
    sheet.text("position", MARGIN + len(row) * CELL + 10, y + HEIGHT + 30, ink=GREY)

    weights = packed.edge_weight.tolist()
    sources = packed.predict_index[packed.edge_source].tolist()
    for column in range(len(row)):
        learned = [
            f"{name(label)} x{weight:g}"
            for source, label, weight in zip(sources, packed.edge_label.tolist(), weights, strict=True)
            if source == column
        ]
        for line, text in enumerate(learned):
            sheet.text(text, MARGIN + column * CELL + 2, y + HEIGHT + 50 + line * 18, ink=BLUE)
    sheet.text("learned there", MARGIN + len(row) * CELL + 10, y + HEIGHT + 50, ink=BLUE)
    y += HEIGHT + 104
    sheet.text("what each token of the row sees", MARGIN, y, bold=True, mono=False)
    side = 20
    for i, token in enumerate(row):
        top = y + 12 + i * side
        sheet.text(name(token), MARGIN, top + 15)
        for j in range(len(row)):
            seen = j <= i < ends[j]
            sheet.box(MARGIN + 60 + j * side, top, side, side, fill=SEEN if seen else "#ffffff", ink="#cccccc")
    note = MARGIN + 60 + len(row) * side + 24
    for line, text in enumerate(
        (
            "its ancestors and itself, nothing else:",
            "token j is an ancestor of i exactly if",
            "j <= i < subtree_end[j], so that the mask",
            "of a row is one vector:",
            f"subtree_end = {ends}",
        )
    ):
        sheet.text(text, note, y + 30 + line * 20, ink=GREY)
    sheet.save(path)


def cell(sheet: Sheet, word: str, x: float, y: float) -> None:
    sheet.box(x, y, CELL, HEIGHT, fill=PREFIX if word == "prefix" else "#ffffff")
    sheet.text(word, x + (CELL - len(word) * 7.8) / 2, y + 18)


if __name__ == "__main__":
    model(IMAGES / "model.svg")
    packing(IMAGES / "packing.svg")
