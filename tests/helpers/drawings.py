"""Drawings of coloured shapes, and data sets of them."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", "triangle", "cross")


def draw_shape(colour: str, shape: str):
    """A 48 x 48 image of one coloured shape on white."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (48, 48), "white")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((8, 8, 40, 40), fill=colour)
    elif shape == "square":
        draw.rectangle((8, 8, 40, 40), fill=colour)
    elif shape == "triangle":
        draw.polygon([(24, 6), (42, 42), (6, 42)], fill=colour)
    else:
        draw.line((8, 8, 40, 40), fill=colour, width=8)
        draw.line((40, 8, 8, 40), fill=colour, width=8)
    return image


def write_shapes(folder: Path) -> Path:
    """12 drawings with captions.jsonl and qa.jsonl: 8 in split train, 4 (one of each shape) in split val."""
    (folder / "images").mkdir(parents=True)
    captions, questions = [], []
    for number, (colour, shape) in enumerate((colour, shape) for shape in SHAPES for colour in COLOURS):
        name, split = f"images/{colour}_{shape}.png", "val" if number % 3 == 2 else "train"
        draw_shape(colour, shape).save(folder / name)
        texts = [f"a {colour} {shape}", f"a {shape} in {colour}", f"the {shape} is {colour}"]
        captions.append({"image": name, "captions": texts, "split": split})
        for kind, answer in (("color", colour), ("shape", shape)):
            question = f"what {kind} is this?"
            questions.append({"image": name, "question": question, "answer": answer, "type": kind, "split": split})
    for name, rows in (("captions.jsonl", captions), ("qa.jsonl", questions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
