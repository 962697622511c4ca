"""Files of tensors, and the sums of a folder's files."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch

from frozenprefix.errors import CheckpointError, DataError
from frozenprefix.utils.sums import SUMS_FILE, check_sums, write_sums
from frozenprefix.utils.tensors import load_tensors, save_tensors


def test_tensors_read_back_and_the_file_has_the_mode_of_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "a.safetensors")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert load_tensors(tmp_path / "a.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("place", range(0, 120, 7))
def test_a_flipped_byte_is_our_error_or_another_value(tmp_path, place):
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0xFF
    path.write_bytes(data)
    with suppress(DataError):
        load_tensors(path)


def test_sums_name_the_file_that_differs(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "left_out").mkdir()
    for name in ("a", "inner/b", "left_out/c"):
        (tmp_path / name).write_text(name)
    with pytest.raises(CheckpointError, match=r"holds no sums\.json"):
        check_sums(tmp_path, required=True)
    check_sums(tmp_path)
    write_sums(tmp_path, leave_out=["left_out"])
    (tmp_path / "left_out/c").write_text("changed")
    (tmp_path / "new").write_text("new")
    check_sums(tmp_path, required=True)
    (tmp_path / "inner/b").write_text("inner/c")
    with pytest.raises(CheckpointError, match=r"inner/b has changed since it was written"):
        check_sums(tmp_path)
    (tmp_path / "inner/b").write_text("longer than before")
    with pytest.raises(CheckpointError, match=r"inner/b has 18 bytes, expected 7"):
        check_sums(tmp_path)
    (tmp_path / "inner/b").unlink()
    with pytest.raises(CheckpointError, match=r"inner/b is missing"):
        check_sums(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[1]", '{"a": 1}', '{"a": ["x", 1]}', '{"a": [1, "x"]}', "[" * 5000]
)
def test_damaged_sums_are_our_error(tmp_path, content):
    (tmp_path / SUMS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"sums\.json is damaged|a is missing"):
        check_sums(tmp_path)
