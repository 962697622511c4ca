"""The index of a tar: where the members of each key are, so that any sample is one read.

    00000.tar.index     a JSON line, then one entry a key: offset uint64, length uint32, CRC-32 uint32

It lies beside the tar, written by `frozenprefix data build`, or in the user's cache, written when the tar is read for
the first time. Entries are read one by one: 16 bytes a sample on disk, none in memory.
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from torch.utils.data import DataLoader, Dataset

from frozenprefix.data.images import is_hidden
from frozenprefix.errors import DataError
from frozenprefix.utils import content_hash, file_state, parse_json, progress_bar, user_cache, write_bytes_atomic

FORMAT = 1
ENTRY = struct.Struct("<QII")
DIRECTORY = (tarfile.DIRTYPE,)
#: Fields that only Python's pickle reads, which would run what they hold.
PICKLED = frozenset({"pickle", "pkl", "pyd", "pth", "pt"})
Rule = Literal["first dot", "last dot"]
Span = tuple[int, int, int]  # offset, length, CRC-32


class Member(NamedTuple):
    """A file in a tar: its name, where its header begins and its data ends, in bytes."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class TarIndex:
    """The head of an index file.

    Attributes:
        path: the file; tar: what it is the index of.
        bytes: size of the tar; samples: keys in it.
        rule: where the key ends in a member's name.
        crc32: of the entries.
        start: where they begin in the file.

    Example:
        >>> TarIndex(Path("a.tar.index"), Path("a.tar"), 10240, 4, "first dot", 0, 99).samples
        4
    """

    path: Path
    tar: Path
    bytes: int
    samples: int
    rule: Rule
    crc32: int
    start: int

    def check_entries(self) -> None:
        """Compare the entries with their checksum.

        Raises:
            DataError: they are damaged.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            entries = file.read()
        if len(entries) != self.samples * ENTRY.size or zlib.crc32(entries) != self.crc32:
            raise DataError(f"{self.path}: damaged index; delete it, and it is made again")


def beside(tar: Path) -> Path:
    """The index that lies beside a tar.

    Example:
        >>> beside(Path("shards/00000.tar")).name
        '00000.tar.index'
    """
    return tar.with_name(f"{tar.name}.index")


def write_index(path: Path, *, size: int, rule: Rule, spans: Sequence[Span], state: Sequence[int] = ()) -> None:
    """Write an index.

    Args:
        size: bytes of the tar.
        spans: of the keys, in the tar's order.
        state: the tar's `file_state`, for an index that is not beside it.
    """
    entries = b"".join(ENTRY.pack(*span) for span in spans)
    head = {"format": FORMAT, "bytes": size, "samples": len(spans), "rule": rule, "crc32": zlib.crc32(entries)}
    write_bytes_atomic(path, json.dumps({**head, "state": list(state)}).encode() + b"\n" + entries)


def open_index(tar: Path, *, remote: bool = False) -> TarIndex | None:
    """The index of a tar, from beside it or from the user's cache; None when there is none that fits.

    Args:
        remote: the tar may be absent; its index is beside its place.

    Raises:
        DataError: there is no such tar; the index beside it is damaged, or of a tar of another size.
    """
    if remote and not tar.is_file():
        return _read_head(beside(tar), tar)[0]
    try:
        state = file_state(tar)
    except OSError as error:
        raise DataError(f"{tar}: {error.strerror or error}; expected a tar there") from error
    if (near := beside(tar)).is_file():
        index = _read_head(near, tar)[0]
        if index.bytes != state[0]:
            raise DataError(f"{tar}: {state[0]} bytes, but {near.name} is of a tar of {index.bytes}; delete the index")
        return index
    far = _in_cache(tar)
    if not far.is_file():
        return None
    try:
        index, written = _read_head(far, tar)
    except DataError:
        return None
    return index if tuple(written) == state else None


def ensure_indexes(tars: Sequence[Path], *, rank: int = 0, processes: int = 1) -> None:
    """Make the indexes that are missing, in the user's cache. Every tar is read once, in worker processes.

    Args:
        rank, processes: this process makes those of every n-th tar.

    Raises:
        DataError: a tar cannot be read, or holds what is refused.
    """
    missing = [tar for tar in tars[rank::processes] if open_index(tar) is None]
    workers = min(8, os.cpu_count() or 1, len(missing)) if len(missing) > 1 else 0
    with progress_bar("indexing shards", enabled=bool(missing)) as update:
        jobs = DataLoader(Jobs(missing, _try_index), batch_size=None, num_workers=workers)
        for done, problem in enumerate(jobs, start=1):
            if problem is not None:
                raise problem
            update(done, len(missing))


def _try_index(tar: Path) -> DataError | None:
    """An error is a result, as a `DataLoader` takes seconds to end after one in a worker."""
    try:
        index_tar(tar)
    except DataError as error:
        return error
    return None


class Jobs(Dataset):
    """Calls of a function, to be done by the workers of a `DataLoader`.

    Example:
        >>> list(DataLoader(Jobs([1, 2], str), batch_size=None))
        ['1', '2']
    """

    def __init__(self, items: Sequence[Any], function: Callable[[Any], Any]):
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.function(self.items[number])


def index_tar(tar: Path, *, into: Path | None = None) -> None:
    """Read a tar and write its index, by default into the user's cache."""
    state = file_state(tar)  # before it is read: a tar that changes meanwhile is indexed again
    members = list(tar_members(tar))
    rule = key_rule(member.name for member in members)
    with tar.open("rb") as file:
        spans = [
            (start, end - start, zlib.crc32(os.pread(file.fileno(), end - start, start)))
            for start, end in _spans(tar, members, rule)
        ]
    write_index(into or _in_cache(tar), size=state[0], rule=rule, spans=spans, state=() if into else state)


