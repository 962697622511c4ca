"""Mappers, fusions, encoders and sources that are registered by a decorator, and checkpoints that name them."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
from torch import nn

import frozenprefix
from frozenprefix import (
    FrozenPrefixForConditionalGeneration,
    MapperConfig,
    build_mapper,
    register_mapper,
    register_source,
    register_vision_encoder,
)
from frozenprefix.config import load_checkpoint_recipe, recipe_from_dict
from frozenprefix.data import Sample, SourceConfig, load_source
from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.encoder_configuration import vision_encoder_config
from frozenprefix.models.mappers import MAPPERS
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.registry import undoing_registrations
from frozenprefix.training import build_model, train
from tests.helpers.recipes import tiny_recipe_dict


class Gated(nn.Module):
    """The mean of the image tokens, through a gate."""

    def __init__(self, *, encoder_dim: int, num_tokens: int, lm_dim: int, prefix_length: int, gate: float = 1.0):
        super().__init__()
        self.length, self.gate = prefix_length, gate
        self.project = nn.Linear(encoder_dim, lm_dim)

    def forward(self, image_features):
        return (self.project(image_features.mean(dim=1, keepdim=True)) * self.gate).expand(-1, self.length, -1)


class Corners(nn.Module):
    """The colours of the four quarters of an image."""

    image_size = 16

    def __init__(self, *, shape: Literal["map", "tokens", "three", "vector"] = "map", factor: float = 1.0):
        super().__init__()
        self.shape, self.factor = shape, nn.Parameter(torch.tensor(factor))

    def forward(self, pixel_values):
        quarters = nn.functional.adaptive_avg_pool2d(pixel_values, 2) * self.factor
        tokens = quarters.flatten(2).transpose(1, 2)
        shapes = {"map": quarters, "tokens": tokens, "three": tokens[:, :3], "vector": tokens.flatten(1)}
        return shapes[self.shape]


def recipe_of(lm, shapes, folder, **model):
    recipe = tiny_recipe_dict(lm, shapes, folder)
    recipe["model"] |= model
    return recipe


def test_a_registered_mapper_is_trained_saved_and_loaded(tiny_lm, shapes, tmp_path):
    register_mapper("gated")(Gated)
    mapper = {"type": "gated", "prefix_length": 2, "gate": 0.5}
    result = train(recipe_from_dict(recipe_of(tiny_lm("llama"), shapes, tmp_path / "run", mapper=mapper)))
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    assert (type(model.mapper.body), model.mapper.body.gate) == (Gated, 0.5)
    assert load_checkpoint_recipe(result.best).model.mapper.type == "gated"


def test_options_are_checked_against_the_constructor(tiny_lm, shapes, tmp_path):
    register_mapper("gated")(Gated)
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(recipe_of(tiny_lm(), shapes, tmp_path, mapper={"type": "gated", "gat": 1.0, "gate": "wide"}))
    assert caught.value.problems == [
        "model.mapper.gat: mapper 'gated' has no such option (did you mean 'gate'?); it has: gate",
        "model.mapper.gate: Input should be a valid number, got 'wide'",
    ]


def test_a_checkpoint_says_which_class_is_missing_and_imports_nothing(tiny_lm, shapes, tmp_path):
    with undoing_registrations():
        register_mapper("gated")(Gated)
        parts = recipe_of(tiny_lm("llama"), shapes, tmp_path, mapper={"type": "gated", "prefix_length": 2})
        build_model(recipe_from_dict(parts))[0].save_pretrained(tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "config.json"
    assert json.loads(config.read_text())["external_parts"]["mapper"]["class"] == f"{__name__}:Gated"
    with pytest.raises(CheckpointError) as caught:
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert str(caught.value) == (
        f"checkpoint: its mapper 'gated' ({__name__}:Gated) is not a part of frozenprefix, and is not registered in "
        "this process; import the module that registers it first, or install the package that has it as entry point of "
        "'frozenprefix.mappers'"
    )
    register_mapper("gated")(Gated)
    assert FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").mapper.body.gate == 1.0


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ("map", {}, (4, 3)),
        ("tokens", {}, (4, 3)),
        ("three", {}, (3, 3)),
        ("vector", {}, (1, 12)),
        ("map", {"grid": 1}, (1, 3)),
        ("tokens", {"output": "pooled"}, (1, 3)),
    ],
)
def test_an_encoder_may_give_maps_tokens_or_vectors(shape, options, expected):
    register_vision_encoder("corners")(Corners)
    encoder = build_vision_encoder(vision_encoder_config(source="corners", shape=shape, **options)).module
    assert (encoder.num_tokens, encoder.encoder_dim) == expected
    image = torch.arange(3 * 16 * 16.0).view(1, 3, 16, 16)
    features = encoder(image)
    assert features.shape == (1, *expected)
    if shape in ("map", "tokens") and not options:
        assert torch.equal(features, Corners(shape="tokens")(image))


def test_an_encoder_is_trained_with_and_known_by_its_weights(tiny_lm, shapes, tmp_path):
    register_vision_encoder("corners")(Corners)
    encoder = {"source": "corners", "factor": 2.0}
    result = train(recipe_from_dict(recipe_of(tiny_lm("llama"), shapes, tmp_path / "run", vision_encoder=encoder)))
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    assert model.vision_encoder.network.factor == 2.0
    config = json.loads((result.best / "config.json").read_text())
    config["vision_encoder"]["factor"] = 3.0
    (result.best / "config.json").write_text(json.dumps(config))
    (result.best / "sums.json").unlink()
    with pytest.raises(CheckpointError, match="vision_encoder: this checkpoint was trained with sha256="):
        FrozenPrefixForConditionalGeneration.from_pretrained(result.best)


def test_options_of_an_encoder_are_checked(tiny_lm, shapes, tmp_path):
    register_vision_encoder("corners")(Corners)
    encoder = {"source": "corners", "shape": "ring", "image_siz": 3}
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(recipe_of(tiny_lm(), shapes, tmp_path, vision_encoder=encoder))
    assert caught.value.problems == [
        "model.vision_encoder.image_siz: vision encoder source 'corners' has no such option; it has: shape, factor",
        "model.vision_encoder.shape: Input should be 'map', 'tokens', 'three' or 'vector', got 'ring'",
    ]


def test_a_checkpoint_whose_encoder_is_missing_is_refused(tiny_lm, shapes, tmp_path):
    with undoing_registrations():
        register_vision_encoder("corners")(Corners)
        parts = recipe_of(tiny_lm("llama"), shapes, tmp_path, vision_encoder={"source": "corners"})
        build_model(recipe_from_dict(parts))[0].save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(
        CheckpointError, match=r"its vision encoder 'corners' \(.*:Corners\) is not a part of frozenprefix"
    ):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")


def test_features_of_a_wrong_shape_are_named():
    class Flat(Corners):
        def forward(self, pixel_values):
            return pixel_values.sum()

    register_vision_encoder("flat")(Flat)
    with pytest.raises(ConfigError, match=r"'flat': forward gave \(\) for 1 images, expected \[B, D\]"):
        build_vision_encoder(vision_encoder_config(source="flat"))


def test_a_registered_source_is_read(shapes):
    @register_source("names")
    class Names(SourceConfig):
        type: str = "names"
        ending: str = ".png"

        def read(self, root):
            files = sorted((root / "images").glob(f"*{self.ending}"))
            return [Sample(file.name, (file,), (file.stem,)) for file in files]

    samples = load_source({"type": "names", "path": str(shapes), "limit": 2})
    assert [sample.targets for sample in samples] == [("blue_circle",), ("blue_cross",)]
    with pytest.raises(ConfigError, match=r"unknown field 'endin' \(did you mean 'ending'\?\)"):
        load_source({"type": "names", "path": str(shapes), "endin": 1})


def test_names_and_classes_are_checked_when_they_are_registered():
    with pytest.raises(ConfigError, match="mapper 'mlp' is registered twice; choose another name"):
        register_mapper("mlp")(Gated)
    with pytest.raises(ConfigError, match="mapper 'a:b': expected a name to be registered under, without ':'"):
        register_mapper("a:b")(Gated)
    with pytest.raises(ConfigError, match="the constructor lacks the argument prefix_length; it has: encoder_dim, num"):

        @register_mapper("short")
        class Short(nn.Module):
            def __init__(self, *, encoder_dim, num_tokens, lm_dim):
                super().__init__()

    with pytest.raises(ConfigError, match=r"got <class 'dict'>, expected a subclass of Module"):
        register_mapper("dict")(dict)
    assert not {"short", "dict"} & set(MAPPERS.names())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda features: features, r"gives \(2, 4, 6\), expected \(2, 3, 8\): \[images, prefix_length, lm_dim\]"),
        (lambda features: None, r"gives NoneType, expected \(2, 3, 8\)"),
        (
            lambda features: features @ torch.ones(5, 5),
            r"fails \(RuntimeError: .*\); expected an output of \(2, 3, 8\)",
        ),
    ],
)
def test_a_mapper_of_another_shape_is_refused_before_it_is_used(output, message):
    class Wrong(Gated):
        def forward(self, image_features):
            return output(image_features)

    register_mapper("wrong")(Wrong)
    shapes = {"encoder_dim": 6, "num_tokens": 4, "lm_dim": 8, "embedding_rms": 0.1}
    with pytest.raises(ConfigError, match=r"mapper 'wrong', given image_features of shape \(2, 4, 6\), " + message):
        build_mapper(MapperConfig(type="wrong", prefix_length=3), **shapes)


def test_a_cell_that_is_run_again_replaces_its_class():
    code = "class Twice(Gated):\n    pass\nregister_mapper('twice')(Twice)\n"
    names = {"Gated": Gated, "register_mapper": register_mapper, "__name__": "__main__"}
    exec(code, names)
    first = names["Twice"]
    exec(code, names)
    assert MAPPERS.get("twice") is names["Twice"] is not first


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch):
    for package in ("one", "two"):
        info = tmp_path / f"{package}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[frozenprefix.mappers]\nsame = {package}.parts:Mapper\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"got one\.parts:Mapper and two\.parts:Mapper as entry points of that name"):
        MAPPERS.get("same")


def test_public_names_are_importable():
    assert all(getattr(frozenprefix, name) is not None for name in frozenprefix.__all__)
