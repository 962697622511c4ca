"""Damaged files for every reader: only the package's own errors may come out.

Each input is a valid file with a few seeded changes: flipped bits, cut, doubled and foreign parts, other JSON values.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from frozenprefix.config import load_recipe, write_yaml
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_writer import FeatureCacheWriter
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.data.sources import load_source, open_source
from frozenprefix.data.streaming.build import build_shards
from frozenprefix.data.streaming.index import beside
from frozenprefix.errors import BadImageError, FrozenPrefixError
from frozenprefix.evaluation.journal import Journal
from frozenprefix.models.checkpoint import read_checkpoint
from frozenprefix.models.vision.precomputed import FeatureTable
from frozenprefix.training import read_log
from frozenprefix.training.checkpoints import Progress, load_training_state, save_training_state
from frozenprefix.utils import write_jsonl
from frozenprefix.utils.random_state import random_state
from frozenprefix.utils.sums import check_sums, write_sums
from frozenprefix.utils.tensors import save_tensors

# what stands in the place of a value
_VALUES = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x", "\ud800", "\x1b[31m", [], [[]], {}, {"": None})
_BYTES = (b"", b"\0", b"\xff\xfe", b"\n", b"{", b"]", b'"', b"9" * 400, b"[" * 3000, b"null", b"NaN", b"\xf0\x9f")


class Reader(NamedTuple):
    """A file that is damaged, and what reads it."""

    name: str
    file: Path
    read: Callable[[], Any]


def damaged(data: bytes, rng: random.Random, *, as_json: bool) -> bytes:
    """One to three changes of a file."""
    if as_json and rng.random() < 0.5:
        return _other_values(data, rng)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 4, 60, 2000))
        kind = rng.randrange(5)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = changed[place : place + length]
        elif kind == 3:
            changed[place:place] = rng.choice(_BYTES)
        else:
            del changed[place:]
    return bytes(changed)


def _other_values(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove or rename a value somewhere in a JSON file, or in one line of JSON lines."""
    lines = data.split(b"\n") if b"\n{" in data.strip() or b"\n[" in data.strip() else [data]
    number = rng.randrange(len(lines))
    try:
        content = json.loads(lines[number])
    except ValueError:
        return data[: rng.randrange(len(data) + 1)]
    holder: Any = {"": content}
    key: Any = ""
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if isinstance(holder, dict) and key and rng.random() < 0.3:
        holder[rng.choice(("x", key + "x"))] = holder.pop(key)
    else:
        holder[key] = rng.choice(_VALUES)
        content = holder[""] if "" in holder and key == "" and isinstance(holder, dict) else content
    lines[number] = json.dumps(content).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def make_readers(folder: Path) -> list[Reader]:
    """A valid file for every reader."""
    folder.mkdir(parents=True)
    return [*_files_of_users(folder), *_files_of_runs(folder), *_files_of_caches(folder)]


def _files_of_users(folder: Path) -> list[Reader]:
    recipe, image = folder / "recipe.yaml", folder / "image.png"
    recipe.write_text(
        write_yaml(
            {
                "name": "fuzz",
                "output_dir": str(folder / "run"),
                "model": {
                    "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random"},
                    "mapper": {"type": "mlp", "prefix_length": 4},
                    "language_model": {"path": "lm"},
                },
                "data": {"train": [{"type": "captions", "path": "data"}]},
                "training": {"max_steps": 3, "betas": [0.9, 0.98]},
            }
        )
    )
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(pixels).save(folder / "image.jpg")
    captions, table = folder / "captions.jsonl", folder / "table.npy"
    rows = [{"image": "image.png", "captions": ["a cat", "two cats"], "split": "train", "id": str(n)} for n in range(3)]
    write_jsonl(captions, rows)
    np.save(table, np.ones((3, 2, 4), np.float32))
    (folder / "table.json").write_text(json.dumps(["a", "b", "c"]))

    def read_table() -> Any:
        return FeatureTable(table, folder / "table.json").features([Path("a.png"), Path("c.png")])

    return [
        Reader("recipe", recipe, lambda: load_recipe(recipe)),
        Reader("image", image, lambda: load_image(image)),
        Reader("image", folder / "image.jpg", lambda: load_image(folder / "image.jpg")),
        Reader("captions", captions, lambda: load_source({"type": "captions", "path": str(folder)})),
        Reader("captions, streamed", captions, lambda: read_stream({"type": "captions", "path": str(folder)})),
        *_shards(folder),
        Reader("feature table", table, read_table),
        Reader("feature table", folder / "table.json", read_table),
    ]


