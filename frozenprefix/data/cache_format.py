"""The files of a feature cache.

    manifest.json                     fingerprint, storage dtype, shape
    features-r00-000001.tar           WebDataset shard: KEY.features.npy (and KEY.scale.npy for int8)
    features-r00-000001.index.json    where each image's bytes are in that shard, and their CRC-32
    image-keys-r00.jsonl              path, size, times of change → key, so that a file is hashed once (see `ImageKeys`)
    writer-r00.lock                   held by the process that writes these shards

A shard is written under a `.tmp` name, then its index, and then it is renamed: a shard with its name is complete. A
cache may be read while others add to it.
"""

from __future__ import annotations

import json
import mmap
import os
import tarfile
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from frozenprefix.errors import CacheError
from frozenprefix.utils import parse_json, write_text_atomic

FORMAT = 1
MANIFEST = "manifest.json"
FEATURES = "features.npy"
SCALE = "scale.npy"

StorageDType = Literal["float16", "bfloat16", "int8"]
Fingerprint = dict[str, Any]

# NumPy has no bfloat16: its bits are stored as uint16, and the manifest says so.
STORED_AS: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "int8": np.dtype("i1")}
SCALE_DTYPE = np.dtype("<f4")
_GREATEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "int8": 3.4028234663852886e38}

REPAIR = "run `frozenprefix cache RECIPE --repair`, which encodes again what is lost"


