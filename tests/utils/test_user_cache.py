"""The user's cache folder."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from frozenprefix.errors import AssetError
from frozenprefix.utils import build_once, hashing, user_cache


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashing, "_hashes", {})
    return tmp_path / "home"


class TestCache:
    def test_place(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path):
        assert user_cache() == home
        monkeypatch.delenv("FROZENPREFIX_HOME")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert user_cache() == tmp_path / "xdg" / "frozenprefix"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert user_cache() == Path("~/.cache/frozenprefix").expanduser()

    def test_build_that_fails_keeps_nothing(self, tmp_path: Path):
        def build(folder: Path) -> None:
            (folder / "half").write_bytes(b"x")
            raise ValueError("out of luck")

        with pytest.raises(ValueError, match="out of luck"):
            build_once(tmp_path / "cache" / "thing", build)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_two_builders_at_once(self, tmp_path: Path):
        both_are_building = threading.Barrier(2, timeout=10)
        done: list[Path] = []

        def build(folder: Path) -> None:
            both_are_building.wait()
            (folder / "file").write_text("whole")

        threads = [
            threading.Thread(target=lambda: done.append(build_once(tmp_path / "c" / "thing", build))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == [tmp_path / "c" / "thing"] * 2
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["thing"]
        assert (tmp_path / "c" / "thing" / "file").read_text() == "whole"

    def test_cache_that_is_not_writable(self, tmp_path: Path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(AssetError, match="set FROZENPREFIX_HOME"):
            build_once(tmp_path / "file" / "thing", lambda folder: None)
