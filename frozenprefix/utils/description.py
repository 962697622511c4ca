"""The description of an image in its file: XMP (dc:description) and EXIF (ImageDescription); pixels do not change.

Photo programs show it, and search by it. JPEG and PNG files are rewritten part by part: pixels, and all metadata
besides the description, stay as they are, byte by byte. XMP: ISO 16684-1; its places in files: its Part 3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from frozenprefix.errors import DataError
from frozenprefix.utils.damage import refusing_damage

#: Endings of the files that can hold a description; all images can have one beside them, as .xmp.
WRITABLE = (".jpg", ".jpeg", ".jpe", ".jfif", ".png")
_XMP, _EXIF = b"http://ns.adobe.com/xap/1.0/\0", b"Exif\0\0"
_PNG, _PNG_XMP = b"\x89PNG\r\n\x1a\n", b"XML:com.adobe.xmp\0\0\0\0\0"
_MAX_SEGMENT = 65_533
_DESCRIPTION = 0x010E  # EXIF's ImageDescription
_NAMES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "lr": "http://ns.adobe.com/lightroom/1.0/",
    "crs": "http://ns.adobe.com/camera-raw-settings/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "tiff": "http://ns.adobe.com/tiff/1.0/",
}
_EMPTY = f'<x:xmpmeta xmlns:x="{_NAMES["x"]}"><rdf:RDF xmlns:rdf="{_NAMES["rdf"]}"/></x:xmpmeta>'.encode()


def xmp_path(image: Path) -> Path:
    """The file beside an image that photo programs read its metadata from: IMG_1.xmp for IMG_1.jpg.

    Example:
        >>> xmp_path(Path("a/IMG_1.JPG")).name
        'IMG_1.xmp'
    """
    return image.with_suffix(".xmp")


def with_description(data: bytes, text: str, name: str = "image") -> bytes:
    """The bytes of a JPEG or PNG file with another description. Everything else in it stays.

    Args:
        name: of the file, for messages.

    Raises:
        DataError: for another kind of file, and for one whose parts cannot be read.

    Example:
        >>> data = with_description(image_path.read_bytes(), "a red circle")
        >>> description_in(data)
        'a red circle'
    """
    with refusing_damage(
        DataError, f"{name}: its metadata cannot be read ({{reason}}); write .xmp files beside images"
    ):
        if data.startswith(b"\xff\xd8"):
            return _jpeg_with(data, text)
        if data.startswith(_PNG):
            return _png_with(data, text)
    raise DataError(f"{name}: is no JPEG or PNG, which alone can hold a description; write .xmp files beside images")


def description_in(data: bytes) -> str | None:
    """The XMP description of a JPEG, PNG or .xmp file, or None.

    Raises:
        DataError: the metadata cannot be read.

    Example:
        >>> description_in(image_path.read_bytes()) is None
        True
    """
    with refusing_damage(DataError, "metadata cannot be read ({reason})"):
        packet: bytes | None = data
        if data.startswith(b"\xff\xd8"):
            packet = next((p[len(_XMP) :] for m, p in _segments(data)[0] if m == 0xE1 and p.startswith(_XMP)), None)
        elif data.startswith(_PNG):
            chunks = _chunks(data)
            packet = next((c[len(_PNG_XMP) :] for k, c in chunks if k == b"iTXt" and c.startswith(_PNG_XMP)), None)
        if packet is None:
            return None
        found = _tree(packet).find(f".//{_tag('dc:description')}//{_tag('rdf:li')}")
        return None if found is None else found.text


def xmp_with(text: str, packet: bytes | None = None) -> bytes:
    """An XMP packet with a description; the rest of an earlier packet is kept.

    Raises:
        ValueError, ElementTree.ParseError: the earlier packet cannot be read.

    Example:
        >>> description_in(xmp_with("a dog", xmp_with("a cat")))
        'a dog'
    """
    root = _tree(packet or _EMPTY)
    rdf = root if root.tag == _tag("rdf:RDF") else root.find(_tag("rdf:RDF"))
    if rdf is None:
        raise ValueError("XMP without rdf:RDF")
    about = rdf.find(_tag("rdf:Description"))
    if about is None:
        about = ElementTree.SubElement(rdf, _tag("rdf:Description"), {_tag("rdf:about"): ""})
    for part in rdf.findall(_tag("rdf:Description")):
        for old in part.findall(_tag("dc:description")):
            part.remove(old)
    words = ElementTree.SubElement(ElementTree.SubElement(about, _tag("dc:description")), _tag("rdf:Alt"))
    language = "{http://www.w3.org/XML/1998/namespace}lang"
    ElementTree.SubElement(words, _tag("rdf:li"), {language: "x-default"}).text = _plain(text)
    for prefix, name in _NAMES.items():
        ElementTree.register_namespace(prefix, name)
    body = ElementTree.tostring(root, encoding="unicode")
    head = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    return f'{head}\n{body}\n<?xpacket end="w"?>'.encode()


def _tree(packet: bytes) -> ElementTree.Element:
    packet = packet.strip(b"\0 \r\n")
    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        raise ValueError("XMP with a document type")
    return ElementTree.fromstring(packet)


def _tag(name: str) -> str:
    prefix, _, local = name.partition(":")
    return f"{{{_NAMES[prefix]}}}{local}"


def _plain(text: str) -> str:
    """A text that XML can hold: without control characters."""
    return "".join(char for char in text if char.isprintable() or char in " \n").strip()


# ── JPEG ──


def _segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The segments before the first scan, as (marker, payload), and everything from that scan on."""
    found: list[tuple[int, bytes]] = []
    place = 2
    while True:
        if data[place] != 0xFF:
            raise ValueError(f"no JPEG marker at byte {place}")
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker in (0xDA, 0xD9):  # start of scan, end of image
            return found, data[place:]
        (length,) = struct.unpack_from(">H", data, place + 2)
        found.append((marker, data[place + 4 : place + 2 + length]))
        if length < 2 or place + 2 + length > len(data):
            raise ValueError("the file ends within its head")
        place += 2 + length