def tar_members(tar: Path) -> Iterator[Member]:
    """The plain files of a tar, without hidden ones.

    Raises:
        DataError: the tar is damaged or compressed; a member is a link or a device, leaves its folder, or is pickled.
    """
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if info.type in DIRECTORY or is_hidden(info.name):
                    continue
                check_member(tar, info)
                yield Member(info.name, info.offset, info.offset_data + info.size)
        if end > tar.stat().st_size or not _ends_in_zeros(tar, end):
            raise DataError(f"{tar}: it is cut short; create it again")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{tar}: cannot be read as a tar that is not compressed ({error}); create it again") from error


def check_member(tar: Path, info: tarfile.TarInfo) -> None:
    """Refuse a member that a tar of samples has no use for.

    Raises:
        DataError: it is a link or a device, its name leaves the folder, or it is pickled.
    """
    if not info.isreg():
        raise DataError(f"{tar}: member '{info.name}' is a link or a device, expected plain files")
    if info.name.startswith("/") or ".." in PurePosixPath(info.name).parts:
        raise DataError(f"{tar}: member '{info.name}' leaves the folder of the tar, expected names below it")
    if info.name.rpartition(".")[2].lower() in PICKLED:
        raise DataError(f"{tar}: member '{info.name}' is pickled, which is never read; store texts, JSON or .npy")


def key_rule(names: Iterable[str]) -> Rule:
    """Where keys end: at the first dot, as in WebDataset; at the last one if texts have names with more dots.

    Example:
        >>> key_rule(["1.jpg", "1.txt"]), key_rule(["photo.2020.jpg", "photo.2020.txt"])
        ('first dot', 'last dot')
    """
    members = (PurePosixPath(name).name.partition(".")[2] for name in names)
    texts = ("txt", "text", "caption", "cls", "json")
    return "last dot" if any("." in m and m.rpartition(".")[2] in texts for m in members) else "first dot"


def split_name(name: str, rule: Rule) -> tuple[str, str]:
    """Key and member of a name.

    Example:
        >>> split_name("a/1.features.npy", "first dot"), split_name("a.b.jpg", "last dot")
        (('a/1', 'features.npy'), ('a.b', 'jpg'))
    """
    folder, slash, base = name.rpartition("/")
    key, _, member = base.partition(".") if rule == "first dot" else base.rpartition(".")
    return folder + slash + key, member.lower()


