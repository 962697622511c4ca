"""A corpus of bad files: one valid file for every reader, each damaged in a way that people meet, and its error.

    python tests/faults/corpus.py        # every bad file with the error that its reader gives

Nothing of it is stored: the valid files are those of `benchmarks/fuzzing_readers.py`.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.fuzzing_readers import Reader, make_readers
from frozenprefix.errors import FrozenPrefixError

Damage = Callable[[bytes], bytes]


class BadFile(NamedTuple):
    """A damaged file.

    Attributes:
        what: what is wrong, in words.
        file: the end of the path of the valid file.
        damage: from its bytes to the bad ones.
        expected: part of the error, or of the log where a row is left out and counted.
    """

    what: str
    file: str
    damage: Damage
    expected: str


def _other(content: bytes | str) -> Damage:
    return lambda _: content.encode() if isinstance(content, str) else content


def _swap(old: str, new: str) -> Damage:
    return lambda data: data.replace(old.encode(), new.encode())


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _json(change: Callable[[Any], Any]) -> Damage:
    """Change a JSON value in place, or give another one."""

    def damage(data: bytes) -> bytes:
        value = json.loads(data)
        changed = change(value)
        return json.dumps(value if changed is None else changed).encode()

    return damage


def _without(*names: str) -> Damage:
    return _json(lambda value: [value.pop(name) for name in names] and None)


def _row(**values: Any) -> Damage:
    """Change the first of several JSON lines."""

    def damage(data: bytes) -> bytes:
        first, *rest = data.splitlines()
        row = {key: value for key, value in {**json.loads(first), **values}.items() if value is not ...}
        return b"\n".join([json.dumps(row).encode(), *rest]) + b"\n"

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(data: bytes) -> bytes:
        tensors = load(data)
        change(tensors)
        return save(tensors)

    return damage


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(iter(tensors))


def _tar(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Damage:
    """A tar with one more member."""

    def damage(data: bytes) -> bytes:
        buffer = io.BytesIO(data)
        with tarfile.open(fileobj=buffer, mode="a") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            tar.addfile(member)
        return buffer.getvalue()

    return damage


def _png(width: int, height: int) -> bytes:
    """The head of a PNG that claims a size."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "png")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def _npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def _pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _RunsCode:
    def __reduce__(self) -> Any:
        return print, ("code of a weights file has run",)


