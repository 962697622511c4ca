"""References and wheels; all offline, with wheels made on the spot."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from frozenprefix import assets
from frozenprefix.assets import wheels
from frozenprefix.errors import AssetError
from frozenprefix.utils import hashing

MEMBERS = {"toy_data/data/questions.json": b"[1, 2]", "toy_data/data/images/0.png": b"png", "toy_data/__init__.py": b""}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of the test's own and, unless the test is marked `network`, a pip that never reaches the network."""
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashing, "_hashes", {})
    if request.node.get_closest_marker("network"):
        return tmp_path / "home"
    monkeypatch.delenv("FROZENPREFIX_WHEELS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "home"


def make_wheel(folder: Path, members: dict[str, bytes] | None = None, name: str = "toy_data-1.0") -> tuple[Path, str]:
    """Write a wheel that pip accepts. Returns its path and its SHA-256."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-py3-none-any.whl"
    project, version = name.split("-")
    info = f"{name}.dist-info"
    files = dict(MEMBERS if members is None else members)
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        lines = [
            f"{m},sha256={base64.urlsafe_b64encode(hashlib.sha256(c).digest()).decode()}," for m, c in files.items()
        ]
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of a wheel `toy-data==1.0` that lies in the user's folder of wheels."""
    path, sha256 = make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("FROZENPREFIX_WHEELS", str(path.parent))
    return sha256


def leftovers(home: Path) -> list[str]:
    return [path.name for path in home.rglob(".*")]


class TestLocal:
    def test_file_folder_and_base(self, tmp_path: Path):
        (tmp_path / "a.bin").write_bytes(b"x")
        assert assets.resolve(str(tmp_path / "a.bin")) == tmp_path / "a.bin"
        assert assets.resolve("a.bin", base=tmp_path) == tmp_path / "a.bin"
        assert assets.resolve(str(tmp_path), base=Path("/elsewhere")) == tmp_path

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "a.bin").write_bytes(b"x")
        assert assets.resolve("~/a.bin", base=Path("/elsewhere")) == tmp_path / "a.bin"

    def test_missing_path_names_the_place_and_the_nearest_name(self, tmp_path: Path):
        (tmp_path / "weights.bin").write_bytes(b"x")
        with pytest.raises(AssetError, match=r"'wieghts\.bin' is neither .*did you mean 'weights\.bin'") as caught:
            assets.resolve("wieghts.bin", base=tmp_path)
        assert str(tmp_path / "wieghts.bin") in str(caught.value)

    def test_empty_reference_is_not_the_working_directory(self):
        with pytest.raises(AssetError, match="got ''"):
            assets.resolve("")

    def test_is_pypi(self):
        assert assets.is_pypi("pypi://a==1/b")
        assert not assets.is_pypi("a==1/b")


class TestReference:
    @pytest.mark.parametrize(
        "reference",
        [
            "pypi://toy-data/x",
            "pypi://toy-data==1.0",
            "pypi://toy-data==1.0/",
            "pypi://-r==1.0/x",
            "pypi://toy==1.0/x#1",
        ],
    )
    def test_malformed(self, reference: str):
        with pytest.raises(AssetError, match="reference must read pypi://NAME==VERSION/PATH"):
            assets.resolve(reference)

    @pytest.mark.parametrize("member", ["../x", "a/../../x", "/etc/passwd", "C:/x", "a\\..\\x"])
    def test_path_that_leaves_the_wheel(self, member: str):
        with pytest.raises(AssetError, match="PATH must stay inside the wheel"):
            assets.resolve(f"pypi://easy-vqa==1.0/{member}")

    def test_without_a_pin(self):
        with pytest.raises(AssetError, match=r"no SHA-256 is known .* pypi://toy-data==1\.0/x#sha256=HEX"):
            assets.resolve("pypi://toy-data==1.0/x")

    def test_known_wheels_are_well_formed(self):
        for key, pin in assets.KNOWN_WHEELS.items():
            name, _, version = key.partition("==")
            assert name == wheels.normalise(name)
            assert version
            assert len(bytes.fromhex(pin)) == 32


