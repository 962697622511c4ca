"""Pytest plugin: the names that examples in docstrings may use without defining them.

A value is built when the first example names it, so that a module without examples builds no model. `model`,
`captioner` and `recipe` are fresh for every docstring; the files are shared, and are not to be written to.
"""

from __future__ import annotations

import copy
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.drawings import write_shapes
from tests.helpers.lm import save_tiny_lm
from tests.helpers.recipes import tiny_recipe_dict


class SharedValues:
    """Files and models that are built once for all examples."""

    def __init__(self, folder: Path):
        self._folder = folder

    @cached_property
    def lm_folder(self) -> Path:
        """A tiny LLaMA and its tokenizer."""
        return save_tiny_lm(self._folder / "lm", "llama", sharpness=6.0)

    @cached_property
    def data_folder(self) -> Path:
        """12 drawings with captions.jsonl and qa.jsonl."""
        return write_shapes(self._folder / "data")

    @cached_property
    def checkpoint(self) -> Path:
        """A checkpoint of `lm_folder`, a tiny ViT at 32 pixels, and an MLP of prefix length 2."""
        from frozenprefix.config import recipe_from_dict
        from frozenprefix.training.setup import build_model

        folder = self._folder / "checkpoint"
        model, processor = build_model(recipe_from_dict(tiny_recipe_dict(self.lm_folder, self.data_folder, folder)))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    @cached_property
    def model(self) -> Any:
        from frozenprefix import FrozenPrefixForConditionalGeneration

        return FrozenPrefixForConditionalGeneration.from_pretrained(self.checkpoint).eval()

    @cached_property
    def processor(self) -> Any:
        from frozenprefix import FrozenPrefixProcessor

        return FrozenPrefixProcessor.from_pretrained(self.checkpoint)


class ExampleNames:
    """The values for one docstring; `NAMES` lists them."""

    NAMES = (
        *("checkpoint", "model", "processor", "captioner", "image", "image_path", "images_folder", "data_folder"),
        *("lm_folder", "recipe", "recipe_path", "tmp_path", "torch", "np"),
    )

    def __init__(self, shared: SharedValues, tmp_path: Path):
        self._shared = shared
        self.tmp_path = tmp_path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    @cached_property
    def model(self) -> Any:
        return copy.deepcopy(self._shared.model)

    @property
    def captioner(self) -> Any:
        from frozenprefix import Captioner

        return Captioner(self.model, self.processor)

    @property
    def images_folder(self) -> Path:
        return self.data_folder / "images"

    @property
    def image_path(self) -> Path:
        return self.images_folder / "red_circle.png"

    @property
    def image(self) -> Any:
        from PIL import Image

        return Image.open(self.image_path)

    @cached_property
    def _recipe_dict(self) -> dict[str, Any]:
        return tiny_recipe_dict(self.lm_folder, self.data_folder, self.tmp_path / "run")

    @property
    def recipe(self) -> Any:
        from frozenprefix.config import recipe_from_dict

        return recipe_from_dict(self._recipe_dict)

    @property
    def recipe_path(self) -> Path:
        import json

        path = self.tmp_path / "recipe.yaml"
        path.write_text(json.dumps(self._recipe_dict, indent=2))  # JSON is YAML
        return path

    @property
    def torch(self) -> Any:
        import torch

        return torch

    @property
    def np(self) -> Any:
        import numpy

        return numpy


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Fast tests never read or write the user's cache of features and converted models."""
    if "FROZENPREFIX_HOME" not in os.environ:
        os.environ["FROZENPREFIX_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def shared_values(tmp_path_factory) -> SharedValues:
    return SharedValues(tmp_path_factory.mktemp("examples"))


@pytest.fixture(autouse=True)
def example_names(request: pytest.FixtureRequest) -> None:
    """Puts the names that a docstring's examples use into its globals."""
    doctest = getattr(request.node, "dtest", None)
    if doctest is None:
        return  # a test, not an example
    import torch

    words = {word for example in doctest.examples for word in re.findall(r"\w+", example.source)}
    names = ExampleNames(request.getfixturevalue("shared_values"), request.getfixturevalue("tmp_path"))
    doctest.globs.update({name: getattr(names, name) for name in ExampleNames.NAMES if name in words})
    torch.manual_seed(0)
