"""The installed releases are those that this package is tested with."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement

# libraries whose interfaces move; each has a lower and an upper bound
BOUNDED = ("torch", "torchvision", "transformers", "peft", "accelerate", "open_clip_torch", "timm")


def requirements() -> dict[str, Requirement]:
    """What `pip install frozenprefix` asks for, without the extras."""
    parsed = map(Requirement, metadata.requires("frozenprefix") or [])
    return {one.name: one for one in parsed if one.marker is None}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_library_has_both_bounds(name):
    assert {one.operator for one in requirements()[name].specifier} == {">=", "<"}


@pytest.mark.parametrize("name", BOUNDED)
def test_the_installed_release_is_a_tested_one(name):
    required, installed = requirements()[name].specifier, metadata.version(name)
    assert installed in required, (
        f"{name} {installed} is not among the releases that this package is tested with ({required}): install one of "
        "those, or make the tests pass with it and move the bound in pyproject.toml"
    )
