"""Any image → upright 8-bit RGB: files, bytes, PIL images, arrays and tensors give the same pixels.

Nothing else in this package decodes or converts images before they go to an image processor.
"""

from __future__ import annotations

import base64
import errno
import io
import os
import stat
import struct
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias
from urllib.request import urlopen

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from frozenprefix.errors import BadImageError

#: Larger images are refused before any pixel is decoded (Pillow's own warning limit: a quarter of a gigabyte as RGB).
MAX_PIXELS = 89_478_485
#: How many times longer one side may be than the other. The short side is resized to a few hundred pixels, so a thin
#: image of a few bytes would grow to gigabytes.
MAX_ASPECT = 200
#: Longer files are refused before they are read: `MAX_PIXELS` of four 16-bit channels without compression have 0.7 GB.
MAX_BYTES = 1 << 30

#: What `to_image` takes: a path, an http(s) or `data:` address, the bytes of a file, a PIL image, an array or a tensor.
ImageLike: TypeAlias = "str | PathLike[str] | bytes | Image.Image | np.ndarray | Any"

# Formats that Pillow renders by starting another program or a system library.
_RENDERED_FORMATS = frozenset({"EPS", "WMF"})
# Plugins that only recognise a format, or need a reader that Pillow does not have.
_STUB_FORMATS = frozenset({"BUFR", "FITS", "GRIB", "HDF5", "MPEG", "PDF"})
# Endings of images that Pillow reads with a plugin of another package; without it they are counted as bad images.
_EXTRA_ENDINGS = (".avif", ".heic", ".heif")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

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


class StoredImage(type(Path())):  # type: ignore[misc] # a path of this system
    """An image inside of another file, such as a tar: a path that names it in messages, and its bytes.

    Pickled, as for another process, it keeps its name alone.

    Args:
        name: file and member: "shards/00000.tar/000000001.jpg".
        data: the bytes of the image's file.

    Example:
        >>> image = StoredImage.of("shards/00000.tar/1.png", read_image(image_path))
        >>> image.name, load_image(image).mode
        ('1.png', 'RGB')
    """

    data: bytes

    @classmethod
    def of(cls, name: str | PathLike[str], data: bytes) -> StoredImage:
        image = cls(name)
        image.data = data
        return image

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path, (str(self),))


@cache
def image_endings() -> tuple[str, ...]:
    """Endings of the names of image files, in small letters with the dot: all formats that Pillow reads.

    Example:
        >>> {".jpg", ".jfif", ".heic"} <= set(image_endings()), ".txt" in image_endings()
        (True, False)
    """
    refused = _RENDERED_FORMATS | _STUB_FORMATS
    known = Image.registered_extensions().items()
    endings = {ending for ending, kind in known if kind in Image.OPEN and kind not in refused}
    return tuple(sorted(endings.union(_EXTRA_ENDINGS)))


