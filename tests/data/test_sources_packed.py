"""Sources whose images or turns lie inside other files: tars, tables of `datasets`, conversations."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.data.collation import Collator, prompt_of
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import Sample, group_by_images
from frozenprefix.data.sources import detect_sources, load_source, load_sources, parse_source
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.models.processing import FrozenPrefixProcessor
from tests.data.test_sources_more import images, write
from tests.helpers.lm import make_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache for each test."""
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def red_of(sample: Sample) -> int:
    return load_image(sample.images[0]).getpixel((0, 0))[0]


# ── WebDataset tars ──


def tar(path: Path, **members: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def img2dataset_folder(root: Path) -> Path:
    notes = json.dumps({"caption": "from json", "question": "what?", "answers": ["a", "b", "b"]})
    members = {"000000000.png": png(5), "000000000.txt": "a dog ", "000000000.json": notes}
    tar(root / "00000.tar", **members, **{"000000003.txt": "lost"})
    tar(root / "00001.tar", **{"a/../../../evil.PNG": png(6), "a/../../../evil.txt": "a cat", "x.npy": b"\x80"})
    write(root / "00000_stats.json", {"count": 4, "status_dict": {"success": 1, "HTTP Error 404": 2}})
    return root


def test_webdataset(tmp_path, cache, caplog):
    root = img2dataset_folder(tmp_path / "data")
    config = {"type": "webdataset", "path": str(root)}
    samples = load_source(config)
    assert [(sample.id, sample.targets, red_of(sample)) for sample in samples] == [
        ("00000/000000000", ("a dog",), 5),
        ("00001/a/../../../evil", ("a cat",), 6),
    ]
    assert "4 of 6 rows are left out: no image in the tar 2, HTTP Error 404 2" in caplog.text
    # images are unpacked under names of their own, whatever the members are called
    kept = cache / "unpacked"
    assert all(image.is_relative_to(kept) for sample in samples for image in sample.images)
    assert sorted(path.suffix for path in kept.rglob("*") if path.is_file()) == [".jsonl", ".jsonl", ".png", ".png"]
    (asked, *_) = load_source({**config, "shards": "00000.tar", "question": "json.question"})
    assert (asked.question, asked.targets, asked.metadata) == ("what?", ("b",), {"answers": ("a", "b", "b")})
    (told, *_) = load_source({**config, "shards": "00000.tar", "captions": "json.caption"})
    assert told.targets == ("from json",)


def test_webdataset_is_unpacked_once_for_the_same_bytes(tmp_path, cache, monkeypatch):
    path = tar(tmp_path / "data/train/0.tar", **{"1.png": png(1), "1.txt": "a"})
    config = {"type": "webdataset", "path": str(tmp_path / "data")}
    first = load_source({**config, "split": "train"})
    with monkeypatch.context() as patch:
        patch.setattr("frozenprefix.data.sources.webdataset_tars._members_by_key", None)
        assert load_source(config) == first
    tar(path, **{"1.png": png(2), "1.txt": "bb"})
    second = load_source(config)
    assert (red_of(second[0]), second[0].targets, second[0].split) == (2, ("bb",), "train")
    assert len(list((cache / "unpacked").iterdir())) == 2


@pytest.mark.parametrize(
    ("members", "fields", "message"),
    [
        ({"1.png": b"x", "1.cap": "a"}, {}, r"0.tar: key 1: field 'txt' is missing"),
        ({"1.png": b"x", "1.txt": b"\xff"}, {}, r"0.tar: key 1: member 'txt' is not UTF-8 or JSON"),
        ({"1.png": b"x", "1.json": "{"}, {}, r"0.tar: key 1: member 'json' is not UTF-8 or JSON"),
        ({"1.a.png": b"x", "1.b.png": b"y"}, {}, r"0.tar: key 1: got images a.png, b.png, expected one; name it in"),
        ({"1.txt": "a"}, {}, r"all of its 1 rows are left out \(no image in the tar 1\)"),
        ({"1.png": b"x", "1.txt": "a"}, {"captions": "json.caption"}, r"key 1: field 'json' is missing"),
        ({"1.png": b"x", "1.txt": "a"}, {"shards": "*.tgz"}, r"has no file '\*.tgz'"),
    ],
)
def test_webdataset_malformed(tmp_path, members, fields, message):
    tar(tmp_path / "0.tar", **members)
    with pytest.raises(DataError, match=message):
        load_source({"type": "webdataset", "path": str(tmp_path), **fields})


def test_webdataset_damaged(tmp_path, cache):
    path = tar(tmp_path / "0.tar", **{"1.txt": "a", "1.png": bytes(5000)})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"0.tar: cannot be read as a WebDataset tar: .*; create it again"):
        load_source({"type": "webdataset", "path": str(tmp_path)})
    assert not list((cache / "unpacked").iterdir())
    with pytest.raises(ConfigError, match="got neither `captions` nor `question`"):
        parse_source({"type": "webdataset", "path": "x", "captions": None})


