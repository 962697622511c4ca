"""One source file out of several modules: what is copied, in which order, and what is refused."""

from __future__ import annotations

import ast
import sys

import pytest

from frozenprefix.errors import ConfigError
from frozenprefix.models.standalone import bundle as bundling
from frozenprefix.models.standalone.bundle import Bundle, Place

BASE = '''
"""Base."""
from math import sqrt as root
SIZE = 3
OTHER = 4  # not needed


# The comment above it.
def helper(x: int) -> float:
    """Does it.

    Example:
        >>> helper(4)
        2.0
    """
    return root(x) + SIZE


class Base:
    """A base."""

    def kept(self):
        return helper(1)

    @property
    def dropped(self):
        return OTHER
'''
USER = '''
import os.path
from frozenprefix.sample import helper as assist
from frozenprefix.sample.base import Base


class User(Base):
    """Uses it."""

    def go(self, path):
        inner = [assist(n) for n in range(2)]
        return os.path.join(path, str(inner))
'''


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A package frozenprefix.sample of three modules."""
    import frozenprefix

    folder = tmp_path / "sample"
    folder.mkdir()
    (folder / "__init__.py").write_text("from frozenprefix.sample.base import helper\n")
    (folder / "base.py").write_text(BASE)
    (folder / "user.py").write_text(USER)
    monkeypatch.setattr(frozenprefix, "__path__", [*frozenprefix.__path__, str(tmp_path)])
    yield "frozenprefix.sample"
    bundling._read.cache_clear()
    for name in [name for name in sys.modules if name.startswith("frozenprefix.sample")]:
        del sys.modules[name]


def run(bundle: Bundle) -> dict:
    names: dict = {}
    exec(compile(bundle.source(), "bundle", "exec"), names)
    return names


def test_definitions_are_copied_with_what_they_use_before_them(sample):
    bundle = Bundle(dropped={Place(f"{sample}.base", "Base"): ("dropped",)})
    bundle.add(Place(f"{sample}.base", "helper"))
    bundle.add(Place(f"{sample}.user", "User"))
    text = bundle.source()
    assert "frozenprefix" not in text
    assert "Example" not in text
    assert "OTHER" not in text
    assert "# The comment above it.\ndef helper" in text
    defined = [node.name for node in ast.parse(text).body if hasattr(node, "name")]
    assert defined == ["helper", "Base", "User"]
    assert run(bundle)["User"]().kept() == 4.0


def test_a_replacement_gets_the_name_that_is_asked_for(sample):
    place = Place(f"{sample}.base", "helper")
    replaced = Bundle(replaced={place: "def helper(x):\n    return 7"})
    replaced.add(Place(f"{sample}.base", "Base"))
    assert run(replaced)["Base"]().kept() == 7
    other = Bundle(replaced={Place(f"{sample}.user", "User"): Place(f"{sample}.base", "Base")})
    other.add(Place(f"{sample}.user", "User"))
    assert run(other)["User"]().kept() == 4.0


def test_two_definitions_of_one_name_are_refused(sample, tmp_path):
    (tmp_path / "sample" / "other.py").write_text("def helper():\n    return 1\n")
    bundle = Bundle()
    bundle.add(Place(f"{sample}.base", "helper"))
    with pytest.raises(ConfigError, match=r"two definitions of helper: in frozenprefix.sample.base, .*other"):
        bundle.add(Place(f"{sample}.other", "helper"))


def test_names_that_are_not_defined_are_refused(sample, tmp_path):
    (tmp_path / "sample" / "other.py").write_text("def helper():\n    return nowhere\n")
    with pytest.raises(ConfigError, match="helper uses 'nowhere', which the module does not define"):
        Bundle().add(Place(f"{sample}.other", "helper"))
