"""Principal components as what a mapper reads: found once, before the first step, and kept in checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from frozenprefix.errors import ConfigError, DataError, ExportError
from frozenprefix.export.mlp import plain_mlp
from frozenprefix.inference import Captioner
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.mappers.components import PrincipalComponents
from frozenprefix.training.trainer import Trainer, train

COMPONENTS = "model.mapper={type: mlp, prefix_length: 2, hidden_dim: 16, components: 3}"


def correlated(rows: int) -> torch.Tensor:
    """Features of width 6 with four directions, of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, 4, generator=generator) @ torch.randn(4, 6, generator=generator)
    return (mixed * torch.tensor([1.0, 10.0, 0.1, 1.0, 5.0, 1.0]) + 7)[:, None]


@pytest.mark.parity
def test_they_are_those_of_a_singular_value_decomposition():
    features, components = correlated(200), PrincipalComponents(6, count=3)
    components.fit(features)
    found = components(features)[:, 0]
    rows = features[:, 0]
    standard = (rows - rows.mean(0)) / rows.std(0)
    left = torch.linalg.svd(standard)[0][:, :3] * len(rows) ** 0.5
    # the same space, whatever the order of equally large components
    assert torch.linalg.svdvals(found.T @ left / len(rows)).min() > 0.99
    assert found.mean(0).abs().max() < 1e-4
    assert found.T.cov() == pytest.approx(torch.eye(3), abs=0.02)


def test_the_same_features_give_the_same_components():
    made = []
    for _ in range(2):
        components = PrincipalComponents(6, count=3)
        components.fit(correlated(50))
        made.append(components.basis)
        torch.randn(3)  # whatever else draws random numbers
    assert torch.equal(*made)


def test_equal_images_give_nothing():
    """A twin that is trained without images has one feature for all of them."""
    components = PrincipalComponents(6, count=3)
    components.fit(torch.ones(20, 1, 6))
    assert not components(torch.randn(4, 1, 6)).any()


def test_fewer_tokens_than_components_are_refused():
    with pytest.raises(DataError, match="components: got 3, expected fewer than the 2 image tokens"):
        PrincipalComponents(6, count=3).fit(torch.randn(1, 2, 6))


@pytest.mark.parametrize("options", [{"components": 17}, {"components": 2, "input_norm": True}])
def test_components_that_cannot_be(options):
    config = MapperConfig(type="mlp", prefix_length=2, **options)
    with pytest.raises(ConfigError, match=r"model\.mapper\.components: got \d+ with input_norm"):
        build_mapper(config, encoder_dim=16, num_tokens=1, lm_dim=8, embedding_rms=0.1)


def test_the_prefix_has_the_size_of_words_without_an_output_norm():
    config = MapperConfig(type="mlp", prefix_length=2, output_norm="none", components=4)
    mapper = build_mapper(config, encoder_dim=16, num_tokens=1, lm_dim=8, embedding_rms=0.1)
    mapper.body.fit_inputs(torch.randn(100, 1, 16))
    size = mapper(torch.randn(200, 1, 16)).detach().square().mean().sqrt()
    assert float(size) == pytest.approx(0.1, rel=0.3)
    with pytest.raises(ExportError, match=r"model\.mapper\.components: .* train without them"):
        plain_mlp(mapper, num_tokens=1, prefix_length=2)


def test_a_run_finds_them_and_its_checkpoints_keep_them(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", COMPONENTS)
    trainer = Trainer(recipe)
    trainer.setup()
    basis = trainer.model.mapper.body.input_norm.basis.clone()
    result = train(recipe)
    saved = load_file(result.best / "model.safetensors")
    assert torch.equal(saved["mapper.body.input_norm.basis"], basis)
    assert basis.square().sum(1).min() > 0
    assert not torch.equal(basis, torch.eye(*basis.shape))
    loaded = Captioner.from_pretrained(result.best, device="cpu").model.mapper.body.input_norm
    assert torch.equal(loaded.basis, basis)
    assert torch.equal(loaded.mean, saved["mapper.body.input_norm.mean"])

    saved["mapper.body.input_norm.basis"] *= 2  # as if it came from other images
    save_file(saved, result.best / "model.safetensors", metadata={"format": "pt"})
    (result.best / "sums.json").unlink(missing_ok=True)
    trainer = Trainer(tiny_recipe(tmp_path / "next", COMPONENTS, f"training.init_from={result.best}"))
    trainer.setup()
    assert torch.equal(trainer.model.mapper.body.input_norm.basis, 2 * basis)


def test_a_run_resumes_with_them(tiny_recipe, tmp_path):
    whole = train(tiny_recipe(tmp_path / "whole", COMPONENTS, "training.max_steps=6"))
    recipe = tiny_recipe(tmp_path / "parts", COMPONENTS, "training.max_steps=6", "training.save_every=3")
    trainer = Trainer(recipe)

    class Killed(Exception):
        pass

    step = trainer.step

    def dying(batches):
        if trainer.progress.step == 4:
            raise Killed
        return step(batches)

    trainer.step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run("never")
    parts = train(recipe, resume="auto")
    one, other = (load_file(result.output_dir / "last" / "model.safetensors") for result in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_features_that_are_not_cached_are_refused(tiny_recipe, tmp_path):
    trainer = Trainer(tiny_recipe(tmp_path, COMPONENTS, "data.feature_cache=off"))
    with pytest.raises(ConfigError, match=r"model\.mapper: MLPMapper is fitted .* it needs data\.feature_cache"):
        trainer.setup()
