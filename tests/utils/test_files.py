"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress

import pytest

from frozenprefix.errors import DataError
from frozenprefix.utils import atomic_file, atomic_folder, build_once, read_text, safe_file_name, write_text_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text_atomic(path, "old")
    with suppress(RuntimeError), atomic_file(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_keeps_pointing_to_the_file_that_is_written(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text_atomic(tmp_path / "link.txt", "new")
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "link.txt").is_symlink()


def test_devices_are_written_to_and_not_replaced():
    write_text_atomic("/dev/null", "x")
    assert not os.path.isfile("/dev/null")


def test_line_ends_and_lone_surrogates_come_back(tmp_path):
    write_text_atomic(tmp_path / "a.json", json.dumps("a\u2028\r\nb\udce9", ensure_ascii=False))
    assert json.loads(read_text(tmp_path / "a.json")) == "a\u2028\r\nb\udce9"


def test_reading_says_what_is_wrong(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(DataError, match="No such file"):
        read_text(tmp_path / "none.txt")


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    for content in ("1", "2"):
        with atomic_folder(tmp_path / "last") as draft:
            (draft / "a.txt").write_text(content)
    with suppress(RuntimeError), atomic_folder(tmp_path / "last") as draft:
        (draft / "a.txt").write_text("3")
        raise RuntimeError
    assert (tmp_path / "last" / "a.txt").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_folder_whose_writer_was_killed_between_the_renames_comes_back(tmp_path):
    (tmp_path / ".last.old").mkdir()
    (tmp_path / ".last.new").mkdir()
    with atomic_folder(tmp_path / "last") as draft:
        assert (tmp_path / "last").is_dir()
        assert not list(draft.iterdir())


def test_the_first_of_two_builders_wins(tmp_path):
    def build(draft):
        (draft / "by").write_text("second")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "by").write_text("first")

    assert (build_once(tmp_path / "a", build) / "by").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("a b/c", "a-b-c"), ("..", "unnamed"), ("", "unnamed"), ("caf\udce9", "caf"), ("x" * 90, None), ("y" * 90, None)],
)
def test_file_names(text, name):
    assert name is None or safe_file_name(text) == name
    assert len(safe_file_name(text)) <= 80
    assert safe_file_name("x" * 90) != safe_file_name("x" * 91)