def _shards(folder: Path) -> list[Reader]:
    """A tar, its index, and the tar as one without an index."""
    images = [folder / "image.png", folder / "image.jpg"]
    groups = [ImageGroup((image,), (Sample(image.name, (image,), ("a cat", "two cats")),)) for image in images]
    for name in ("shards", "bare"):
        build_shards(groups, folder / name, workers=0)
    beside(folder / "bare/00000.tar").unlink()

    def reading(name: str) -> Callable[[], Any]:
        return lambda: read_stream({"type": "webdataset", "path": str(folder / name), "shards": "*.tar"})

    tar = folder / "shards/00000.tar"
    return [
        Reader("shard", tar, reading("shards")),
        Reader("index of a shard", beside(tar), reading("shards")),
        Reader("shard without an index", folder / "bare/00000.tar", reading("bare")),
    ]


def read_stream(source: dict[str, Any]) -> None:
    """Read every sample of a stream, with its images."""
    groups = open_source({**source, "stream": True})
    for number in range(len(groups)):
        with suppress(BadImageError):  # which a step leaves out
            for image in groups[number].images:
                load_image(image)


def _files_of_runs(folder: Path) -> list[Reader]:
    state, run = folder / "state", folder / "log"
    state.mkdir()
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_training_state(state, optimizer, Progress(step=3), [random_state()])
    save_tensors({"weight": torch.ones(3)}, state / "model.safetensors")

    def read_state() -> Any:
        return load_training_state(state, torch.optim.AdamW(module.parameters()), {})

    write_jsonl(run / "log.jsonl", [{"step": step, "loss": 0.5} for step in range(1, 4)])
    sums = folder / "sums"
    sums.mkdir()
    (sums / "a").write_text("a")
    write_sums(sums)
    Journal(folder / "p.jsonl", {"beams": 1}).add({("model", "1"): "a cat", ("model", "2"): "a dog"})
    journal = folder / "p.jsonl.part-r00"
    files = ("training_state.json", "optimizer.safetensors", "random_state.safetensors")
    return [
        *(Reader("training state", state / name, read_state) for name in files),
        Reader("weights", state / "model.safetensors", lambda: read_checkpoint(state)),
        Reader("log", run / "log.jsonl", lambda: read_log(run)),
        Reader("sums", sums / "sums.json", lambda: check_sums(sums)),
        Reader("journal", journal, lambda: Journal(folder / "p.jsonl", {"beams": 1})),
    ]


def _files_of_caches(folder: Path) -> list[Reader]:
    cache = folder / "cache"
    with FeatureCacheWriter(cache, {"encoder": "fuzz"}) as writer:
        writer.add(["a", "b"], np.ones((2, 2, 4), np.float32))

    def read() -> Any:
        opened = FeatureCache.open(cache, {"encoder": "fuzz"})
        return opened.get(list(opened))

    return [Reader("feature cache", file, read) for file in sorted(cache.iterdir()) if file.suffix in (".json", ".tar")]


def fuzz(folder: Path, inputs: int, *, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Read so many damaged files, the same number for every file.

    Returns:
        Inputs and foreign errors for each reader. The first foreign error of each reader is logged.
    """
    readers, rng = make_readers(folder), random.Random(seed)
    done, foreign = Counter[str](), Counter[str]()
    logging.disable(logging.WARNING)
    try:
        for reader in readers:
            original = reader.file.read_bytes()
            as_json = reader.file.suffix in (".json", ".jsonl") or "part-r" in reader.file.name
            for _ in range(-(-inputs // len(readers))):
                reader.file.write_bytes(damaged(original, rng, as_json=as_json))
                done[reader.name] += 1
                try:
                    with redirect_stderr(io.StringIO()):
                        reader.read()
                except FrozenPrefixError:
                    pass
                except Exception as error:
                    foreign[reader.name] += 1
                    if foreign[reader.name] <= int(os.environ.get("FUZZ_SHOWN", "1")):
                        logging.getLogger("benchmarks").error("%s: %r", reader.file.name, error, exc_info=True)
            reader.file.write_bytes(original)
    finally:
        logging.disable(logging.NOTSET)
    return done, foreign
