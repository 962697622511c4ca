"""npm references: offline, with tarballs and an `npm` made on the spot; one test reaches the registry."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from frozenprefix import assets
from frozenprefix.assets import tarballs
from frozenprefix.errors import AssetError

MEMBERS = {"package/data/list.json": b"[1, 2]", "package/img/0.png": b"png", "package/package.json": b"{}"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of the test's own and, unless the test is marked `network`, no npm."""
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    if not request.node.get_closest_marker("network"):
        monkeypatch.delenv("FROZENPREFIX_TARBALLS", raising=False)
        monkeypatch.setattr(tarballs.shutil, "which", lambda name: None)
    return tmp_path / "home"


def make_tarball(path: Path, members: dict[str, bytes] | None = None, *, link: str | None = None) -> str:
    """Write a tarball as npm's registry has them. Returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (MEMBERS if members is None else members).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo("package/link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of a package `toy-data==1.0.0` that lies in the user's folder of tarballs."""
    monkeypatch.setenv("FROZENPREFIX_TARBALLS", str(tmp_path / "tarballs"))
    return make_tarball(tmp_path / "tarballs" / "toy-data-1.0.0.tgz")


def leftovers(home: Path) -> list[str]:
    return [path.name for path in home.rglob(".*")]


# ── references ──


@pytest.mark.parametrize(
    "reference", ["npm://toy/x", "npm://toy==1", "npm://toy==1/", "npm://Toy==1/x", "npm://-r==1/x", "npm://@a==1/x"]
)
def test_malformed(reference: str):
    with pytest.raises(AssetError, match="reference must read npm://NAME==VERSION/PATH"):
        assets.resolve(reference)


@pytest.mark.parametrize("member", ["../x", "a/../../x", "/etc/passwd", "C:/x"])
def test_path_that_leaves_the_package(member: str):
    with pytest.raises(AssetError, match="PATH must stay inside the package"):
        assets.resolve(f"npm://emoji-datasource-twitter==16.0.0/{member}")


def test_without_a_pin():
    with pytest.raises(AssetError, match=r"`npm pack @a/toy@1\.0`.* npm://@a/toy==1\.0/x#sha256=HEX"):
        assets.resolve("npm://@a/toy==1.0/x")


def test_kinds_of_references():
    assert assets.is_npm("npm://a==1/b")
    assert not assets.is_npm("pypi://a==1/b")
    assert not assets.is_pypi("npm://a==1/b")


def test_known_tarballs_are_well_formed():
    for key, pin in assets.KNOWN_TARBALLS.items():
        name, _, version = key.partition("==")
        assert name == name.lower()
        assert version
        assert len(bytes.fromhex(pin)) == 32


# ── unpacking ──


def test_file_folder_and_whole_package(toy: str, home: Path):
    path = assets.resolve(f"npm://toy-data==1.0.0/data/list.json#sha256={toy}")
    assert path == home / "npm" / f"toy-data-1.0.0-{toy[:12]}" / "data/list.json"
    assert path.read_bytes() == b"[1, 2]"
    assert assets.resolve(f"npm://toy-data==1.0.0/data/#sha256={toy.upper()}") == path.parent
    whole = assets.resolve(f"npm://toy-data==1.0.0/.#sha256={toy}")
    assert (whole / "img/0.png").read_bytes() == b"png"
    assert leftovers(home) == []


