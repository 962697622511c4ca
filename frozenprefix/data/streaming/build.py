"""Writing samples as shards: tars in img2dataset's layout, each with its index, by several processes, resumable.

    00000.tar           KEY.jpg, KEY.txt (first target), KEY.json (`caption`, and the samples as they were)
    00000.tar.index     where each key is, see `index`
    00000_stats.json    how many images, and why others were left out
    shards.json         what the shards were made of
    manifest.json       of shards with features (`KEY.features.npy`) in place of images: their encoder

A tar gets its name when it and its index are complete. What is made of a shard depends on its number alone, so that a
killed build continues with any number of processes.
"""

from __future__ import annotations

import json
import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from frozenprefix.data.cache_format import FEATURES, SCALE, Manifest, StorageDType, plain_fingerprint, to_storage
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.images import BadImages, decode_image, read_image
from frozenprefix.data.samples import ImageGroup, group_by_images
from frozenprefix.data.sources import SourceConfig, StreamedSource, load_sources, open_source, parse_source
from frozenprefix.data.streaming.described import BUILT, describe
from frozenprefix.data.streaming.groups import TrainingSet
from frozenprefix.data.streaming.index import Jobs, Span, beside, write_index
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.utils import (
    append_jsonl,
    atomic_file,
    encode_text,
    hold_lock,
    parse_json,
    read_text,
    write_text_atomic,
)
from frozenprefix.utils.processes import current_processes

logger = logging.getLogger(__name__)
FORMAT = 1
IMAGES_PER_SHARD = 1000
Key = tuple[str, dict[str, bytes]]  # the key, and its members


class ShardEncoder:
    """Encodes the images of shards, a batch at a time.

    Args:
        encoder: frozen; dtype: that features are stored in.

    Example:
        >>> from frozenprefix.data.image_encoder import ImageEncoder
        >>> ShardEncoder(ImageEncoder.from_model(model, processor), "int8").manifest.shape
        (4, 64)
    """

    def __init__(self, encoder: ImageEncoder, dtype: StorageDType):
        module = encoder.module
        self.encoder = encoder
        self.manifest = Manifest(plain_fingerprint(encoder.fingerprint), dtype, module.num_tokens, module.encoder_dim)

    def members(self, keys: Sequence[str], pixel_values: Sequence[Tensor]) -> list[dict[str, bytes]]:
        """The members of keys that hold their features."""
        features = self.encoder.encode(torch.cat(list(pixel_values))).cpu().numpy()
        written = []
        for key, rows in zip(keys, features, strict=True):
            stored, scale = to_storage(rows, self.manifest.dtype, key)
            members = {FEATURES: self.manifest.features_header + stored.tobytes()}
            if scale is not None:
                members[SCALE] = self.manifest.scale_header + scale.tobytes()
            written.append(members)
        return written


@dataclass(frozen=True)
class Built:
    """Result of `build_shards`.

    Attributes:
        shards, images: in the folder; written: shards that were written now.
        left_out: images by reason.

    Example:
        >>> Built(Path("shards"), 2, 1500, 2, {}).images
        1500
    """

    folder: Path
    shards: int
    images: int
    written: int
    left_out: dict[str, int]


