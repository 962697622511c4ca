"""Output files never replace what somebody else wrote."""

from __future__ import annotations

import json

import pytest

from frozenprefix.errors import DataError
from frozenprefix.utils import append_jsonl, check_output, check_run_folder, write_jsonl, write_text_atomic

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


def test_links_to_files_of_others_are_refused(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"image": "1.jpg", "captions": ["a dog"]}])
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "data.jsonl")
    for name in ("link.jsonl", "hard.jsonl", "../" + tmp_path.name + "/data.jsonl"):
        with pytest.raises(DataError, match="exists and was not written by this command"):
            check_output(tmp_path / name, OWN)


def test_every_row_must_be_the_commands_own(tmp_path):
    own, other = {"image": "1.jpg", "caption": "a dog", "score": 1.0}, {"image": "1.jpg", "captions": ["by hand"]}
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [own, other])
    with pytest.raises(DataError, match=r"a\.jsonl' exists"):
        check_output(path, OWN)
    path.write_text(json.dumps(own) + '\n{"image": "2.jpg", "capt')
    check_output(path, OWN)  # as a killed command leaves it
    path.write_text(json.dumps(own) + '\n{"image": "2.jpg", "capt\n' + json.dumps(own) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl' exists"):
        check_output(path, OWN)


def test_rows_with_more_keys_are_of_others_where_the_command_writes_no_more(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"image": "1.jpg", "caption": "a dog", "score": 1.0, "split": "train"}])
    check_output(tmp_path / "a.jsonl", OWN)
    with pytest.raises(DataError, match=r"a\.jsonl' exists"):
        check_output(tmp_path / "a.jsonl", OWN, exact=True)


def test_rows_can_be_written_to_a_pipe(tmp_path):
    import os
    from threading import Thread

    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    append_jsonl(tmp_path / "pipe", [{"a": 1}])
    reader.join(10)
    assert read == ['{"a": 1}\n']


@pytest.mark.parametrize("name", ["best", "last"])
def test_folders_of_others_are_not_taken_for_checkpoints(tmp_path, name):
    (tmp_path / name).mkdir()
    check_run_folder(tmp_path)
    (tmp_path / name / "photo.jpg").touch()
    with pytest.raises(DataError, match=f"output_dir: '.*{name}' exists and is no checkpoint"):
        check_run_folder(tmp_path)
    (tmp_path / name / "config.json").touch()
    check_run_folder(tmp_path)


@pytest.mark.parametrize("name", ["log.jsonl", "bad_images.jsonl"])
def test_logs_of_others_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("monday: rain\n")
    with pytest.raises(DataError, match=f"output_dir: '.*{name}' exists and was not written"):
        check_run_folder(tmp_path)


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(DataError, match=r"output_dir: .*run' is a file and no folder"):
        check_run_folder(tmp_path / "run")
