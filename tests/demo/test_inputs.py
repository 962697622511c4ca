"""What is dropped on the page: what can be read is shown, everything else is named with its reason."""

from __future__ import annotations

import pytest
from PIL import Image

from frozenprefix.demo import inputs
from frozenprefix.demo.inputs import PREVIEW_SIDE, read_items


def test_photos_folders_and_everything_else(photo, tmp_path):
    folder = tmp_path / "holiday"
    (folder / "day 1").mkdir(parents=True)
    Image.new("RGB", (3000, 1000), "red").save(folder / "day 1" / "wide.jpg")
    (folder / "notes.txt").write_text("a dog")
    (folder / "broken.jpg").write_bytes(photo.read_bytes()[:-100])
    (folder / "empty.png").write_bytes(b"")
    (folder / ".hidden.jpg").write_bytes(b"")
    items, problems = read_items([photo, folder, tmp_path / "gone.png"])
    assert [(item.name, item.kind) for item in items] == [("red_circle.png", "photo"), ("wide.jpg", "photo")]
    assert items[1].preview.size == (PREVIEW_SIDE, PREVIEW_SIDE // 3)
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        *("broken.jpg", "empty.png", "gone.png", "notes.txt"),
    ]
    assert "notes.txt: neither an image nor a clip" in problems
    assert not any(str(tmp_path) in problem for problem in problems), "a page does not show the server's folders"


def test_a_clip_shows_its_middle(tmp_path):
    video = pytest.importorskip("tests.helpers.video")
    clip = video.three_colours(tmp_path)
    (item,), problems = read_items([clip])
    assert (item.kind, problems) == ("clip", [])
    assert video.colour_of(item.preview) == "green"
    (tmp_path / "no.mp4").write_bytes(b"no video")
    items, (problem,) = read_items([tmp_path / "no.mp4"])
    assert not items
    assert problem.startswith("no.mp4: FFmpeg cannot open it")


def test_a_page_holds_so_many(photo, monkeypatch):
    monkeypatch.setattr(inputs, "MOST_ITEMS", 2)
    items, problems = read_items([photo] * 4)
    assert len(items) == 2
    assert problems == ["red_circle.png: left out, as the page holds 2 files at a time"] * 2
