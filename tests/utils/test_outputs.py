"""Output files never replace what somebody else wrote."""

from __future__ import annotations

import json

import pytest

from frozenprefix.errors import DataError
from frozenprefix.utils import check_output, write_jsonl, write_text_atomic

OWN = {"image", "caption", "score"}


@pytest.mark.parametrize(
    "content",
    [
        '{"image": "1.jpg", "captions": ["a dog"]}\n',
        "a list of things to do\n",
        "[1, 2]\n",
        '{"image": "1.jpg", "caption": "cut off',
        "\x00\x01",
    ],
)
def test_files_of_others_are_refused_without_force(tmp_path, content):
    path = tmp_path / "captions.jsonl"
    path.write_text(content)
    with pytest.raises(
        DataError, match=r"--out: '.*captions.jsonl' exists and was not written by this command; .*--force"
    ):
        check_output(path, OWN)
    check_output(path, OWN, force=True)
    assert path.read_text() == content, "only checked"


def test_own_files_new_files_and_empty_ones_may_be_written(tmp_path):
    write_jsonl(tmp_path / "own.jsonl", [{"image": "1.jpg", "caption": "a dog", "score": None}])
    write_text_atomic(tmp_path / "own.json", json.dumps({"task": "caption", "metrics": {}, "more": 1}, indent=2))
    (tmp_path / "empty").touch()
    check_output(tmp_path / "own.jsonl", OWN)
    check_output(tmp_path / "own.json", {"task", "metrics"})
    check_output(tmp_path / "empty", OWN)
    check_output(tmp_path / "new.jsonl", OWN)
    check_output("/dev/null", OWN)
    with pytest.raises(DataError, match=r"own\.json' exists"):
        check_output(tmp_path / "own.json", OWN)


def test_a_folder_is_no_output(tmp_path):
    with pytest.raises(DataError, match=r"--predictions: got the folder '.*', expected a file to write to"):
        check_output(tmp_path, OWN, force=True, option="--predictions")
