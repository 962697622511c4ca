"""WebDataset tars, as img2dataset writes them: an image, its text and its JSON under one key."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from frozenprefix.data.cache_format import MANIFEST
from frozenprefix.data.images import image_ending, is_hidden
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import StreamedSource
from frozenprefix.data.sources.image_files import unpack_once, write_image
from frozenprefix.data.sources.qa import commonest
from frozenprefix.data.sources.rows import Row, read_json_object
from frozenprefix.data.sources.selection import files_of, without_braces
from frozenprefix.data.streaming.described import BUILT, sample_of
from frozenprefix.data.streaming.groups import StreamedGroups
from frozenprefix.data.streaming.remote import is_address
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.utils import parse_json, report_left_out

T = TypeVar("T")
_TEXTS = ("txt", "text", "caption", "cls")
_HIDDEN = "__hidden__"  # field of a row that counts members and is no key


def built_samples(row: Row, images: Mapping[str, Path]) -> list[Sample]:
    """The samples of a key of `data build`: its JSON names them, in `samples`; its images go by their names."""
    paths = tuple(images[name] for name in sorted(images, key=_number))
    return [sample_of(described, paths) for described in row.row("json").rows("samples")]


def _number(member: str) -> int:
    """Place of an image among those of its key: `0.jpg`, `1.png`, …; 0 for the only one."""
    first = member.partition(".")[0]
    return int(first) if first.isdecimal() else 0


class WebDatasetSource(StreamedSource):
    """Local tars whose members `KEY.jpg`, `KEY.txt`, `KEY.json` are next to each other; a sample is a key.

    Images are unpacked into the user's cache when a tar is read for the first time (which needs their size once more),
    and found there by the tar's SHA-256 from then on. Keys without an image are left out and counted by reason, with
    those that img2dataset noted in `00000_stats.json` beside `00000.tar`. The id is TAR/KEY; the split is read from the
    tar's place under `path`.

    With `stream`, nothing is unpacked: a tar is indexed once, and each sample is read from it when a step needs it. The
    tar may then hold features in place of images, as `frozenprefix data build --recipe` writes them. Of tars that
    `data build` wrote, samples are read as they were, several an image among them, unless a field is named here.

    A key ends at the first dot of a name, as in WebDataset. In a tar with texts such as `photo.2020.txt`, whose names
    have other dots, it ends at the last dot.

    Example:
        >>> WebDatasetSource(path="shards", captions="json.caption").shards
        '**/*.tar'
    """

    type: Literal["webdataset"] = "webdataset"
    shards: str = Field("**/*.tar", description="tar under `path`, or pattern of several: train/{00000..00099}.tar")
    image: str | None = Field(None, description="member that is the image, e.g. jpg; the only one when not given")
    captions: str | None = Field("txt", description="member with the caption, or a field of one: json.caption")
    question: str | None = Field(None, description="member or field with a question; `captions` is not read then")
    answers: str = Field("json.answers", description="member or field with the answer(s) to the question")
    remote_gb: float | None = Field(None, gt=0, description="let `path` be an address; GB of its shards that are kept")

    @model_validator(mode="after")
    def _reads_something(self) -> WebDatasetSource:
        if is_address(self.path) != (self.remote_gb is not None):
            raise ValueError("`path` is an address exactly if `remote_gb` says how much of it may be kept on disk")
        if self.remote_gb is not None and not self.stream:
            raise ValueError("`remote_gb` needs `stream: true`")
        if self.captions is None and self.question is None:
            raise ValueError("got neither `captions` nor `question`, expected one of them")
        return self

    def read(self, root: Path) -> list[Sample]:
        if (root / MANIFEST).is_file():
            raise DataError(f"{root}: holds features in place of images, which are only streamed; set `stream: true`")
        samples: list[Sample] = []
        without: Counter[str] = Counter()
        for shard, split in files_of(root, self.shards, self.split).items():
            folder, rows = unpack_once([shard], partial(_unpack, shard), what="keys by dots, without hidden names")
            name = shard.relative_to(root).with_suffix("").as_posix()
            for values in rows:
                if _HIDDEN in values:
                    without["hidden"] += values[_HIDDEN]
                    continue
                row = Row(str(shard), values, f"key {values['__key__']}")
                if self._is_built(root):
                    samples += built_samples(row, {m: folder / file for m, file in values["__images__"].items()})
                    continue
                image = self._image(row, values["__images__"])
                if image is None:
                    without["no image in the tar"] += 1
                else:
                    samples.append(self._sample(row, folder / image, f"{name}/{values['__key__']}", split))
            without.update(_failures(shard))
        report_left_out(root, len(samples) + sum(without.values()), without)
        return samples

    def open(self, root: Path, finish: Callable[[Sample], Sample]) -> StreamedGroups:
        from frozenprefix.data.streaming.remote import RemoteShards
        from frozenprefix.data.streaming.tars import TarGroups

        remote = None
        if self.remote_gb is None:
            splits = files_of(root, self.shards, self.split)
        else:
            names_there = without_braces(self.shards)
            if any(char in self.shards for char in "*?["):
                raise DataError(f"{self.path}: `shards`: got a pattern, expected names: {{00000..00099}}.tar")
            remote = RemoteShards(self.path, names_there, limit=int(self.remote_gb * 1e9))
            root, splits = remote.folder, dict.fromkeys(remote.paths())
        names = {tar: tar.relative_to(root).with_suffix("").as_posix() for tar in splits}
        built = self._is_built(root)

        def samples(tar: Path, key: str, members: dict[str, bytes], images: dict[str, Path]) -> list[Sample]:
            values = {m: _text_member(tar, key, m, data) for m, data in members.items() if m in (*_TEXTS, "json")}
            row = Row(str(tar), values, f"key {key}")
            if built:
                return built_samples(row, images)
            image = self._image(row, images)
            if image is None:
                raise BadImageError("no image in the tar", f"{row.where}: got members {', '.join(members)}, no image")
            return [self._sample(row, image, f"{names[tar]}/{key}", splits[tar])]

        return TarGroups(root, list(splits), self.shuffle_images, samples, finish, remote)

    def _is_built(self, root: Path) -> bool:
        """Whether the samples are those that `data build` wrote into the JSON, and not to be made of other members."""
        return (root / BUILT).is_file() and not self.model_fields_set & {"image", "captions", "question", "answers"}

    def _image(self, row: Row, images: Mapping[str, T]) -> T | None:
        if self.image is None and len(images) > 1:
            raise DataError(f"{row.where}: got images {', '.join(images)}, expected one; name it in `image`")
        return images.get(self.image) if self.image is not None else next(iter(images.values()), None)

    def _sample(self, row: Row, image: Path, name: str, split: str | None) -> Sample:
        if self.question is None:
            texts = tuple(text.strip() for text in _texts(row, self.captions or ""))
            return Sample(id=name, images=(image,), targets=texts, split=split, where=row.where)
        answers = _texts(row, self.answers)
        return Sample(
            id=name,
            images=(image,),
            targets=commonest(answers),
            question=" ".join(_texts(row, self.question)),
            split=split,
            task="vqa",
            metadata={"answers": answers},
            where=row.where,
        )


def _texts(row: Row, place: str) -> tuple[str, ...]:
    """Texts of a member, "txt", or of a field of its JSON: "json.caption"."""
    *parents, field = place.split(".")
    for parent in parents:
        row = row.row(parent)
    return row.texts(field)


def _text_member(shard: Path, key: str, member: str, data: bytes) -> Any:
    """The text of a member, or the value of a JSON one."""
    try:
        text = data.decode("utf-8-sig")
        return parse_json(text) if member == "json" else text
    except ValueError as error:
        raise DataError(f"{shard}: key {key}: member '{member}' is not UTF-8 or JSON: {error}") from error


def _unpack(shard: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Write the images of a tar; yield each key's other members, its images' names and the key."""
    hidden: list[str] = []
    for sample in _members_by_key(shard, hidden):
        key = sample["__key__"]
        row: dict[str, Any] = {"__key__": key, "__images__": {}}
        for member, data in sample.items():
            if member.startswith("__"):
                continue
            if ending := image_ending(f"image.{member}"):
                row["__images__"][member] = write_image(folder, data, ending)
            elif member in _TEXTS or member == "json":
                row[member] = _text_member(shard, key, member, data)
        yield row
    if hidden:
        yield {_HIDDEN: len(hidden)}