def test_data_check_of_tars(tmp_path):
    root = img2dataset_folder(tmp_path / "data")
    tar(root / "00002.tar", **{"5.jpg": b"no image", "5.txt": "broken"})
    result = CliRunner().invoke(app, ["data", "check", str(root)])
    assert "samples: 3" in result.output
    assert "bad images: not_an_image 1" in result.output
    assert result.exit_code == 1


# ── datasets of Hugging Face ──

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def table(**columns: list) -> datasets.Dataset:
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column("image", datasets.Image(decode=False)).cast_column("image", datasets.Image())


def image(red: int, name: str | None = None) -> dict:
    return {"bytes": png(red), "path": name}


def test_hf_dataset_saved_to_disk(tmp_path, caplog):
    train = table(image=[image(1, "a.PNG"), None, image(3)], caption=["x", "y", "z "])
    validation = table(image=[image(2)], caption=["v"])
    datasets.DatasetDict({"train": train, "validation": validation}).save_to_disk(tmp_path / "data")
    (config,) = detect_sources(tmp_path / "data")
    samples = load_source(config)
    assert [(sample.id, sample.targets, sample.split) for sample in samples] == [
        ("train/0", ("x",), "train"),
        ("train/2", ("z",), "train"),
        ("validation/0", ("v",), "validation"),
    ]
    assert [red_of(sample) for sample in samples] == [1, 3, 2]
    assert samples[0].images[0].suffix == ".png"
    assert "1 of 4 rows are left out: no image in the row 1" in caplog.text
    assert len(load_source({**config, "split": "validation"})) == 1
    with pytest.raises(DataError, match=r"split 'val' is not there.*splits: train, validation"):
        load_source({**config, "split": "val"})


def test_hf_dataset_parquet_with_questions(tmp_path, cache):
    (tmp_path / "data").mkdir()
    rows = {"image": [image(3), image(3)], "question": ["q", "r"], "answers": [["a", "b", "b"], ["c"]]}
    table(**rows).to_parquet(tmp_path / "data/val-00000-of-00001.parquet")
    first, second = load_sources(detect_sources(tmp_path))
    assert (first.id, first.question, first.targets) == ("data/val-00000-of-00001/0", "q", ("b",))
    assert (first.split, first.metadata) == ("val", {"answers": ("a", "b", "b")})
    # one image in two rows is one file, so that its questions are packed together
    assert first.images == second.images
    assert first.images[0].is_relative_to(cache)


def test_hf_dataset_with_paths_in_place_of_bytes(tmp_path):
    images(tmp_path, "beside.png")
    rows = pyarrow.table({"image": [{"bytes": None, "path": "beside.png"}], "text": [["a", "b"]]})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    (sample,) = load_source({"type": "hf_dataset", "path": str(tmp_path)})
    assert (sample.images, sample.targets) == ((tmp_path / "beside.png",), ("a", "b"))
    assert (sample.id, sample.split) == ("rows/0", None)