def _jpeg_with(data: bytes, text: str) -> bytes:
    segments, scan = _segments(data)
    exif = next((p[len(_EXIF) :] for m, p in segments if m == 0xE1 and p.startswith(_EXIF)), None)
    packet = next((p[len(_XMP) :] for m, p in segments if m == 0xE1 and p.startswith(_XMP)), None)
    written = [_EXIF + exif_with(text, exif), _XMP + xmp_with(text, packet)]
    if any(len(payload) > _MAX_SEGMENT for payload in written):
        raise ValueError("the metadata and the description are longer than 64 kB")
    rest = [(m, p) for m, p in segments if not (m == 0xE1 and p.startswith((_EXIF, _XMP)))]
    head = [(m, p) for m, p in rest[:1] if m == 0xE0]  # JFIF comes first
    parts = [*head, *((0xE1, payload) for payload in written), *rest[len(head) :]]
    return b"\xff\xd8" + b"".join(struct.pack(">BBH", 0xFF, m, len(p) + 2) + p for m, p in parts) + scan


def exif_with(text: str, tiff: bytes | None = None) -> bytes:
    """EXIF data with an ImageDescription: the first directory is written again at the end, and nothing else moves.

    Args:
        tiff: the earlier data, from its byte order mark on.

    Example:
        >>> exif_with("a dog")[:2]
        b'II'
    """
    tiff = tiff or b"II*\0\x08\0\0\0" + b"\0" * 6  # an empty directory
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    entries = [tiff[first + 2 + 12 * n : first + 14 + 12 * n] for n in range(count)]
    following = tiff[first + 2 + 12 * count : first + 6 + 12 * count]
    if len(following) != 4:
        raise ValueError("EXIF that ends within its first directory")
    entries = [entry for entry in entries if struct.unpack(order + "H", entry[:2])[0] != _DESCRIPTION]
    value = _plain(text).encode() + b"\0"
    value += b"\0" * max(0, 4 - len(value))  # shorter ones would stand in the entry itself
    tiff += b"\0" * (len(tiff) % 2)
    entries.append(
        struct.pack(order + "HHII", _DESCRIPTION, 2, len(value), len(tiff))
        if len(value) > 4
        else struct.pack(order + "HHI", _DESCRIPTION, 2, 4) + value
    )
    entries.sort(key=lambda entry: struct.unpack(order + "H", entry[:2])[0])
    tiff += value + b"\0" * (len(value) % 2)
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + following
    return tiff[:4] + struct.pack(order + "I", len(tiff)) + tiff[8:] + directory


# ── PNG ──


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_PNG)
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if place + 12 + length > len(data):
            raise ValueError("the file ends within a chunk")
        yield kind, data[place + 8 : place + 8 + length]
        place += 12 + length


def _png_with(data: bytes, text: str) -> bytes:
    chunks = list(_chunks(data))
    packet = next((c[len(_PNG_XMP) :] for k, c in chunks if k == b"iTXt" and c.startswith(_PNG_XMP)), None)
    chunks = [(k, c) for k, c in chunks if not (k == b"iTXt" and c.startswith(_PNG_XMP))]
    chunks.insert(1, (b"iTXt", _PNG_XMP + xmp_with(text, packet)))  # behind the head
    return _PNG + b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
