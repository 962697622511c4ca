"""Hashes of contents, files and folders, remembered between runs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from frozenprefix.errors import AssetError
from frozenprefix.utils import content_hash, file_sha256, hashing, tree_sha256


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashing, "_hashes", {})
    return tmp_path / "home"


class TestHashes:
    ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1

    @pytest.fixture
    def big(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file that is large enough to be remembered."""
        monkeypatch.setattr(hashing, "_SMALLEST_FILE_TO_REMEMBER", 3)
        path = tmp_path / "abc"
        path.write_bytes(b"abc")
        return path

    def count_reads(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        reads: list[Path] = []
        original = hashing.hash_file
        monkeypatch.setattr(hashing, "hash_file", lambda path: reads.append(path) or original(path))
        return reads

    def test_value_and_memory(self, big: Path, monkeypatch: pytest.MonkeyPatch):
        reads = self.count_reads(monkeypatch)
        assert file_sha256(big) == file_sha256(big) == self.ABC
        assert len(reads) == 1

    def test_remembered_by_the_next_process(self, big: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
        file_sha256(big)
        state = big.stat()
        stored = json.loads((home / "hashes.json").read_text())
        assert stored == {str(big.resolve()): [state.st_size, state.st_mtime_ns, state.st_ctime_ns, self.ABC]}
        hashing._hashes.clear()
        reads = self.count_reads(monkeypatch)
        assert file_sha256(big) == self.ABC
        assert reads == []

    @pytest.mark.parametrize("content", [b"abd", b"abcd"])
    def test_changed_file_is_hashed_again(self, big: Path, content: bytes):
        file_sha256(big)
        before = big.stat().st_mtime_ns
        big.write_bytes(content)
        os.utime(big, ns=(before + 1, before + 1))
        assert file_sha256(big) == hashlib.sha256(content).hexdigest()

    def test_replaced_file_of_the_same_size_and_time_is_hashed_again(self, big: Path):
        file_sha256(big)
        before = big.stat().st_mtime_ns
        big.write_bytes(b"abd")
        os.utime(big, ns=(before, before))
        assert file_sha256(big) == hashlib.sha256(b"abd").hexdigest()

    @pytest.mark.parametrize("content", ["{", "[]", '{"%s": [3, 4]}', '{"%s": 5}'])
    def test_damaged_file_of_hashes(self, big: Path, home: Path, content: str):
        home.mkdir()
        (home / "hashes.json").write_text(content.replace("%s", str(big)))
        assert file_sha256(big) == self.ABC
        assert json.loads((home / "hashes.json").read_text())[str(big.resolve())][3] == self.ABC

    def test_cache_that_cannot_be_written(self, big: Path, home: Path, caplog: pytest.LogCaptureFixture):
        home.write_bytes(b"a file where the folder should be")
        assert file_sha256(big) == self.ABC
        assert "could not be remembered" in caplog.text

    def test_small_file_is_not_remembered_on_disk(self, tmp_path: Path, home: Path):
        (tmp_path / "abc").write_bytes(b"abc")
        assert file_sha256(tmp_path / "abc") == self.ABC
        assert not home.exists()

    def test_not_a_file(self, tmp_path: Path):
        with pytest.raises(AssetError, match="it is not a file"):
            file_sha256(tmp_path)

    def test_tree(self, tmp_path: Path):
        tree = tmp_path / "model"
        (tree / "sub").mkdir(parents=True)
        (tree / "b.json").write_bytes(b"abc")
        (tree / "sub" / "a.json").write_bytes(b"abc")
        (tree / "README").write_bytes(b"1")
        expected = hashlib.sha256(f"b.json\0{self.ABC}\nsub/a.json\0{self.ABC}\n".encode()).hexdigest()
        assert tree_sha256(tree, ["**/*.json"]) == expected
        assert tree_sha256(tree, ["sub/*.json", "b*", "*.json"]) == expected
        (tree / "README").write_bytes(b"2")
        assert tree_sha256(tree, ["**/*.json"]) == expected
        (tree / "b.json").rename(tree / "c.json")
        assert tree_sha256(tree, ["**/*.json"]) != expected

    def test_tree_without_a_match(self, tmp_path: Path):
        with pytest.raises(AssetError, match=r"no file in .* matches any of \['\*\.safetensors'\]"):
            tree_sha256(tmp_path, ["*.safetensors"])

    def test_contents(self):
        assert content_hash("abc") == content_hash(b"abc") == self.ABC
        assert content_hash("a", "bc") != content_hash("ab", "c") != content_hash("abc")