class Entry(NamedTuple):
    """Where one image's features are in a shard, in bytes; `scale_offset` is 0 where there is no scale."""

    offset: int
    length: int
    crc32: int
    scale_offset: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Properties of the whole cache: `tokens` x `dim` features an image, stored as `dtype`.

    Example:
        >>> Manifest({"encoder": "vit"}, "float16", tokens=49, dim=1280).shape
        (49, 1280)
    """

    fingerprint: Fingerprint
    dtype: StorageDType
    tokens: int
    dim: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.dim

    @property
    def features_header(self) -> bytes:
        return npy_header(self.shape, STORED_AS[self.dtype])

    @property
    def scale_header(self) -> bytes:
        return npy_header((self.tokens, 1), SCALE_DTYPE)

    @property
    def features_length(self) -> int:
        return len(self.features_header) + self.tokens * self.dim * STORED_AS[self.dtype].itemsize

    @property
    def scale_length(self) -> int:
        return len(self.scale_header) + self.tokens * SCALE_DTYPE.itemsize

    def save(self, folder: Path) -> None:
        write_text_atomic(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=2))


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        CacheError: it is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise CacheError(
                f"{path}: format: got {values['format']}, expected {FORMAT}; encode again into a new folder"
            )
        if values["dtype"] not in get_args(StorageDType):
            raise CacheError(f"{path}: dtype: got {values['dtype']!r}, expected one of {get_args(StorageDType)}")
        return Manifest(dict(values["fingerprint"]), values["dtype"], int(values["tokens"]), int(values["dim"]))
    except FileNotFoundError as error:
        raise CacheError(f"{folder}: not a feature cache, manifest.json is missing; encode the images first") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path}: damaged ({error!r}); delete the cache folder and encode again") from error


def plain_fingerprint(fingerprint: Fingerprint) -> Fingerprint:
    """The fingerprint as it reads back from JSON, so that both sides of a comparison have the same types.

    Example:
        >>> plain_fingerprint({"size": (2, 3)})
        {'size': [2, 3]}
    """
    try:
        return cast(Fingerprint, json.loads(json.dumps(fingerprint)))
    except (TypeError, ValueError) as error:
        raise CacheError(f"fingerprint: expected texts, numbers and lists of them ({error})") from error


def check_fingerprint(folder: Path, stored: Fingerprint, wanted: Fingerprint) -> None:
    """Compare fingerprints.

    Raises:
        CacheError: naming the first field of `wanted`, then of `stored`, that differs.

    Example:
        >>> check_fingerprint(tmp_path, {"layer": 1}, {"layer": 1})
    """
    wanted = plain_fingerprint(wanted)
    for field in {**wanted, **stored}:
        if field not in stored or field not in wanted or stored[field] != wanted[field]:
            has = repr(stored[field]) if field in stored else "nothing"
            needs = repr(wanted[field]) if field in wanted else "nothing"
            raise CacheError(
                f"{folder}: fingerprint field '{field}' differs: the cache has {has}, expected {needs}; "
                "encode into another folder, or delete this one"
            )


@cache
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The first bytes of a .npy file (format 1.0) that holds an array of this shape and dtype.

    Example:
        >>> npy_header((2, 3), np.dtype("i1"))[1:6]
        b'NUMPY'
    """
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def to_storage(features: np.ndarray, dtype: StorageDType, key: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Turn float[N, D] into its stored array and, for int8, its scale float32[N, 1].

    int8 is symmetric, with one scale a row: `features ≈ stored * scale`. bfloat16 is rounded to the nearest even.

    Raises:
        CacheError: for values that are not finite, or too large for the dtype.

    Example:
        >>> stored, scale = to_storage(np.array([[0.5, -1.0]]), "int8", "key")
        >>> stored.tolist(), scale.round(4).tolist()
        ([[64, -127]], [[0.007899999618530273]])
    """
    wide = features.astype(np.float32)
    greatest = float(np.abs(wide).max(initial=0.0))
    limit = _GREATEST[dtype]
    if not greatest <= limit:
        fix = "check the encoder" if not np.isfinite(greatest) else "use storage dtype 'bfloat16'"
        raise CacheError(
            f"features of {key}: got a value of {greatest:g}, expected at most {limit:g} for {dtype}; {fix}"
        )
    if dtype == "float16":
        return wide.astype(STORED_AS[dtype]), None
    if dtype == "bfloat16":
        bits = wide.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(STORED_AS[dtype]), None
    scale = np.abs(wide).max(axis=1, keepdims=True) / 127.0
    scale[scale == 0] = 1.0
    return np.rint(wide / scale).astype(STORED_AS[dtype]), scale.astype(SCALE_DTYPE)


def from_storage(
    data: bytes | mmap.mmap, manifest: Manifest, out: np.ndarray, *, offset: int, scale_offset: int, where: object
) -> None:
    """Write stored features into `out`: float16[N, D] for float16, float32[N, D] for the other dtypes.

    Args:
        data: bytes with the features' .npy file at `offset` and, for int8, that of the scale at `scale_offset`.
        where: names them in messages.

    Raises:
        CacheError: they have another shape or dtype than the manifest says.
    """
    tokens, dim = manifest.shape
    headers = (manifest.features_header, manifest.scale_header)
    starts = (offset, scale_offset) if manifest.dtype == "int8" else (offset,)
    for start, header in zip(starts, headers, strict=False):
        if data[start : start + len(header)] != header:
            raise CacheError(f"{where}: got features of another shape or dtype than {MANIFEST} says; {REPAIR}")
    place = offset + len(headers[0])
    stored = np.frombuffer(data, STORED_AS[manifest.dtype], tokens * dim, place).reshape(tokens, dim)
    if manifest.dtype == "float16":
        out[...] = stored
    elif manifest.dtype == "bfloat16":
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        scale = np.frombuffer(data, SCALE_DTYPE, tokens, scale_offset + len(headers[1])).reshape(tokens, 1)
        np.multiply(stored, scale, out=out)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.tar"))


def lock_path(folder: Path, rank: str) -> Path:
    """The lock of the process that writes the shards of `rank`, such as "r00"."""
    return folder / f"writer-{rank}.lock"


def save_index(shard: Path, size: int, entries: dict[str, Entry]) -> None:
    """Write the index of a shard of `size` bytes, which may still have another name."""
    values = {"shard": shard.name, "bytes": size, "entries": entries}
    write_text_atomic(index_path(shard), json.dumps(values))


def load_index(shard: Path, *, any_size: bool = False) -> dict[str, Entry]:
    """Read a shard's index and, unless `any_size`, check that the shard is as long as it says."""
    path = index_path(shard)
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        expected = int(values["bytes"])
        entries = {key: Entry(*map(int, entry)) for key, entry in values["entries"].items()}
    except FileNotFoundError as error:
        raise CacheError(f"{shard}: its index {path.name} is missing; {REPAIR}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path}: damaged index ({error!r}); {REPAIR}") from error
    size = shard.stat().st_size
    if size != expected and not any_size:
        raise CacheError(f"{shard}: truncated or overwritten: got {size} bytes, expected {expected}; {REPAIR}")
    return entries


def scan_shard(shard: Path, manifest: Manifest) -> dict[str, Entry]:
    """Find every image of a shard by reading the tar itself; `CacheError` when it is damaged."""
    parts: dict[str, dict[str, tuple[int, bytes]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                stream = tar.extractfile(member)
                if stream is None:
                    raise CacheError(f"{shard}: {member.name} is not a plain file; {REPAIR}")
                data = stream.read()
                parts.setdefault(key, {})[suffix] = (member.offset_data, data)
                expected = {FEATURES: manifest.features_header, SCALE: manifest.scale_header}.get(suffix, b"")
                if not data.startswith(expected) or len(data) != member.size:
                    raise CacheError(f"{shard}: {member.name} is damaged; {REPAIR}")
        complete = _ends_in_zeros(shard)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CacheError(f"{shard}: damaged tar file ({error}); {REPAIR}") from error
    if not complete:
        raise CacheError(f"{shard}: truncated, the end of the tar file is missing; {REPAIR}")
    return {key: _entry(shard, key, own, manifest) for key, own in parts.items()}


def _entry(shard: Path, key: str, parts: dict[str, tuple[int, bytes]], manifest: Manifest) -> Entry:
    needed = {FEATURES: manifest.features_length}
    if manifest.dtype == "int8":
        needed[SCALE] = manifest.scale_length
    for suffix, length in needed.items():
        if suffix not in parts or len(parts[suffix][1]) != length:
            raise CacheError(f"{shard}: {key}.{suffix} is missing or not {length} bytes long; {REPAIR}")
    offset, data = parts[FEATURES]
    scale_offset, scale = parts[SCALE] if manifest.dtype == "int8" else (0, b"")
    return Entry(offset, len(data), zlib.crc32(scale, zlib.crc32(data)), scale_offset)


def _ends_in_zeros(shard: Path) -> bool:
    with shard.open("rb") as stream:
        stream.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
        return not stream.read().strip(b"\0")
