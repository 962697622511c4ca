"""Tars in img2dataset's layout, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def tiny_png(red: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (red % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: Sequence[int], *, texts: int = 2) -> Path:
    """Tars `00000.tar`, … with so many samples each; sample n has an image whose red is n, and captions that name n."""
    number = 0
    for shard, size in enumerate(sizes):
        members: dict[str, bytes] = {}
        for _ in range(size):
            key = f"{number:06d}"
            captions = [f"a dog number {number}", f"number {number} is a cat", f"the {number}"][:texts]
            members[f"{key}.png"] = tiny_png(number)
            members[f"{key}.json"] = json.dumps({"captions": captions}).encode()
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def streamed(folder: Path, **options: object) -> dict:
    """The source of `write_shards`' tars."""
    return {"type": "webdataset", "path": str(folder), "captions": "json.captions", "stream": True, **options}
