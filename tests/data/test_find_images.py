"""One walker for all folders of images."""

from __future__ import annotations

import pytest
from PIL import Image

from frozenprefix.cli.common import list_images
from frozenprefix.data.images import find_images, walk_files
from frozenprefix.data.sources import load_source
from frozenprefix.errors import DataError


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes, one of them a link, and what operating systems and editors leave."""
    root = tmp_path / "data"
    for name in ("cat/1.jpg", "cat/2.JFIF", "cat/3.jpe", "cat/4.HEIC"):
        draw(root / name)
    for name in (".ipynb_checkpoints/1-checkpoint.jpg", "cat/.hidden.jpg", "__MACOSX/cat/._1.jpg", "cat/._2.jpg"):
        draw(root / name)
    draw(tmp_path / "elsewhere" / "5.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "notes.txt").write_text("x")
    return root


def test_links_are_followed_and_hidden_names_are_passed_over_and_counted(folder, caplog):
    names = [path.relative_to(folder).as_posix() for path in find_images(folder)]
    assert names == ["cat/1.jpg", "cat/2.JFIF", "cat/3.jpe", "cat/4.HEIC", "dog/5.png"]
    assert "5 of 10 names are left out: hidden 4, no image by its name 1" in caplog.text
    assert "notes.txt" in caplog.text or ".ipynb_checkpoints" in caplog.text


def test_links_in_a_circle_end(folder, caplog):
    (folder / "dog" / "up").symlink_to(folder)
    (folder / "cat" / "self").symlink_to(folder / "cat")
    assert len(find_images(folder)) == 5
    assert "link to a folder above it 2" in caplog.text


def test_two_links_to_one_folder_are_two_folders(folder, tmp_path):
    (folder / "hound").symlink_to(tmp_path / "elsewhere")
    labels = {
        sample.targets[0] for sample in load_source({"type": "image_folder", "path": str(folder), "labels": True})
    }
    assert labels == {"cat", "dog", "hound"}


def test_a_link_to_nothing_is_no_image(folder):
    (folder / "cat" / "gone.jpg").symlink_to(folder / "none.jpg")
    assert len(find_images(folder)) == 5


def test_a_hidden_folder_that_is_named_itself_is_read(tmp_path):
    draw(tmp_path / ".cache" / "1.jpg")
    assert len(find_images(tmp_path / ".cache")) == 1


def test_commands_and_sources_find_the_same_images(folder, tmp_path):
    found = find_images(folder)
    assert list_images([folder]) == found
    assert [sample.images[0] for sample in load_source({"type": "image_folder", "path": str(folder)})] == found


def test_a_folder_without_images_is_an_error(tmp_path):
    draw(tmp_path / ".git" / "1.jpg")
    with pytest.raises(DataError, match="got no image"):
        find_images(tmp_path)


def test_tars_in_hidden_folders_are_not_read(tmp_path):
    from frozenprefix.data.sources.selection import files_of

    for name in ("a/0.tar", ".trash/1.tar", "__MACOSX/2.tar"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert [path.name for path in files_of(tmp_path, "**/*.tar")] == ["0.tar"]
    assert [path.name for path in walk_files(tmp_path)] == ["0.tar"]