def load_image(path: str | PathLike[str]) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    Transparent parts become white, 16-bit values are scaled to 8 bits, an animation gives its first frame, and the
    orientation that the camera noted is applied.

    Raises:
        BadImageError: with reason `missing`, `empty`, `unreadable`, `not_an_image`, `truncated`, `too_large`,
            `too_thin` or `unsupported`.

    Example:
        >>> load_image(image_path).mode
        'RGB'
    """
    return decode_image(read_image(path), path)


def read_image(path: str | PathLike[str]) -> bytes:
    """Return the bytes of an image file.

    Raises:
        BadImageError: with reason `missing`, `empty`, `too_large` or `unreadable`, as devices and pipes are.

    Example:
        >>> read_image(image_path)[1:4]
        b'PNG'
    """
    if isinstance(path, StoredImage):
        return _not_empty(path.data, path)
    try:
        state = os.stat(path)  # before it is opened, which would wait for the other end of a pipe
        if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
            raise BadImageError("unreadable", f"{path}: a device or a pipe, expected a file")
        if state.st_size > MAX_BYTES:
            raise BadImageError("too_large", f"{path}: {state.st_size} bytes, expected at most {MAX_BYTES}")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES)  # no more, should it grow meanwhile
    except BadImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = "missing" if getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR) else "unreadable"
        raise BadImageError(reason, f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return _not_empty(data, path)


def _not_empty(data: bytes, path: str | PathLike[str]) -> bytes:
    if not data:
        raise BadImageError("empty", f"{path}: the file has no bytes")
    return data


def decode_image(data: bytes, name: str | PathLike[str] = "image") -> Image.Image:
    """Decode the bytes of an image file as `load_image` does; `name` is for the message.

    Example:
        >>> decode_image(read_image(image_path)).size == load_image(image_path).size
        True
    """
    image = _open(data, name)
    if image.format in _RENDERED_FORMATS:
        raise BadImageError("unsupported", f"{name}: {image.format} is a drawing format; convert it to PNG")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _is_wide_planar(image):
        raise BadImageError("unsupported", f"{name}: a TIFF file with {_tiff_depth(data)} in separate planes")
    return _to_rgb(image, name)


def to_image(image: ImageLike, name: str = "image") -> Image.Image:
    """Turn anything that holds an image into what `load_image` gives for its file.

    Args:
        image: a path, an http(s) or `data:` address, the bytes of a file, a PIL image of any mode, or an array or
            tensor of shape [H, W], [H, W, C] or [C, H, W] with 1 to 4 channels. Arrays of 8-bit and 16-bit integers are
            read as files of that depth. Floating-point channels go from 0 to 1 or from 0 to 255; a single one is
            stretched from its least to its greatest value, as a floating-point TIFF is.

    Raises:
        BadImageError: as `load_image`; `unsupported` for an array of another shape or range, such as normalised pixels.

    Example:
        >>> to_image(np.zeros((2, 3), dtype=np.uint16)).size
        (3, 2)
        >>> to_image(torch.ones(3, 2, 2)).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(image, Image.Image):
        ready = type(image) is Image.Image and image.mode == "RGB" and not image.info and not image.getexif()
        return _checked(image, name) if ready else _to_rgb(image, name)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), name)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return decode_image(_download(image), image)
    if isinstance(image, str) and image.startswith("data:"):
        return decode_image(_from_base64(image), f"{image[:30]}…")
    if isinstance(image, (str, PathLike)):
        return load_image(image)
    if hasattr(image, "detach"):  # a tensor, without importing torch
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise BadImageError("unsupported", f"{name}: got {type(image).__name__}, expected an image, a path or an array")
    return _to_rgb(_from_array(image, name), name)


def to_images(images: Any) -> Any:
    """`to_image` for one image, a batch [B, …], or (nested) lists of images.

    Example:
        >>> [image.size for image in to_images(np.zeros((2, 3, 8, 8), np.uint8))]
        [(8, 8), (8, 8)]
    """
    if isinstance(images, (list, tuple)):
        return [to_images(image) for image in images]
    if getattr(images, "ndim", 0) == 4:
        return [to_image(image) for image in images]
    return to_image(images)


def _open(data: bytes, name: str | PathLike[str]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("too_large", f"{name}: {error}") from error
    except _DECODE_ERRORS as error:
        bare = _without_texts(data)
        if len(bare) < len(data):
            return _open(bare, name)
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            return _open_heif(data, name)
        depth = _tiff_depth(data)
        if depth is not None:
            raise BadImageError(
                "unsupported",
                f"{name}: a TIFF file with {depth}, which Pillow does not read; convert it to 8 bits a channel",
            ) from error
        raise BadImageError("not_an_image", f"{name}: no known image format in its {len(data)} bytes") from error


def _open_heif(data: bytes, name: str | PathLike[str]) -> Image.Image:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise BadImageError(
            "unsupported", f"{name}: a HEIC image, which needs pillow-heif: pip install 'frozenprefix[heif]'"
        ) from error
    register_heif_opener()
    try:
        return Image.open(io.BytesIO(data))
    except _DECODE_ERRORS as error:
        raise BadImageError("truncated", f"{name}: HEIC that cannot be decoded ({error})") from error


def _without_texts(data: bytes) -> bytes:
    """A PNG file without its texts and colour profile: Pillow refuses a file when these take megabytes."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    chunks, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")  # length, type, content, checksum
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            chunks.append(data[place:end])
        place = end
    return b"".join(chunks)


def _is_wide_planar(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether Pillow would read 16-bit channels, which are stored one after the other, as 8-bit ones."""
    planes, packed = image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1), image.tag_v2.get(259, 1)
    return planes == 2 and packed == 1 and max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8


