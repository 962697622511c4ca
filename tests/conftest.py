"""Tiny random models and a tokenizer made on the spot: everything here works offline and in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.drawings import COLOURS, draw_shape, write_shapes
from tests.helpers.lm import save_tiny_lm
from tests.helpers.recipes import tiny_recipe_dict

# a failed assert in a helper shows its values, as one in a test does
pytest.register_assert_rewrite("tests.helpers.training")


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """`tiny_lm("llama")` -> folder with a tiny random causal LM of that family and a tokenizer."""
    folders: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in folders:
            folders[family] = save_tiny_lm(tmp_path_factory.mktemp(family), family)
        return folders[family]

    return make


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with flickr8k/ and daquar/."""
    root = os.environ.get("FROZENPREFIX_DATA")
    if not root:
        pytest.skip("FROZENPREFIX_DATA is not set: no real photos to test on")
    return Path(root)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Folder of drawings; not to be written to. `write_shapes` makes another one."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def tiny_recipe(tiny_lm, shapes) -> Callable[..., Any]:
    """`tiny_recipe(output_dir, "training.max_steps=3", lm=…, data=…)` -> `Recipe`."""
    from frozenprefix.config import Recipe, recipe_from_dict

    def make(output_dir: Path, *overrides: str, lm: Path | None = None, data: Path | None = None) -> Recipe:
        return recipe_from_dict(tiny_recipe_dict(lm or tiny_lm("llama"), data or shapes, output_dir), overrides)

    return make


@pytest.fixture(scope="session")
def sharp_lm(tmp_path_factory) -> Path:
    """Folder of a tiny LLaMA that a prefix can move: its words depend on all before them."""
    return save_tiny_lm(tmp_path_factory.mktemp("sharp"), "llama", sharpness=6.0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_recipe, sharp_lm, tmp_path_factory) -> Path:
    """Folder of an untrained checkpoint: `sharp_lm`, tiny ViT at 32 pixels, MLP of prefix length 2."""
    from frozenprefix.training.setup import build_model

    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = build_model(tiny_recipe(folder, lm=sharp_lm))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a random BERT of three layers and a tokenizer: a text tower."""
    from tests.helpers.contrastive import save_tiny_bert

    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


# ── the models of tests/test_peft_*.py, made once for all of these files ──


@pytest.fixture(scope="session")
def lm_of(tmp_path_factory):
    """Folder of a tiny LM whose words depend on all before them."""
    folders = {}

    def make(family: str):
        if family not in folders:
            folders[family] = save_tiny_lm(tmp_path_factory.mktemp(f"sharp_{family}"), family, sharpness=6.0)
        return folders[family]

    return make


@pytest.fixture(scope="session")
def built(lm_of, tiny_recipe, tmp_path_factory):
    """A model whose adapter is trained as it were: its weights are random, and far from doing nothing."""
    from frozenprefix.training.setup import build_model
    from tests.helpers.peft import shake

    made = {}

    def make(family: str, *overrides: str, fresh: bool = False):
        key = (family, *overrides)
        if fresh or key not in made:
            recipe = tiny_recipe(tmp_path_factory.mktemp("run"), *overrides, lm=lm_of(family))
            model, processor = build_model(recipe)
            made[key] = shake(model).eval(), processor
        return made[key]

    return make


@pytest.fixture(scope="session")
def pixels():
    """Five images of noise, float32 [5, 3, 32, 32]."""
    import torch

    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint):
    """A tiny captioner that asks for three texts at once."""
    from frozenprefix.inference import Captioner

    return Captioner.from_pretrained(tiny_checkpoint, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def questions(shapes):
    """8 questions about 4 images, two different ones: model, blind LM and shuffled give 24 answers."""
    from frozenprefix.data.sources import load_source

    return load_source({"type": "qa", "path": str(shapes), "split": "val"})


@pytest.fixture
def colour_embedder():
    """An `Embedder` whose vectors are known: it sees and reads red, green and blue."""
    from frozenprefix.inference.embedding import Embedder
    from tests.helpers.retrieval import ColourModel, ColourProcessor

    return Embedder(ColourModel(), ColourProcessor(), batch_size=4)


@pytest.fixture
def colour_images(tmp_path) -> Path:
    """A folder with a square of each colour: red.png, …"""
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        draw_shape(colour, "square").save(folder / f"{colour}.png")
    return folder