class TestWheel:
    def test_file_and_folder(self, toy: str, home: Path):
        path = assets.resolve(f"pypi://toy-data==1.0/toy_data/data/questions.json#sha256={toy}")
        assert path == home / "wheels" / f"toy-data-1.0-{toy[:12]}" / "toy_data/data/questions.json"
        assert path.read_bytes() == b"[1, 2]"
        folder = assets.resolve(f"pypi://Toy_Data==1.0/toy_data/data/#sha256={toy.upper()}")
        assert folder == path.parent
        assert (folder / "images/0.png").read_bytes() == b"png"
        assert leftovers(home) == []

    def test_pin_from_the_table(self, toy: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(assets.KNOWN_WHEELS, "toy-data==1.0", toy)
        assert assets.resolve("pypi://toy-data==1.0/toy_data/data").is_dir()

    def test_unpacked_once_and_then_without_the_wheel(self, toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        reference = f"pypi://toy-data==1.0/toy_data/__init__.py#sha256={toy}"
        first = assets.resolve(reference)
        monkeypatch.setenv("FROZENPREFIX_WHEELS", str(tmp_path / "gone"))
        assert assets.resolve(reference) == first

    def test_missing_member_gets_the_nearest_name(self, toy: str):
        with pytest.raises(AssetError, match=r"not in the wheel \(did you mean 'toy_data/data/questions\.json'\?\)"):
            assets.resolve(f"pypi://toy-data==1.0/toy_data/data/question.json#sha256={toy}")

    def test_wrong_hash_names_both_and_keeps_nothing(self, toy: str, home: Path):
        with pytest.raises(AssetError, match="another SHA-256") as caught:
            assets.resolve(f"pypi://toy-data==1.0/toy_data/data#sha256={'0' * 64}")
        assert toy in str(caught.value)
        assert "0" * 64 in str(caught.value)
        assert list((home / "wheels").iterdir()) == []

    def test_of_several_builds_the_pinned_one_is_taken(self, toy: str, tmp_path: Path):
        other = tmp_path / "wheels" / "toy_data-1.0-1-py3-none-any.whl"
        other.write_bytes(b"another build")
        assert assets.resolve(f"pypi://toy-data==1.0/toy_data/data#sha256={toy}").is_dir()

    @pytest.mark.parametrize("member", ["../evil", "a/../../evil", "/evil", "C:/evil", "..\\evil"])
    def test_unsafe_member_is_refused(self, member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
        path, sha256 = make_wheel(tmp_path / "wheels", {"fine": b"1", member: b"2"})
        monkeypatch.setenv("FROZENPREFIX_WHEELS", str(path.parent))
        with pytest.raises(AssetError, match="leaves the wheel's own folder"):
            assets.resolve(f"pypi://toy-data==1.0/fine#sha256={sha256}")
        assert list((home / "wheels").iterdir()) == []
        assert list(tmp_path.rglob("evil")) == []

    def test_symbolic_link_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path, _ = make_wheel(tmp_path / "wheels")
        link = zipfile.ZipInfo("toy_data/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(link, "/etc/passwd")
        monkeypatch.setenv("FROZENPREFIX_WHEELS", str(path.parent))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(AssetError, match="'toy_data/link' leaves"):
            assets.resolve(f"pypi://toy-data==1.0/toy_data/link#sha256={sha256}")

    def test_not_a_zip(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "toy_data-1.0-py3-none-any.whl").write_bytes(b"<html>")
        monkeypatch.setenv("FROZENPREFIX_WHEELS", str(tmp_path))
        with pytest.raises(AssetError, match="not a wheel that can be unpacked"):
            assets.resolve(f"pypi://toy-data==1.0/x#sha256={hashlib.sha256(b'<html>').hexdigest()}")

    def test_wheels_folder_that_is_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv("FROZENPREFIX_WHEELS", str(tmp_path / "gone"))
        with pytest.raises(AssetError, match="FROZENPREFIX_WHEELS must name a folder"):
            assets.resolve(f"pypi://toy-data==1.0/x#sha256={'0' * 64}")


class TestPip:
    def test_fetched_with_pip_and_its_configuration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
        path, sha256 = make_wheel(tmp_path / "index")
        monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
        found = assets.resolve(f"pypi://toy-data==1.0/toy_data/data/images/0.png#sha256={sha256}")
        assert found.read_bytes() == b"png"
        assert leftovers(home) == []

    def test_failure_gives_pips_reason_and_the_fix(self, home: Path):
        with pytest.raises(AssetError, match=r"No matching distribution found for toy-data==1\.0\. Check") as caught:
            assets.resolve(f"pypi://toy-data==1.0/x#sha256={'0' * 64}")
        assert "set FROZENPREFIX_WHEELS" in str(caught.value)
        assert list((home / "wheels").iterdir()) == []

    @pytest.mark.parametrize(
        ("output", "reason"),
        [
            ("WARNING: w\nERROR: first\nERROR: the cause\n[notice] new pip\n", "the cause"),
            ("/venv/bin/python: No module named pip\n", "/venv/bin/python: No module named pip"),
            ("", "no reason given"),
        ],
    )
    def test_reason(self, output: str, reason: str):
        assert wheels._reason(output) == reason


class TestProcesses:
    def test_processes_at_once(self, toy: str, home: Path):
        reference = f"pypi://toy-data==1.0/toy_data/data/questions.json#sha256={toy}"
        code = f"from frozenprefix.assets import resolve; print(resolve({reference!r}).read_text())"
        running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
        assert [process.communicate(timeout=300)[0] for process in running] == ["[1, 2]\n"] * 3
        assert leftovers(home) == []

    def test_needs_no_heavy_library(self):
        code = (
            "import sys; sys.argv[0] = 'frozenprefix'; "  # the command, where `import frozenprefix` registers nothing
            "import frozenprefix.assets; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.slow
@pytest.mark.network
def test_easy_vqa_from_the_registry():
    folder = assets.resolve("pypi://easy-vqa==1.0/easy_vqa/data")
    assert len(list(folder.glob("*/images/*.png"))) == 5000
    assert json.loads((folder / "test/questions.json").read_text())[0][:2] == ["what is the red shape?", "triangle"]