def test_pin_from_the_table(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(assets.KNOWN_TARBALLS, "toy-data==1.0.0", toy)
    assert assets.resolve("npm://toy-data==1.0.0/img").is_dir()


def test_unpacked_once_and_then_without_the_tarball(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reference = f"npm://toy-data==1.0.0/package.json#sha256={toy}"
    first = assets.resolve(reference)
    monkeypatch.setenv("FROZENPREFIX_TARBALLS", str(tmp_path / "gone"))
    assert assets.resolve(reference) == first


@pytest.mark.parametrize("name", ["scope-toy-1.0.0.tgz", "toy-1.0.0.tgz"])
def test_scope(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
    """Under the name that `npm pack` gives, or the registry's. The top folder need not be called package."""
    sha256 = make_tarball(tmp_path / "tarballs" / name, {"toy/a": b"1"})
    monkeypatch.setenv("FROZENPREFIX_TARBALLS", str(tmp_path / "tarballs"))
    path = assets.resolve(f"npm://@scope/toy==1.0.0/a#sha256={sha256}")
    assert path == home / "npm" / f"scope-toy-1.0.0-{sha256[:12]}" / "a"


def test_missing_member_gets_the_nearest_name(toy: str):
    with pytest.raises(AssetError, match=r"is not in the package \(did you mean 'data/list\.json'\?\)"):
        assets.resolve(f"npm://toy-data==1.0.0/data/lists.json#sha256={toy}")


def test_wrong_hash_names_both_and_keeps_nothing(toy: str, home: Path):
    with pytest.raises(AssetError, match="another SHA-256") as caught:
        assets.resolve(f"npm://toy-data==1.0.0/data#sha256={'0' * 64}")
    assert toy in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert list((home / "npm").iterdir()) == []


@pytest.mark.parametrize("member", ["package/../../evil", "../evil", "/evil", "package/C:/evil", "package/..\\evil"])
def test_unsafe_member_is_refused(member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
    sha256 = make_tarball(tmp_path / "tarballs" / "toy-1.tgz", {"package/fine": b"1", member: b"2"})
    monkeypatch.setenv("FROZENPREFIX_TARBALLS", str(tmp_path / "tarballs"))
    with pytest.raises(AssetError, match="leaves the package's own folder"):
        assets.resolve(f"npm://toy==1/fine#sha256={sha256}")
    assert list((home / "npm").iterdir()) == []
    assert list(tmp_path.rglob("*evil")) == []


def test_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sha256 = make_tarball(tmp_path / "tarballs" / "toy-1.tgz", link="/etc/passwd")
    monkeypatch.setenv("FROZENPREFIX_TARBALLS", str(tmp_path / "tarballs"))
    with pytest.raises(AssetError, match=r"'package/link' leaves .* or is no file"):
        assets.resolve(f"npm://toy==1/link#sha256={sha256}")


def test_damaged_tarball_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
    path = tmp_path / "tarballs" / "toy-1.tgz"
    make_tarball(path, {"package/a": os.urandom(1 << 16)})
    path.write_bytes(path.read_bytes()[: -(1 << 15)])
    monkeypatch.setenv("FROZENPREFIX_TARBALLS", str(path.parent))
    with pytest.raises(AssetError, match="is not a tarball that can be unpacked"):
        assets.resolve(f"npm://toy==1/a#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}")
    assert list((home / "npm").iterdir()) == []


def test_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FROZENPREFIX_TARBALLS", str(tmp_path / "gone"))
    with pytest.raises(AssetError, match="FROZENPREFIX_TARBALLS must name a folder"):
        assets.resolve(f"npm://toy==1/x#sha256={'0' * 64}")


def test_processes_at_once(toy: str, home: Path):
    reference = f"npm://toy-data==1.0.0/data/list.json#sha256={toy}"
    code = f"from frozenprefix.assets import resolve; print(resolve({reference!r}).read_text())"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["[1, 2]\n"] * 3
    assert leftovers(home) == []


def test_threads_at_once(toy: str, home: Path):
    made: list[Path] = []
    reference = f"npm://toy-data==1.0.0/img/0.png#sha256={toy}"
    threads = [threading.Thread(target=lambda: made.append(assets.resolve(reference))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == 1
    assert len(list((home / "npm").iterdir())) == 1


# ── npm ──


def fake_npm(folder: Path, body: str) -> str:
    """A program that is called as npm would be."""
    folder.mkdir(exist_ok=True)
    path = folder / "npm"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_fetched_with_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
    sha256 = make_tarball(tmp_path / "registry" / "toy-1.0.0.tgz")
    body = (
        "import shutil\n"
        "assert sys.argv[1:5] == ['pack', 'toy@1.0.0', '--ignore-scripts', '--loglevel=error'], sys.argv\n"
        f"shutil.copy({str(tmp_path / 'registry/toy-1.0.0.tgz')!r}, sys.argv[5].partition('=')[2])"
    )
    npm = fake_npm(tmp_path / "bin", body)
    monkeypatch.setattr(tarballs.shutil, "which", lambda name: npm)
    assert assets.resolve(f"npm://toy==1.0.0/img/0.png#sha256={sha256}").read_bytes() == b"png"
    assert leftovers(home) == []


def test_failure_gives_npms_reason_and_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
    said = "npm error code E404\\nnpm error 404 Not Found - GET https://x/toy\\nnpm error A complete log of this run\\n"
    npm = fake_npm(tmp_path / "bin", f"sys.stderr.write('{said}')\nsys.exit(1)")
    monkeypatch.setattr(tarballs.shutil, "which", lambda name: npm)
    with pytest.raises(AssetError, match=r"404 Not Found - GET https://x/toy\. Check the network") as caught:
        assets.resolve(f"npm://toy==1.0.0/x#sha256={'0' * 64}")
    assert "fetch https://registry.npmjs.org/toy/-/toy-1.0.0.tgz elsewhere and set FROZENPREFIX_TARBALLS" in str(
        caught.value
    )
    assert list((home / "npm").iterdir()) == []


def test_without_npm():
    with pytest.raises(AssetError, match=r"npm, which fetches @s/toy@1\.0\.0, is not installed; .*/@s/toy/-/toy-1\.0"):
        assets.resolve(f"npm://@s/toy==1.0.0/x#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("npm ERR! code ENOTFOUND\nnpm ERR! errno -3\nnpm ERR! no host\n", "no host"),
        ("npm error code E1", "code E1"),
        ("out of luck\n", "out of luck"),
        ("", "it said nothing"),
    ],
)
def test_reason(output: str, reason: str):
    assert tarballs._reason(output) == reason


@pytest.mark.slow
@pytest.mark.network
def test_emoji_from_the_registry():
    folder = assets.resolve("npm://emoji-datasource-twitter==16.0.0/img/twitter/64")
    assert len(list(folder.glob("*.png"))) == 3786