BAD_FILES = [
    BadFile("an empty image", "/image.png", _other(b""), "image.png"),
    BadFile("a text that is called an image", "/image.png", _other("<html>not found</html>"), "image.png"),
    BadFile("half an image", "/image.jpg", _cut, "image.jpg"),
    BadFile("an image that claims 10 gigapixels", "/image.png", _other(_png(100_000, 100_000)), "pixels"),
    BadFile("an image one pixel high", "/image.png", _other(_png(30_000, 1)), "image.png"),
    BadFile("captions that are no JSON", "/captions.jsonl", _other("image,caption\na.png,a cat\n"), "not JSON"),
    BadFile("captions cut in the middle", "/captions.jsonl", lambda data: data[:-9], "captions.jsonl:3: not JSON"),
    BadFile("captions in UTF-16", "/captions.jsonl", lambda data: data.decode().encode("utf-16"), "UTF-8"),
    BadFile("no captions at all", "/captions.jsonl", _other(b""), "got 0 samples"),
    BadFile("a row without an image", "/captions.jsonl", _row(image=...), "image"),
    BadFile("a row whose captions are a number", "/captions.jsonl", _row(captions=3), "captions"),
    BadFile("a field twice", "/captions.jsonl", _swap('"split"', '"image": "b", "split"'), "twice"),
    BadFile("images that are not there", "/captions.jsonl", _swap("image.png", "x.png"), "x.png"),
    BadFile("an id twice", "/captions.jsonl", _row(id="1"), "'1'"),
    BadFile("a recipe with tabs", "/recipe.yaml", _other("name:\tx\n\tmodel: y\n"), "recipe.yaml"),
    BadFile("a recipe with a misspelt key", "/recipe.yaml", _swap("max_steps", "max_step"), "max_steps"),
    BadFile("a recipe with a key twice", "/recipe.yaml", lambda data: data + b"\nname: again\n", "name"),
    BadFile(
        "a recipe that makes objects",
        "/recipe.yaml",
        _other("name: !!python/object/apply:os.system [ls]\n"),
        "recipe.yaml",
    ),
    BadFile("a recipe with a text for a number", "/recipe.yaml", _swap("max_steps: 3", "max_steps: many"), "max_steps"),
    BadFile("a recipe with NaN", "/recipe.yaml", _swap("max_steps: 3", "learning_rate: .nan"), "learning_rate"),
    BadFile(
        "a feature table that is a pickle",
        "/table.npy",
        _other(_npy(np.array([{}], object), allow_pickle=True)),
        "table.npy",
    ),
    BadFile("a feature table of another length", "/table.npy", _other(_npy(np.ones((2, 2, 4), np.float32))), "table"),
    BadFile("a feature table without names", "/table.json", _other("{}"), "table.json"),
    BadFile(
        "COCO captions of an unknown image", "coco.json", _json(lambda v: v["annotations"][0].update(image_id=9)), "9"
    ),
    BadFile("questions without a question", "qa.json", _json(lambda v: v[0].pop("question") and None), "question"),
    BadFile("questions that are an object", "qa.json", _other("{}"), "qa.json"),
    BadFile(
        "a conversation without an answer",
        "llava.json",
        _json(lambda v: v[0]["conversations"].pop() and None),
        "llava.json",
    ),
    BadFile(
        "answers to another question",
        "answers.json",
        _json(lambda v: v["annotations"][0].update(question_id=7)),
        "question",
    ),
    BadFile("a row with a cell too many", "table.csv", _swap("a cat", "a cat; a mat"), "table.csv:2: got 3 cells"),
    BadFile("a table cut in the middle of a row", "table.csv", lambda data: data[:-7], "table.csv:3: got 1 cells"),
    BadFile("a table in no encoding", "table.csv", _other(b"photo;text\na;a \x81cat\n"), "no text in UTF-8"),
    BadFile("a table without columns that fit", "table.csv", _other("x;y\np;q\n"), "no column names images"),
    BadFile("a table with one name for two columns", "table.csv", _swap("what is on it", "photo"), "table.csv:1: two"),
    BadFile("half a workbook", "table.xlsx", _cut, "cannot be read as an Excel table"),
    BadFile("a workbook that is a text", "table.xlsx", _other("photo,text\n"), "cannot be read as an Excel table"),
    BadFile("a workbook of Excel 97", "table.xlsx", _other(b"\xd0\xcf\x11\xe0..."), "table of Excel 97"),
    BadFile("a tar with a file outside of it", "0.tar", _tar("../evil.txt"), "1 of 2 rows are left out"),
    BadFile("a tar with a link", "0.tar", _tar("k.link", tarfile.SYMTYPE, "/etc/passwd"), "0.tar"),
    BadFile("a tar that is a text", "0.tar", _other("no tar"), "0.tar"),
    BadFile("half a tar", "0.tar", lambda data: data[:700], "0.tar"),
    BadFile("a table that is a text", "train.parquet", _other("no table"), "train.parquet"),
    BadFile("half a table", "train.parquet", _cut, "train.parquet"),
    BadFile("a saved data set without its state", "state.json", _other("[]"), "saved"),
    BadFile("a state that is no JSON", "training_state.json", _cut, "training_state.json"),
    BadFile("a state with a negative step", "training_state.json", _json(lambda v: v.update(step=-1)), "step"),
    BadFile(
        "an optimizer of other shapes",
        "optimizer.safetensors",
        _tensors(lambda t: t.update({"0.exp_avg": torch.zeros(9)})),
        "shape",
    ),
    BadFile(
        "an optimizer with NaN",
        "optimizer.safetensors",
        _tensors(lambda t: t["0.exp_avg"].fill_(float("nan"))),
        "finite",
    ),
    BadFile("half an optimizer", "optimizer.safetensors", _cut, "optimizer"),
    BadFile("no random state", "random_state.safetensors", _other(save({"0.cpu": torch.zeros(1)})), "random"),
    BadFile("half the weights", "state/model.safetensors", _cut, "model.safetensors"),
    BadFile("sums that are no JSON", "sums.json", _cut, "sums.json"),
    BadFile("half a cache index", ".index.json", _cut, "index.json"),
    BadFile("half a shard of features", "000001.tar", _cut, "000001.tar"),
    BadFile("a language model without a type", "lm/config.json", _without("model_type"), "model_type"),
    BadFile("a language model of an unknown type", "lm/config.json", _json(lambda v: v.update(model_type="x")), "lm"),
    BadFile(
        "a language model that lacks a weight",
        "lm/model.safetensors",
        _tensors(lambda t: t.pop(_first(t))),
        "lacks 1 weights",
    ),
    BadFile(
        "a pointer of Git LFS",
        "lm/model.safetensors",
        _other("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "LFS",
    ),
    BadFile("a tokenizer that is no JSON", "lm/tokenizer.json", _cut, "tokenizer"),
    BadFile("a checkpoint whose config is no JSON", "checkpoint/config.json", _cut, "config.json"),
    BadFile(
        "a checkpoint without an identity", "checkpoint/config.json", _json(lambda v: v.update(identity={})), "identity"
    ),
    BadFile(
        "a checkpoint with an unknown mapper",
        "checkpoint/config.json",
        _json(lambda v: v["mapper"].update(type="mpl")),
        "mlp",
    ),
    BadFile(
        "an adapter of another method", "adapter_config.json", _json(lambda v: v.update(peft_type="IA3")), "adapter"
    ),
    BadFile(
        "an adapter with other shapes",
        "adapter_model.safetensors",
        _tensors(lambda t: t.update({_first(t): torch.zeros(1)})),
        "shape",
    ),
    BadFile("a processor that is no JSON", "processor_config.json", _cut, "processor"),
    BadFile("weights that run code", "weights.pth", _other(_pickle(_RunsCode())), "weights.pth"),
    BadFile("weights that are a list", "weights.pth", _other(_pickle([torch.ones(1)])), "weights.pth"),
    BadFile("half the weights of torch", "weights.pth", _cut, "weights.pth"),
    BadFile("a result without predictions", "result.json", _without("predictions"), "predictions"),
    BadFile(
        "predictions of another evaluation",
        "result.json",
        _json(lambda v: v.update(predictions_sha256="0")),
        "evaluate again",
    ),
    BadFile("predictions without an id", "predictions.jsonl", _row(id=...), "predictions"),
]


class Corpus:
    """The valid files, and the bad ones one at a time.

    Args:
        folder: a new folder for the files.
    """

    def __init__(self, folder: Path):
        self._readers = make_readers(folder)

    @contextmanager
    def reader(self, bad: BadFile) -> Iterator[Reader]:
        """The reader of a file, which is bad inside the block."""
        reader = next(reader for reader in self._readers if str(reader.file).endswith(bad.file))
        valid = reader.file.read_bytes()
        reader.read()
        damaged = bad.damage(valid)
        assert damaged != valid, f"{bad.what}: nothing has changed"
        reader.file.write_bytes(damaged)
        try:
            yield reader
        finally:
            reader.file.write_bytes(valid)


def main() -> None:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = Corpus(Path(name) / "corpus")
        for bad in BAD_FILES:
            with corpus.reader(bad) as reader:
                try:
                    reader.read()
                    message = "read; the log says what was left out"
                except FrozenPrefixError as error:
                    message = f"{type(error).__name__}: {error}"
                except Exception as error:
                    message = f"FOREIGN {error!r}"
            print(f"{bad.what}\n    {message.replace(name, '')}\n")


if __name__ == "__main__":
    main()
