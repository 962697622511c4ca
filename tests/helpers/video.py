"""Small videos of plain colours and of drawings, and a look at what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")


def write_clip(path: Path, images, *, each: int = 5, fps: int = 10, codec: str = "mpeg4", turned: int = 0) -> Path:
    """A video that shows every image for `each` frames. All images are made as large as the first one."""
    width, height = (side - side % 2 for side in images[0].size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "7"})
        stream.width, stream.height, stream.bit_rate = width, height, 4_000_000
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for image in (image for image in images for _ in range(each)):
            container.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB").resize((width, height)))))
        container.mux(stream.encode())
    return path


def plain(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), colour) for colour in colours]


def colour_of(image: Image.Image) -> str:
    mean = np.asarray(image).reshape(-1, 3).mean(0)
    return ("red", "green", "blue")[int(mean.argmax())] if mean.max() - mean.min() > 60 else "grey"


def three_colours(folder: Path) -> Path:
    """2 seconds each of red, green and blue, 10 frames a second."""
    return write_clip(folder / "three.mp4", plain("red", "lime", "blue"), each=20)
