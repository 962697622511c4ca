"""The script that makes training data of emoji, on a package made on the spot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from frozenprefix.data.images import load_image
from frozenprefix.data.sources import load_source
from tests.helpers import ROOT
from tests.test_recipes import script

EMOJI = [
    ("DOG FACE", "1f436.png", "Animals & Nature", "animal-mammal"),
    ("DOG", "1f415.png", "Animals & Nature", "animal-mammal"),
    ("SLICE OF PIZZA", "1f355.png", "Food & Drink", "food-prepared"),
    ("RUNNER", "1f3c3.png", "People & Body", "person-activity"),
    ("GRINNING FACE", "1f600.png", "Smileys & Emotion", "face-smiling"),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder as the npm package's: the runner is replaced by another, the smiling face is not in the set."""
    drawings = tmp_path / "package" / "img" / "toy" / "64"
    drawings.mkdir(parents=True)
    rows = []
    for name, file, category, subcategory in EMOJI:
        row = {"name": name, "image": file, "category": category, "subcategory": subcategory}
        rows.append(row | ({"obsoleted_by": "1F3C3-200D"} if name == "RUNNER" else {}))
        if name != "GRINNING FACE":
            image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            image.paste((200, 30, 30, 255), (16, 16, 48, 48))
            image.save(drawings / file)
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(rows))
    return tmp_path / "package"


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("easy", ["dog", "dog", "pizza"]),
        ("name", ["dog face", "dog", "slice of pizza"]),
        ("category", ["animals & nature", "animals & nature", "food & drink"]),
        ("subcategory", ["animal-mammal", "animal-mammal", "food-prepared"]),
    ],
)
def test_the_folder_is_read_as_labelled_images(package, tmp_path, classes, labels):
    script("emoji").write(package, tmp_path / "out", classes)
    samples = load_source({"type": "captions", "path": str(tmp_path / "out")})
    assert [sample.targets[0] for sample in samples] == labels
    assert {sample.task for sample in samples} == {"classification"}
    assert [sample.id for sample in samples] == ["1f436", "1f415", "1f355"]
    assert samples[2].metadata["name"] == "slice of pizza"
    image = load_image(samples[0].images[0])
    assert (image.getpixel((0, 0)), image.getpixel((32, 32))) == ((255, 255, 255), (200, 30, 30))


def test_easy_classes_share_no_emoji():
    classes = script("emoji").EASY_CLASSES
    names = [name for each in classes.values() for name in each]
    assert len(names) == len(set(names))
    assert list(classes) == sorted(classes)


def test_another_package_is_refused(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"x")
    command = [sys.executable, ROOT / "recipes" / "emoji.py", tmp_path / "out", "--package", tmp_path / "a.tgz"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "its SHA-256 differs" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.network
def test_real_emoji(tmp_path):
    for classes in ("easy", "category"):
        command = [sys.executable, ROOT / "recipes" / "emoji.py", tmp_path / classes, "--classes", classes]
        subprocess.run(command, check=True)
    samples = load_source({"type": "captions", "path": str(tmp_path / "easy")})
    counts = Counter(sample.targets[0] for sample in samples)
    assert counts == {label: len(names) for label, names in script("emoji").EASY_CLASSES.items()}
    assert len(load_source({"type": "captions", "path": str(tmp_path / "category")})) > 1800
