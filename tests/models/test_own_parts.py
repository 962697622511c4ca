"""Mappers, fusions and encoders of the user's own: by entry point, or by `package.module:Class` when it is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from frozenprefix import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor, Recipe, allow_code
from frozenprefix.cli.main import app
from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import FusionConfig, MapperConfig
from frozenprefix.models.encoder_configuration import vision_encoder_config
from frozenprefix.models.fusion import validate_fusion
from frozenprefix.models.mappers import MAPPERS, build_mapper, validate_mapper
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.training.setup import build_model
from tests.helpers.recipes import tiny_recipe_dict

CODE = '''
from torch import nn
from frozenprefix.models.fusion import Fusion
from frozenprefix.models.vision import BuiltEncoder, FrozenPrefixImageProcessor, VisionEncoder


class Mean(nn.Module):
    """The mean of the image tokens, for every place of the prefix."""

    def __init__(self, *, encoder_dim, num_tokens, lm_dim, prefix_length, scale: float = 1.0):
        super().__init__()
        self.scale, self.length = scale, prefix_length
        self.project = nn.Linear(encoder_dim, lm_dim)

    def forward(self, image_features):
        pooled = self.project(image_features.mean(dim=1, keepdim=True)) * self.scale
        return pooled.expand(-1, self.length, -1)


class Without(nn.Module):
    def __init__(self, *, encoder_dim, lm_dim):
        super().__init__()


class Plain(Fusion):
    def __init__(self, *, lm_dim, num_layers):
        super().__init__()


class Patches(VisionEncoder):
    def __init__(self, width):
        super().__init__(name="patches", layers=[-1], image_size=32)
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.measure()

    def maps(self, pixel_values):
        return [self.patches(pixel_values)]

    def pool(self, pixel_values):
        raise NotImplementedError


def build_patches(config):
    side = {"height": 32, "width": 32}
    processor = FrozenPrefixImageProcessor(size=side, crop_size=side)
    return BuiltEncoder(Patches(**config.options), processor, {"source": "mine", "width": str(config.options["width"])})
'''
POINTS = """[frozenprefix.mappers]
mean_of_mine = parts_of_mine:Mean
[frozenprefix.fusions]
plain_of_mine = parts_of_mine:Plain
[frozenprefix.vision_encoders]
patches_of_mine = parts_of_mine:build_patches
"""
SHAPES = {"encoder_dim": 6, "num_tokens": 4, "lm_dim": 8, "embedding_rms": 0.1}


@pytest.fixture(autouse=True)
def forbidden(monkeypatch):
    """`allow_code` sets this variable; it is put back after each test."""
    monkeypatch.setenv("FROZENPREFIX_ALLOW_CODE", "0")


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """A module that can be imported, in a folder of its own."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "parts_of_mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(site)
    yield site
    import sys

    sys.modules.pop("parts_of_mine", None)


@pytest.fixture
def distribution(module) -> Path:
    """The module as an installed distribution with entry points."""
    info = module / "parts_of_mine-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parts-of-mine\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(POINTS)
    return module


def test_an_entry_point_is_a_mapper_like_others(distribution):
    mapper = build_mapper(MapperConfig(type="mean_of_mine", prefix_length=3, scale=2.0), **SHAPES)
    assert mapper(torch.ones(2, 4, 6)).shape == (2, 3, 8)
    assert mapper.body.scale == 2.0
    assert "mean_of_mine" in MAPPERS.names()
    assert validate_mapper(MapperConfig(type="mean_of_mine", scale="big", sale=1)) == [
        "model.mapper.sale: mapper 'mean_of_mine' has no such option (did you mean 'scale'?); it has: scale",
        "model.mapper.scale: Input should be a valid number, got 'big'",
    ]


def test_a_near_name_of_an_entry_point_is_hinted_at(distribution):
    (problem,) = validate_mapper(MapperConfig(type="mean_of_mien"))
    assert "unknown mapper 'mean_of_mien' (did you mean 'mean_of_mine'?)" in problem


def test_a_class_is_imported_only_when_that_is_allowed(module):
    config = MapperConfig(type="parts_of_mine:Mean", prefix_length=3)
    (problem,) = validate_mapper(config)
    assert problem.startswith("model.mapper.type: mapper 'parts_of_mine:Mean' is code from outside this package")
    assert "--allow-code, FROZENPREFIX_ALLOW_CODE=1 or frozenprefix.allow_code()" in problem
    allow_code()
    assert validate_mapper(config) == []
    assert build_mapper(config, **SHAPES)(torch.ones(2, 4, 6)).shape == (2, 3, 8)
    allow_code(False)
    assert validate_mapper(config) == [problem]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_module_of_mine:Mean", "cannot be imported (No module named 'no_module_of_mine'); install its package"),
        ("parts_of_mine:Median", "cannot be imported (module 'parts_of_mine' has no attribute 'Median')"),
        ("parts_of_mine:build_patches", "expected a subclass of Module"),
        ("parts_of_mine:Without", "lacks the argument num_tokens, prefix_length"),
    ],
)
def test_what_is_no_mapper_is_refused_in_one_line(module, reference, message):
    allow_code()
    (problem,) = validate_mapper(MapperConfig(type=reference))
    assert message in problem
    assert "\n" not in problem


def test_fusions(distribution):
    assert validate_fusion(FusionConfig(type="plain_of_mine")) == []
    assert "is code from outside" in validate_fusion(FusionConfig(type="parts_of_mine:Plain"))[0]
    allow_code()
    assert validate_fusion(FusionConfig(type="parts_of_mine:Plain")) == []
    assert "expected a subclass of Fusion" in validate_fusion(FusionConfig(type="parts_of_mine:Mean"))[0]


@pytest.mark.parametrize("source", ["patches_of_mine", "parts_of_mine:build_patches"])
def test_vision_encoders(distribution, source):
    config = vision_encoder_config(source=source, width=6)
    if ":" in source:
        with pytest.raises(ConfigError, match=r"build_patches' is code from outside"):
            build_vision_encoder(config)
        allow_code()
    built = build_vision_encoder(config)
    assert built.module(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 6)


def test_a_checkpoint_works_in_commands_when_its_code_is_allowed(module, tiny_lm, shapes, tmp_path):
    allow_code()
    recipe = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")
    recipe["model"] |= {
        "mapper": {"type": "parts_of_mine:Mean", "prefix_length": 2},
        "fusion": {"type": "parts_of_mine:Plain"},
        "vision_encoder": {"source": "parts_of_mine:build_patches", "width": 6},
    }
    model, processor = build_model(Recipe.model_validate(recipe))
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    assert json.loads((checkpoint / "config.json").read_text())["mapper"]["type"] == "parts_of_mine:Mean"
    again = FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)
    assert torch.equal(again.mapper.body.project.weight, model.mapper.body.project.weight)
    assert FrozenPrefixProcessor.from_pretrained(checkpoint)

    allow_code(False)
    image = next((shapes / "images").iterdir())
    arguments = ["caption", str(checkpoint), str(image), "--beams", "1", "--max-new-tokens", "2"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "is code from outside this package" in refused.output
    assert len(refused.output.strip().splitlines()) == 1
    allowed = CliRunner().invoke(app, [*arguments, "--allow-code"])
    assert allowed.exit_code == 0, allowed.output
    assert image.name in allowed.output