def _members_by_key(shard: Path, hidden: list[str]) -> Iterator[dict[str, Any]]:
    """The members of each key; names that `walk_files` passes over are collected in `hidden`."""

    def seen(members: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for member in members:
            if is_hidden(member.get("fname", "")):
                hidden.append(member["fname"])
            else:
                yield member

    try:
        split_name = _key_rule(shard)
        with shard.open("rb") as stream:
            yield from group_by_keys(seen(tar_file_expander([{"url": str(shard), "stream": stream}])), keys=split_name)
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        reason = str(error.args[0]).splitlines()[0].rstrip(":")
        raise DataError(f"{shard}: cannot be read as a WebDataset tar: {reason}; create it again") from error


def _key_rule(shard: Path) -> Callable[[str], tuple[str | None, str | None]]:
    """How the names of a tar are split into key and member: at the first dot, or at the last one."""
    with tarfile.open(shard) as tar:
        infos = tar.getmembers()
        if infos and isinstance(tar.fileobj, io.BufferedReader):  # compressed files have checks of their own
            # tarfile takes half a header for the end, which is a block of zeros
            tar.fileobj.seek(infos[-1].offset_data + -(-infos[-1].size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"it is cut short behind '{infos[-1].name}'")
    members = [base_plus_ext(info.name)[1] or "" for info in infos if not is_hidden(info.name)]
    dotted = any(member.rpartition(".")[2] in (*_TEXTS, "json") for member in members if "." in member)
    return _at_last_dot if dotted else base_plus_ext


def _at_last_dot(name: str) -> tuple[str | None, str | None]:
    key, _, member = name.rpartition(".")
    return (key, member.lower()) if key and "/" not in member else (None, None)


def _failures(shard: Path) -> Counter[str]:
    """What img2dataset could not download for this tar: its own words for it → how often."""
    path = shard.with_name(f"{shard.stem}_stats.json")
    if not path.is_file():
        return Counter()
    counts = read_json_object(path).row("status_dict")
    return Counter({status: counts.integer(status) for status in counts.fields() if status != "success"})
