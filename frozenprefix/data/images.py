"""Image files → RGB images, and the book of those that could not be read."""

from __future__ import annotations

import errno
import io
import json
import struct
from collections import Counter
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from frozenprefix.errors import BadImageError, DataError

#: Larger images are refused before any pixel is decoded (Pillow's own warning limit: a quarter of a gigabyte as RGB).
MAX_PIXELS = 89_478_485

# Formats that Pillow renders by starting another program or a system library.
_RENDERED_FORMATS = frozenset({"EPS", "WMF"})

# What Pillow's decoders raise for broken files; found by feeding them such files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
    struct.error,
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | PathLike[str]) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    Transparent parts become white, 16-bit values are scaled to 8 bits, an animation gives its first frame, and the
    orientation that the camera noted is applied.

    Raises:
        BadImageError: with reason `missing`, `empty`, `unreadable`, `not_an_image`, `truncated`, `too_large` or
            `unsupported`.
    """
    return decode_image(read_image(path), path)


def read_image(path: str | PathLike[str]) -> bytes:
    """Return the bytes of an image file, or raise `BadImageError` (`missing`, `empty`, `unreadable`)."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = "missing" if error.errno in (errno.ENOENT, errno.ENOTDIR) else "unreadable"
        raise BadImageError(reason, f"{path}: {error.strerror or error}") from error
    if not data:
        raise BadImageError("empty", f"{path}: the file has no bytes")
    return data


def decode_image(data: bytes, name: str | PathLike[str]) -> Image.Image:
    """Decode the bytes of an image file as `load_image` does; `name` is for the message."""
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("too_large", f"{name}: {error}") from error
    except _DECODE_ERRORS as error:
        raise BadImageError("not_an_image", f"{name}: no known image format in its {len(data)} bytes") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(
            "too_large", f"{name}: {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}"
        )
    if image.format in _RENDERED_FORMATS:
        raise BadImageError("unsupported", f"{name}: {image.format} is a drawing format; convert it to PNG")
    try:
        image.load()
    except _DECODE_ERRORS as error:
        raise BadImageError(
            "truncated", f"{name}: {image.format} that cannot be decoded to its end ({error})"
        ) from error
    return _upright(_to_rgb(image, name), image)


def _to_rgb(image: Image.Image, name: str | PathLike[str]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image), name)).convert("RGB")
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise BadImageError("unsupported", f"{name}: mode {image.mode} cannot become RGB ({error})") from error


def _to_8_bits(values: np.ndarray, name: str | PathLike[str]) -> np.ndarray:
    """Scale 16-bit values by 255/65535. Wider ones name no white point, so least and greatest become 0 and 255."""
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise BadImageError("unsupported", f"{name}: has pixels that are not finite numbers")
    low, high = 0.0, 65535.0
    if values.dtype.kind == "f" or wide.min() < low or wide.max() > high:
        low, high = wide.min(), max(wide.max(), wide.min() + 1e-12)
    return np.rint((wide - low) * (255.0 / (high - low))).astype(np.uint8)


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    try:
        orientation = original.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:
        return rgb  # a broken note about the camera says nothing about the image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)


class BadImages:
    """Images that could not be used, each counted once, by reason."""

    def __init__(self) -> None:
        self._errors: dict[str, BadImageError] = {}
        self._written: Path | None = None

    def record(self, path: str | PathLike[str], error: BadImageError) -> None:
        self._errors[str(path)] = error

    def __len__(self) -> int:
        return len(self._errors)

    def __contains__(self, path: object) -> bool:
        return str(path) in self._errors

    def __iter__(self) -> Iterator[tuple[str, BadImageError]]:
        return iter(self._errors.items())

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by reason, the commonest first."""
        return dict(Counter(error.reason for error in self._errors.values()).most_common())

    def write(self, path: str | PathLike[str]) -> None:
        """Write one JSON object a line: `image`, `reason`, `message`."""
        rows = ({"image": name, "reason": error.reason, "message": str(error)} for name, error in self)
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._written = Path(path)

    def check(self, total: int, max_share: float = 0.01) -> None:
        """Raise `DataError` when more than `max_share` (0 to 1) of `total` images are bad."""
        if len(self) <= max_share * total:
            return
        by_reason = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        examples = "\n".join(f"  {error.reason}: {error}" for _, error in list(self)[:3])
        listed = f"; all are listed in {self._written}" if self._written else ""
        raise DataError(
            f"{len(self)} of {total} images are bad ({by_reason}), expected at most {max_share:.2%} "
            f"(max_bad_share {max_share}); repair the files or raise max_bad_share{listed}\n{examples}"
        )