def build_shards(
    groups: Sequence[ImageGroup],
    folder: Path,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    workers: int = 2,
    encoder: ShardEncoder | None = None,
    max_bad_share: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Write images with their samples as shards. Shards that are there already are kept.

    Every image is decoded once; those that cannot be are left out, counted, and listed in `bad_images.jsonl`. Several
    processes that `torchrun` started share the shards.

    Args:
        groups: a list, or a `TrainingSet` whose images are streamed.
        images_per_shard: keys of a shard.
        workers: processes that read and decode.
        encoder: writes features in place of images; then one image a group, and no worker processes.
        max_bad_share: of the images, 0 to 1; more is an error.
        progress: called with (shards done, shards in all) of this process.

    Raises:
        DataError: the folder holds other shards; too many images are bad.
        LockError: another build is writing to the folder.

    Example:
        >>> from frozenprefix.data.samples import Sample
        >>> groups = [ImageGroup((image_path,), (Sample("1", (image_path,), ("a dog",)),))]
        >>> build_shards(groups, tmp_path / "shards", workers=0).images
        1
    """
    processes = current_processes()
    rank, count = processes.process_index, processes.num_processes
    numbers = range(-(-len(groups) // images_per_shard))
    with hold_lock(folder / f"build-{rank}.lock", f"folder '{folder}'"):
        if rank == 0:
            _begin(groups, folder, images_per_shard, encoder)
        processes.wait_for_everyone()
        todo = [number for number in numbers[rank::count] if not tar_of(folder, number).exists()]
        job = ShardJob(groups, folder, images_per_shard, encoder)
        jobs = DataLoader(Jobs(todo, job), batch_size=None, num_workers=min(0 if encoder else workers, len(todo)))
        bad = BadImages()
        for done, left_out in enumerate(jobs, start=1):
            for name, reason, message in left_out:
                bad.record(name, BadImageError(reason, message))
            if left_out:
                rows = [dict(zip(("image", "reason", "message"), item, strict=True)) for item in left_out]
                append_jsonl(folder / "bad_images.jsonl", rows)
            bad.check(max(1000, done * images_per_shard), max_bad_share)
            if progress is not None:
                progress(done, len(todo))
        processes.wait_for_everyone()
    stats = [parse_json(read_text(stats_of(folder, number))) for number in numbers]
    left = Counter[str]()
    for row in stats:
        left.update({reason: n for reason, n in row["status_dict"].items() if reason != "success"})
    images = sum(row["successes"] for row in stats)
    if not images:
        raise DataError(f"{folder}: not one of {len(groups)} images could be written; bad_images.jsonl says why")
    return Built(folder, len(numbers), images, len(todo), dict(left))


def open_all(configs: Iterable[dict[str, Any]]) -> TrainingSet:
    """The images of sources, to be written as shards: of tars and tables one by one, of other formats as a list.

    Images that sources in lists share are joined.

    Raises:
        FrozenPrefixError: as `load_source` and `open_source`.

    Example:
        >>> len(open_all([{"type": "captions", "path": str(data_folder)}]))
        12
    """
    sources = [parse_source(config) for config in configs]
    streamed = [source for source in sources if _in_shards(source)]
    listed = [source for source in sources if not _in_shards(source)]
    groups: list[Sequence[ImageGroup]] = [group_by_images(load_sources(listed))] if listed else []
    return TrainingSet([*groups, *map(open_source, streamed)])


def _in_shards(source: SourceConfig) -> bool:
    """Whether the images of a source lie in tars or tables, or its recipe streams it."""
    if source.holdout is not None or source.limit is not None or not isinstance(source, StreamedSource):
        return False
    return source.stream or source.type in ("webdataset", "hf_dataset")


def tar_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def stats_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}_stats.json"


def _begin(groups: Sequence[ImageGroup], folder: Path, images_per_shard: int, encoder: ShardEncoder | None) -> None:
    """Write what the shards are made of, or compare it with what an earlier build wrote."""
    digest = (groups if isinstance(groups, TrainingSet) else TrainingSet([groups])).digest(_name_and_size)
    features = None if encoder is None else {"dtype": encoder.manifest.dtype, **encoder.manifest.fingerprint}
    made_of = {"format": FORMAT, "images_per_shard": images_per_shard, "samples": digest, "features": features}
    path = folder / BUILT
    if path.is_file():
        try:
            before = parse_json(read_text(path))
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); delete the folder and build again") from error
        differs = next((key for key in made_of if before.get(key) != made_of[key]), None)
        if differs is not None:
            raise DataError(
                f"{folder}: holds shards with other `{differs}` ({before.get(differs)!r:.80}, now "
                f"{made_of[differs]!r:.80}); build into another folder, or delete this one"
            )
        return
    if any(folder.glob("*.tar")):
        raise DataError(f"{folder}: holds tars that `data build` did not write; build into another folder")
    if encoder is not None:
        encoder.manifest.save(folder)
    write_text_atomic(path, json.dumps(made_of, indent=2))


def _name_and_size(path: Path) -> str:
    return f"{path.name} {path.stat().st_size if path.is_file() else 'missing'}"


@dataclass(frozen=True)
class ShardJob:
    """Writes one shard, in any process. Returns what was left out: name, reason, message."""

    groups: Sequence[ImageGroup]
    folder: Path
    images_per_shard: int
    encoder: ShardEncoder | None

    def __call__(self, number: int) -> list[tuple[str, str, str]]:
        first = number * self.images_per_shard
        keys: list[Key] = []
        waiting: list[tuple[Key, Tensor]] = []  # to be encoded
        left_out = []
        for place in range(first, min(first + self.images_per_shard, len(self.groups))):
            try:
                group = self.groups[place]
                if self.encoder is None:
                    keys.append((f"{place:09d}", {**_image_members(group), **_text_members(group)}))
                    continue
                pixel_values = self._pixel_values(group)
                keys.append((f"{place:09d}", _text_members(group)))
                if pixel_values is not None:
                    waiting.append((keys[-1], pixel_values))
            except BadImageError as error:
                named = self.groups.name_of(place) if isinstance(self.groups, TrainingSet) else str(place)
                left_out.append((named, error.reason, str(error)))
            if self.encoder is not None and len(waiting) == self.encoder.encoder.batch_size:
                self._encode(waiting)
        self._encode(waiting)
        reasons = Counter(reason for _, reason, _ in left_out)
        write_shard(tar_of(self.folder, number), keys)
        stats = {"count": len(keys) + len(left_out), "successes": len(keys)}
        status = {"success": len(keys), **reasons}
        write_text_atomic(stats_of(self.folder, number), json.dumps({**stats, "status_dict": status}, indent=2))
        return left_out

    def _pixel_values(self, group: ImageGroup) -> Tensor | None:
        """Pixel values float[1, 3, H, W] of the group's image; None for text alone."""
        if self.encoder is None or not group.images:
            return None
        if len(group.images) > 1:
            raise BadImageError("several images", f"{group.key}: got {len(group.images)} images, expected one")
        return self.encoder.encoder.prepare(group.images[0])

    def _encode(self, waiting: list[tuple[Key, Tensor]]) -> None:
        """Add the features of waiting keys, and forget them."""
        if not waiting or self.encoder is None:
            return
        names, pixel_values = [key for (key, _), _ in waiting], [values for _, values in waiting]
        for ((_, members), _), features in zip(waiting, self.encoder.members(names, pixel_values), strict=True):
            members.update(features)
        waiting.clear()


def _image_members(group: ImageGroup) -> dict[str, bytes]:
    """The files of a group's images, each decoded once.

    Raises:
        BadImageError: one of them cannot be read.
    """
    members: dict[str, bytes] = {}
    for place, path in enumerate(group.images):
        data = read_image(path)
        decode_image(data, path)
        ending = _ending(data)
        members[ending if len(group.images) == 1 else f"{place}.{ending}"] = data
    return members


def _text_members(group: ImageGroup) -> dict[str, bytes]:
    first = next((text for sample in group.samples for text in sample.targets), "")
    described = {"caption": first, "samples": [describe(sample) for sample in group.samples]}
    return {"txt": encode_text(first), "json": encode_text(json.dumps(described, ensure_ascii=False))}


def _ending(data: bytes) -> str:
    with Image.open(BytesIO(data)) as image:
        kind = (image.format or "png").lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)


def write_shard(tar: Path, keys: Sequence[Key]) -> None:
    """Write a tar and its index; the tar gets its name last.

    Example:
        >>> write_shard(tmp_path / "0.tar", [("a", {"txt": b"a dog"})])
        >>> (tmp_path / "0.tar.index").is_file()
        True
    """
    spans: list[Span] = []
    with atomic_file(tar) as draft:
        with draft.open("wb") as file:
            for key, members in keys:
                start, span = file.tell(), span_of(key, members)
                file.write(span)
                file.write(tarfile.NUL * (-len(span) % tarfile.BLOCKSIZE))
                spans.append((start, len(span), zlib.crc32(span)))
            file.write(tarfile.NUL * 2 * tarfile.BLOCKSIZE)
        write_index(beside(tar), size=draft.stat().st_size, rule="first dot", spans=spans)


def span_of(key: str, members: dict[str, bytes]) -> bytes:
    """The members of a key as a tar has them, without the padding after the last one."""
    parts: list[bytes] = []
    for name, data in members.items():
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size = len(data)
        padding = tarfile.NUL * (-len(data) % tarfile.BLOCKSIZE)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, padding]
    return b"".join(parts[:-1])
