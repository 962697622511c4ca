"""The head of a GGUF file, read strictly: sizes are checked against the file before anything is allocated.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp ends the whole process on some damaged
files, and other readers allocate what a damaged count says; so every file passes this check first.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from frozenprefix.errors import AssetError
from frozenprefix.models.pretrained import is_lfs_pointer

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
# (weights in a block, bytes of a block) by ggml's number of the type
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2)},
}


@dataclass(frozen=True)
class GGUFHeader:
    """Keys and tensors of a GGUF file.

    Attributes:
        values: metadata; of arrays only their length, as `range(length)`.
        tensors: shapes by name, in the order of ggml: the fastest axis first.
    """

    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))


class _Reader:
    """Reads numbers and texts; every length is compared with what is left of the file."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"{count} bytes are announced at {self.file.tell()}, but {self.size} are all there are")
        return self.file.read(count)

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, length = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                self.take(length * struct.calcsize("<" + _SCALARS[inner]))
            elif inner == _STRING:
                self._check_count(length, 8)
                for _ in range(length):
                    self.take(self.number("Q"))
            else:
                raise ValueError(f"an array of type {inner}")
            return range(length)
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self.number(_SCALARS[kind])

    def _check_count(self, count: int, least: int) -> None:
        if count * least > self.size - self.file.tell():
            raise ValueError(f"{count} entries are announced at {self.file.tell()}, in a file of {self.size} bytes")

    def header(self) -> GGUFHeader:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3")
        tensor_count, value_count = self.number("Q"), self.number("Q")
        self._check_count(value_count, 12)
        values = {}
        for _ in range(value_count):
            key = self.text()
            values[key] = self.value(self.number("I"))
        self._check_count(tensor_count, 24)
        places = [self._tensor() for _ in range(tensor_count)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}")
        start = math.ceil(self.file.tell() / alignment) * alignment
        for name, shape, kind, offset in places:
            self._check_tensor(name, shape, kind, start + offset)
        return GGUFHeader(values, {name: shape for name, shape, _, _ in places})

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {dimensions} dimensions")
        return name, tuple(self.number("Q") for _ in range(dimensions)), self.number("I"), self.number("Q")

    def _check_tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> None:
        block, size = _BLOCKS.get(kind, (256, 1))  # of unknown types at least this
        end = start + math.prod(shape) // block * size
        if end > self.size:
            raise ValueError(f"tensor '{name}' of shape {shape} ends at byte {end} of {self.size}")


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read keys and shapes of a GGUF file.

    Raises:
        AssetError: there is no such file; it is cut short, has counts or sizes beyond its end, or is no GGUF file.

    Example:
        >>> _ = (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + b"\\xff" * 16)
        >>> read_gguf_header(tmp_path / "a.gguf")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: GGUF file '...a.gguf' (24 bytes) is damaged, cut short or no GGUF file (...
    """
    path = Path(path)
    if not path.is_file():
        raise AssetError(f"GGUF file '{path}' does not exist")
    if is_lfs_pointer(path):
        raise AssetError(
            f"GGUF file '{path}' is a Git LFS pointer in place of the file itself; run `git lfs pull` in its folder"
        )
    size = os.path.getsize(path)
    try:
        with path.open("rb") as file:
            return _Reader(file, size).header()
    except (ValueError, struct.error, OverflowError) as error:
        raise AssetError(
            f"GGUF file '{path}' ({size} bytes) is damaged, cut short or no GGUF file ({error}); fetch it again"
        ) from error