def test_hf_dataset_arrow_with_labels(tmp_path):
    features = datasets.Features(
        image=datasets.Value("binary"), label=datasets.ClassLabel(names=["cat", "dog"]), text=datasets.Value("string")
    )
    columns = {"image": [png(1), png(2)], "label": [1, -1], "text": ["t", "t"]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    config = {"type": "hf_dataset", "path": str(tmp_path / "saved"), "files": "*.arrow", "label": "label"}
    known, secret = load_source(config)
    assert (known.targets, known.task, known.metadata) == (("dog",), "classification", {"label": "dog"})
    assert secret.targets == ()


@pytest.mark.parametrize(
    ("columns", "fields", "message"),
    [
        ({"title": ["t"]}, {}, r"t.parquet: got columns image, title; name those to read"),
        ({"caption": ["t"]}, {"image": "img"}, r"t.parquet: `image`: no column 'img'.*; columns: image, caption"),
        ({"caption": ["t"]}, {"captions": "captoin"}, r"no column 'captoin' \(did you mean 'caption'\?\)"),
        ({"caption": [3]}, {}, r"t.parquet: row 0: field 'caption': got 3, expected a text or a list of texts"),
        ({"caption": [None]}, {}, r"t.parquet: row 0: field 'caption': got null, expected a value"),
        ({"caption": ["t"]}, {"image": "caption"}, r"row 0: column 'caption': got 't', expected an image"),
    ],
)
def test_hf_dataset_malformed(tmp_path, columns, fields, message):
    table(image=[image(1)], **columns).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        load_source({"type": "hf_dataset", "path": str(tmp_path), **fields})
    with pytest.raises(ConfigError, match="expected `captions`, or `question` and `answers`, or `label`"):
        parse_source({"type": "hf_dataset", "path": "x", "question": "q"})


# ── LLaVA ──


def llava(root: Path, *rows: dict) -> dict[str, str]:
    write(root / "llava_train.json", list(rows))
    images(root, "1.jpg", "2.jpg")
    return {"type": "llava", "path": str(root), "file": "llava_train.json"}


def conversation(*values: str, **fields: object) -> dict:
    turns = [{"from": "gpt" if place % 2 else "human", "value": value} for place, value in enumerate(values)]
    return {"id": "7", "image": "1.jpg", "conversations": turns, **fields}


def test_llava_prompts_hold_the_earlier_turns(tmp_path, caplog):
    talk = conversation("<image>\nwhat is it?", "a dog", "what color?", "red", "why?", "grass")
    config = llava(tmp_path, talk, {"id": "t", "conversations": talk["conversations"]})
    samples = load_source(config)
    assert samples[0] == Sample(
        id="7#0.0",
        images=(tmp_path / "1.jpg",),
        targets=("a dog",),
        question="what is it?",
        history=(),
        split="train",
        task="vqa",
        metadata={"answers": ("a dog",)},
    )
    assert samples[2].history == (("what is it?", "a dog"), ("what color?", "red"))
    assert (samples[2].prompt, samples[2].question) == (None, "why?")
    assert "1 of 2 rows are left out: <image> mark without an image 1" in caplog.text
    own = load_source({**config, "prompt": "Q {question}\n"})
    assert own[2].history is None
    assert [sample.prompt for sample in own[:2]] == ["Q {question}\n", "Q what is it?\na dog\nQ {question}\n"]


def test_llava_conversations_in_text_alone(tmp_path):
    talk = conversation("why is the sky blue?", "air scatters light", "always?", "no")
    del talk["image"]
    config = llava(tmp_path, conversation("<image>what?", "a dog"), talk, {**talk, "id": "8"})
    first, *others = load_source(config)
    assert len(first.images) == 1
    assert [sample.images for sample in others] == [()] * 4
    assert others[1].history == (("why is the sky blue?", "air scatters light"),)
    groups = group_by_images([first, *others])
    assert [[sample.id for sample in group.samples] for group in groups] == [
        ["7#0.0"],
        ["7#1.0", "7#1.1"],
        ["8#2.0", "8#2.1"],
    ], "a conversation is a group"
    assert len(load_source({**config, "limit": 2})) == 3
    config = llava(tmp_path, *({**talk, "id": str(number)} for number in range(20)))
    train, val = (load_source({**config, "holdout": {"fraction": 0.5, "part": part}}) for part in ("train", "val"))
    assert len(train) + len(val) == 40
    assert not {sample.group for sample in train} & {sample.group for sample in val}


def test_llava_turns_are_read_once_by_the_trie(tmp_path):
    from transformers import CLIPImageProcessor

    samples = load_source(llava(tmp_path, conversation("<image>what?", "a dog", "color?", "red", "why?", "grass")))
    processor = FrozenPrefixProcessor(CLIPImageProcessor(), make_tokenizer(), prefix_length=3)
    collator = Collator(processor)
    pairs = [(sample, sample.targets[0]) for sample in samples]
    lengths = [len(collator.target(*pair).input_ids) for pair in pairs]
    packed = collator.pack([pairs], [1])
    # the last turn holds all before it; the end token is only ever predicted
    assert packed.input_ids.shape == (1, lengths[-1] - 1)
    assert packed.num_targets == 3
    assert (packed.edge_label == processor.tokenizer.eos_token_id).sum() == 3
    assert prompt_of(samples[1], processor) == "<image>Question: what? Answer: a dog\nQuestion: color? Answer:"


def test_llava_turns_are_written_as_a_dialog_writes_them(tmp_path):
    from transformers import CLIPImageProcessor

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    processor = FrozenPrefixProcessor(CLIPImageProcessor(), tokenizer, prefix_length=2)
    talk = ("<image>\nwhat?", "a dog", "color?", "red")
    _, second = load_source(llava(tmp_path, conversation(*talk)))
    start = tokenizer.bos_token
    assert prompt_of(second, processor) == (f"{start}[user]<image>what?\n[assistant]a dog\n[user]color?\n[assistant]")
    ids = Collator(processor).target(second, "red").input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    two = conversation("what is <image>?", "a", "and <image>?", "b", image=["1.jpg", "2.jpg"])
    _, second = load_source(llava(tmp_path, two))
    assert (
        prompt_of(second, processor) == f"{start}[user]what is <image>?\n[assistant]a\n[user]and <image>?\n[assistant]"
    )


def test_llava_several_images(tmp_path):
    two = ["1.jpg", "2.jpg"]
    config = llava(tmp_path, conversation("what is <image>?", "a", "and <image>?", "b", image=two))
    first, second = load_source(config)
    assert (first.images, second.images) == ((tmp_path / "1.jpg",), (tmp_path / "1.jpg", tmp_path / "2.jpg"))
    assert (first.question, second.question) == ("what is <image>?", "and <image>?")
    assert second.history == (("what is <image>?", "a"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conversation("q", "a", "q"), r"\[0\]: field 'conversations': got 3 turns, expected question, answer"),
        (conversation("q", ""), r"conversations\[1\]: field 'value': got '', expected"),
        (conversation("{question}", "a"), r"conversations\[0\]: field 'value': got '\{question\}', expected words"),
        (
            {"image": "1.jpg", "conversations": [{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "a"}]},
            r"conversations\[0\]: field 'from': got 'gpt', expected 'human'",
        ),
        (conversation("<image> <image> q", "a"), r"\[0\]: got 2 marks <image>, expected 1"),
        (conversation("q", "a", image=["1.jpg", "2.jpg"]), r"\[0\]: got no mark <image> in the first question"),
    ],
)
def test_llava_malformed(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_source(llava(tmp_path, row))
    for prompt in ("no question", "<image>{question}"):
        with pytest.raises(ConfigError, match="expected the text of one turn"):
            parse_source({"type": "llava", "path": "x", "file": "y", "prompt": prompt})
