"""JSON lines: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import pytest

from frozenprefix.errors import DataError
from frozenprefix.utils import append_jsonl, read_jsonl, write_jsonl

ROWS = [{"text": "a\u2028b\u0085c\x0bd\r"}, {"image": "caf\udce9.jpg"}, [1, None]]


def test_every_text_comes_back(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert [row for _, row in read_jsonl(tmp_path / "a.jsonl")] == ROWS


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf1\r\n\r\n  \n2")
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, 1), (4, 2)]


@pytest.mark.parametrize(("line", "reason"), [(b"{", "not JSON"), (b'"\xe9"', "not UTF-8 text")])
def test_a_damaged_line_is_named_or_skipped(tmp_path, caplog, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + line + b"\n3\n")
    with pytest.raises(DataError, match=f"a.jsonl:2: {reason}"):
        list(read_jsonl(path))
    with caplog.at_level("INFO"):
        assert list(read_jsonl(path, skip_damaged=True)) == [(1, 1), (3, 3)]
    assert "1 of 3 lines are left out: unfinished 1" in caplog.text


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_lines_are_added_behind_an_unfinished_one(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [1])
    path.write_bytes(path.read_bytes() + b'{"unfin')
    append_jsonl(path, [2, 3])
    assert [row for _, row in read_jsonl(path, skip_damaged=True)] == [1, 2, 3]


def test_a_failing_iterator_keeps_the_old_file(tmp_path):
    def rows():
        yield 1
        raise RuntimeError

    write_jsonl(tmp_path / "a.jsonl", [0])
    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert [row for _, row in read_jsonl(tmp_path / "a.jsonl")] == [0]