def members_of(span: bytes, rule: Rule) -> tuple[str, dict[str, bytes]]:
    """Key and members of a span of bytes that an entry names.

    Raises:
        tarfile.TarError: these are no members of a tar.
    """
    key, members, place = "", {}, 0
    while place < len(span):
        header = _plain_header(span[place : place + tarfile.BLOCKSIZE])
        if header is None:
            return _members_by_library(span, rule)
        name, size = header
        start = place + tarfile.BLOCKSIZE
        if not is_hidden(name):
            key, member = split_name(name, rule)
            members[member] = span[start : start + size]
        place = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return key, members


def _plain_header(block: bytes) -> tuple[str, int] | None:
    """Name and size of a plain file; None for what Python's reader has to understand, such as a long name.

    It checks nothing: the same bytes were checked by `tarfile` when the tar was indexed.
    """
    if block[156:157] not in tarfile.REGULAR_TYPES or block[124] & 0x80:
        return None
    try:
        size = int(block[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return None
    folder = block[345:500].partition(tarfile.NUL)[0] + b"/" if block[257:263] == b"ustar\0" and block[345] else b""
    return (folder + block[:100].partition(tarfile.NUL)[0]).decode("utf-8", "surrogateescape"), size


def _members_by_library(span: bytes, rule: Rule) -> tuple[str, dict[str, bytes]]:
    key, members = "", {}
    whole = span + tarfile.NUL * (-len(span) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
    with tarfile.open(fileobj=BytesIO(whole), mode="r:") as archive:
        for info in archive:
            stream = archive.extractfile(info)
            if stream is not None and not is_hidden(info.name):
                key, member = split_name(info.name, rule)
                members[member] = stream.read()
    return key, members


def _spans(tar: Path, members: Sequence[Member], rule: Rule) -> list[tuple[int, int]]:
    """Where the members of each key begin and end."""
    spans: dict[str, tuple[int, int]] = {}
    last = ""
    for member in members:
        key = split_name(member.name, rule)[0]
        if key != last and key in spans:
            raise DataError(f"{tar}: the members of key '{key}' are not next to each other; sort the tar by name")
        spans[key] = (spans[key][0] if key == last else member.start, member.end)
        last = key
    longest = max((end - start for start, end in spans.values()), default=0)
    if longest >= 1 << 32:
        raise DataError(f"{tar}: a key has {longest} bytes, expected less than 4 GiB")
    return list(spans.values())


def _ends_in_zeros(tar: Path, end: int) -> bool:
    """tarfile takes half a header for the end, which is a block of zeros."""
    with tar.open("rb") as file:
        file.seek(end)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE


def _in_cache(tar: Path) -> Path:
    return user_cache() / "tar-indexes" / f"{content_hash(str(tar.resolve()))[:32]}.index"


def _read_head(path: Path, tar: Path) -> tuple[TarIndex, list[int]]:
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 16)
        head = parse_json(line.decode())
        if head["format"] != FORMAT or head["rule"] not in ("first dot", "last dot"):
            raise ValueError(f"format {head['format']}, rule {head['rule']!r}")
        numbers = (int(head["bytes"]), int(head["samples"]))
        index = TarIndex(path, tar, *numbers, head["rule"], int(head["crc32"]), len(line))
        if min(numbers) < 0 or path.stat().st_size != len(line) + index.samples * ENTRY.size:
            raise ValueError(f"not {index.samples} entries long")
        return index, list(head["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged index ({error}); delete it, and it is made again") from error


def indexed(tars: Sequence[Path], *, remote: bool = False) -> list[TarIndex]:
    """The indexes of tars that all have one; see `open_index`.

    Raises:
        DataError: an index is missing or damaged.
    """
    indexes = [open_index(tar, remote=remote) for tar in tars]
    for tar, index in zip(tars, indexes, strict=True):
        if index is None:
            raise DataError(f"{tar}: it changed while it was read; wait until it is complete, and run again")
    return [index for index in indexes if index is not None]
