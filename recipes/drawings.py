"""Training data for few_shot.yaml, dialog.yaml, video.yaml and grounding.yaml, from easy-VQA's drawings of shapes.

    python recipes/drawings.py few_shot data/episodes
    python recipes/drawings.py dialog data/chats
    python recipes/drawings.py video data/clips
    python recipes/drawings.py grounding data/boxes

Training and validation have different drawings.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from frozenprefix.data import Sample, load_image, load_source
from frozenprefix.evaluation.tasks import binding_episodes

EASY_VQA = "pypi://easy-vqa==1.0/easy_vqa/data"
#: prompts, chats or clips to make
COUNTS = {
    "few_shot": {"train": 4800, "val": 100},
    "dialog": {"train": 2000, "val": 40},
    "video": {"train": 1600, "val": 60},
    "grounding": {"train": 4000, "val": 100},
}
FRAMES = 4
GROUNDED, GROUND = ("red", "green", "blue"), 128  # colours, and the side of a ground in pixels
MOVES = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


def few_shot(drawings: Sequence[Sample], folder: Path, split: str) -> None:
    """Episodes of two made-up names and one shot each: conversations of one turn, with three images."""
    episodes = binding_episodes(drawings, ways=2, shots=1, episodes=COUNTS["few_shot"][split])
    write_talks(folder / f"{split}.json", ((e.images, [(e.prompt, e.answer)]) for e in episodes))


def dialog(drawings: Sequence[Sample], folder: Path, split: str) -> None:
    """Chats of five turns about two drawings; the last question is about the first of them."""
    draw = random.Random(split)

    def talks() -> Iterator[tuple[Sequence[Path], list[tuple[str, str]]]]:
        for _ in range(COUNTS["dialog"][split]):
            first, second = draw.sample(list(drawings), 2)
            (colour, shape), (other_colour, other_shape) = (drawn.targets[0].split() for drawn in (first, second))
            about_first = {"shape": f"It was a {shape}.", "color": f"It was {colour}."}
            asked = draw.choice(sorted(about_first))
            turns = [
                ("<image>what shape is in the image?", f"It is a {shape}."),
                ("what color is it?", f"It is {colour}."),
                ("<image>and what shape is in this image?", f"It is a {other_shape}."),
                ("what color is it?", f"It is {other_colour}."),
                (f"what {asked} was in the first image?", about_first[asked]),
            ]
            yield [*first.images, *second.images], turns

    write_talks(folder / f"{split}.json", talks())


def video(drawings: Sequence[Sample], folder: Path, split: str) -> None:
    """Drawings that move over a larger ground: four frames a clip, and for validation the video file too."""
    import av  # noqa: F401 - before much is made: pip install 'frozenprefix[video]'

    draw, rows, clips = random.Random(split), [], []
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    for number in range(COUNTS["video"][split]):
        drawn = draw.choice(list(drawings))
        way = draw.choice(sorted(MOVES))
        caption, name = f"a {drawn.targets[0]} moves {way}", f"{split}_{number:04}"
        frames = list(_moving(load_image(drawn.images[0]), *MOVES[way], draw.random()))
        files = [f"frames/{name}_{place}.png" for place in range(FRAMES)]
        for place, file in enumerate(files):
            frames[(2 * place + 1) * len(frames) // (2 * FRAMES)].save(folder / file)  # as VideoCaptioner samples them
        rows.append({"image": files, "captions": [caption], "split": split})
        if split != "train":
            _write_clip(folder / f"{name}.mp4", frames)
            clips.append({"image": f"{name}.mp4", "captions": [caption]})
    _write_lines(folder / f"{split}.jsonl", rows)
    if clips:
        _write_lines(folder / "captions.jsonl", clips)


def grounding(drawings: Sequence[Sample], folder: Path, split: str) -> None:
    """Three shapes of three colours on one ground, with the phrase and the box of each, as RefCOCO's files."""
    draw = random.Random(split)
    by_colour = {colour: [d for d in drawings if d.targets[0].split()[0] == colour] for colour in GROUNDED}
    shapes = {colour: [_shape(draw.choice(some)) for _ in range(60)] for colour, some in by_colour.items() if some}
    images, boxes, refs = [], [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(COUNTS["grounding"][split]):
        ground, name = Image.new("RGB", (GROUND, GROUND), "white"), f"{split}_{number:04}.png"
        for colour, place in zip(sorted(shapes), _free_places(draw, len(shapes)), strict=True):
            phrase, shape = draw.choice(shapes[colour])
            ground.paste(shape.resize(place[2:]), place[:2])
            key = f"{split}{number}.{colour}"
            boxes.append({"id": key, "image_id": name, "bbox": place})
            refs.append({"ref_id": key, "ann_id": key, "split": split, "sentences": [{"sent": f"the {phrase}"}]})
        ground.save(folder / "images" / name)
        images.append({"id": name, "file_name": name, "width": GROUND, "height": GROUND})
    (folder / f"instances_{split}.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    (folder / f"refs_{split}.json").write_text(json.dumps(refs))


def _shape(drawing: Sample) -> tuple[str, Image.Image]:
    """What is drawn, cut out along its edges."""
    image = load_image(drawing.images[0])
    edges = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, 0)))).getbbox()
    return drawing.targets[0], image.crop(edges)


def _free_places(draw: random.Random, count: int) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of shapes that do not touch each other."""
    while True:
        places = []
        for _ in range(count):
            width, height = draw.randint(40, 56), draw.randint(40, 56)
            places.append((draw.randint(0, GROUND - width), draw.randint(0, GROUND - height), width, height))
        if all(
            x + w <= left or left + wide <= x or y + h <= top or top + high <= y
            for (x, y, w, h), (left, top, wide, high) in combinations(places, 2)
        ):
            return places


def _moving(drawing: Image.Image, right: int, down: int, aside: float, count: int = 16) -> Iterator[Image.Image]:
    """`count` images of a drawing that crosses a ground twice as large; `aside` is 0 to 1, across the way."""
    side = drawing.width
    for number in range(count):
        way = (number + 0.5) / count
        ground = Image.new("RGB", (2 * side, 2 * side), drawing.getpixel((0, 0)))
        x = {1: way, -1: 1 - way, 0: aside}[right]
        y = {1: way, -1: 1 - way, 0: aside}[down]
        ground.paste(drawing, (round(x * side), round(y * side)))
        yield ground


def _write_clip(file: Path, frames: Sequence[Image.Image]) -> None:
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.bit_rate = *frames[0].size, 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def write_talks(file: Path, talks: Iterable[tuple[Sequence[Path], list[tuple[str, str]]]]) -> None:
    """Write images and their (question, answer) turns in LLaVA's format."""
    rows: list[dict[str, Any]] = []
    for number, (images, turns) in enumerate(talks):
        said = [
            {"from": who, "value": text} for asked, reply in turns for who, text in (("human", asked), ("gpt", reply))
        ]
        rows.append({"id": str(number), "image": [str(path.resolve()) for path in images], "conversations": said})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


TASKS: dict[str, Callable[[Sequence[Sample], Path, str], None]] = {
    "few_shot": few_shot,
    "dialog": dialog,
    "video": video,
    "grounding": grounding,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path, help="what is made goes here")
    parser.add_argument("--data", default=EASY_VQA, help="easy-VQA's folder, or a reference to it")
    options = parser.parse_args(argv)
    for split in ("train", "val"):
        source = {
            "type": "easy_vqa",
            "path": options.data,
            "split": split,
            "questions": False,
            "classes": "color shape",
        }
        TASKS[options.task](load_source(source), options.folder, split)


if __name__ == "__main__":
    main()