def _tiff_depth(data: bytes) -> str | None:
    """ "3 channels of 16 bits" for a TIFF file; None for other files."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        stream = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(8))
        stream.seek(tags.next)
        tags.load(stream)
        bits = tags[TiffImagePlugin.BITSPERSAMPLE]
        return f"{len(bits)} channels of {bits[0]} bits"
    except _DECODE_ERRORS:
        return None


def _from_base64(address: str) -> bytes:
    try:
        data = base64.b64decode(address.partition(",")[2], validate=True)
    except ValueError as error:
        raise BadImageError("not_an_image", f"{address[:30]}…: not base64 ({error})") from error
    if not data:
        raise BadImageError("empty", f"{address[:30]}…: has no bytes")
    return data


def _download(address: str) -> bytes:
    try:
        with urlopen(address, timeout=30) as response:
            data = response.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadImageError("unreadable", f"{address}: {error}") from error
    if len(data) > MAX_BYTES:
        raise BadImageError("too_large", f"{address}: more than {MAX_BYTES} bytes")
    return data


def _checked(image: Image.Image, name: str | PathLike[str]) -> Image.Image:
    """Refuse an image by its size, before its pixels are decoded or resized."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError("too_large", f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError(
            "too_thin",
            f"{name}: {width} x {height} pixels, expected sides that differ by a factor of {MAX_ASPECT} at most",
        )
    return image


def _to_rgb(image: Image.Image, name: str | PathLike[str]) -> Image.Image:
    image = _loaded(_checked(image, name), name)
    if image.mode.startswith(("I", "F")):
        rgb = Image.fromarray(_to_8_bits(np.asarray(image), name)).convert("RGB")
    else:
        try:
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            else:
                rgb = image.convert("RGB")
        except ValueError as error:
            raise BadImageError("unsupported", f"{name}: mode {image.mode} cannot become RGB ({error})") from error
    return _upright(rgb, image)


def _loaded(image: Image.Image, name: str | PathLike[str]) -> Image.Image:
    try:
        image.load()
    except _DECODE_ERRORS as error:
        # a PNG file may have its long texts after the pixels
        stream = getattr(image, "fp", None)
        if image.format == "PNG" and isinstance(stream, io.BytesIO):
            bare = _without_texts(stream.getvalue())
            if len(bare) < len(stream.getvalue()):
                return _loaded(_open(bare, name), name)
        raise BadImageError(
            "truncated", f"{name}: {image.format} that cannot be decoded to its end ({error})"
        ) from error
    return image


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    """Turn as the camera noted. The other notes are dropped: a broken one would stop Pillow from turning."""
    try:
        orientation = original.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:
        orientation = None
    rgb.info.clear()
    if not isinstance(orientation, int):
        return rgb
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(rgb)


def _to_8_bits(values: np.ndarray, name: str | PathLike[str]) -> np.ndarray:
    """Scale 16-bit values by 255/65535. Wider ones name no white point, so least and greatest become 0 and 255."""
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise BadImageError("unsupported", f"{name}: has pixels that are not finite numbers")
    low, high = 0.0, 65535.0
    if values.dtype.kind == "f" or wide.min() < low or wide.max() > high:
        low, high = wide.min(), max(wide.max(), wide.min() + 1e-12)
    return np.rint((wide - low) * (255.0 / (high - low))).astype(np.uint8)


def _from_array(values: np.ndarray, name: str) -> Image.Image:
    """Array → PIL image of a mode that holds the same values."""
    if values.ndim == 3 and values.shape[0] <= 4 and values.shape[2] > 4:
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels > 4 or values.size == 0 or values.dtype.kind not in "buif":
        raise BadImageError(
            "unsupported",
            f"{name}: got {values.dtype}{list(values.shape)}, expected numbers [H, W], [H, W, C] or [C, H, W] "
            "with 1 to 4 channels",
        )
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype != np.uint8:
        values = _to_8_bits(values, name) if values.ndim == 2 else _channels_to_8_bits(values, name)
    return Image.fromarray(np.ascontiguousarray(values))


def _channels_to_8_bits(values: np.ndarray, name: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite((low, high)).all() and low >= 0.0):
        raise BadImageError(
            "unsupported", f"{name}: got values from {low:g} to {high:g}, expected pixels that are not normalised"
        )
    if values.dtype.kind == "f":
        limit = 1.0 if high <= 1.0 else 255.0
    else:
        limit = 65535.0 if values.dtype == np.uint16 or high > 255 else 255.0
    if high > limit:
        raise BadImageError("unsupported", f"{name}: got values up to {high:g}, expected at most {limit:g}")
    return np.rint(values.astype(np.float64) * (255.0 / limit)).astype(np.uint8)
