"""Mappers without training: the least squares by hand, on tiny models, and on the real classifier and photos."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch

from frozenprefix.config import load_recipe
from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import LanguageModelConfig, MapperConfig
from frozenprefix.models.language_model.loading import load_language_model, load_tokenizer
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.mappers.closed_form import (
    NamedVectors,
    class_name_embeddings,
    closed_form_mapper,
    fit_last_layer,
    fit_linear,
    insert_classifier,
    nearest_names,
)
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.setup import build_model
from tests.helpers import ROOT

SCRIPT = ROOT / "recipes" / "closed_form.py"
NAMES = ["dog", "cat", "man", "woman", "red dog", "blue cat", "green grass", "street"]
D_ENC = 24


@pytest.fixture(scope="module")
def lm(tiny_lm):
    """Tiny LM and its tokenizer."""
    config = LanguageModelConfig(path=str(tiny_lm()))
    return load_language_model(config)[0], load_tokenizer(config)


@pytest.fixture
def classes() -> NamedVectors:
    generator = torch.Generator().manual_seed(0)
    return NamedVectors(torch.randn(len(NAMES), D_ENC, generator=generator), NAMES)


def build(kind: str, num_tokens: int = 1, prefix_length: int = 2, **options):
    torch.manual_seed(0)
    config = MapperConfig(type=kind, prefix_length=prefix_length, **options)
    return build_mapper(config, encoder_dim=D_ENC, num_tokens=num_tokens, lm_dim=32, embedding_rms=0.02)


def test_fit_linear_by_hand():
    sources, targets = torch.tensor([[4.0], [6.0]]), torch.tensor([[-1.0, 9.0], [3.0, 9.0]])
    weight, bias = fit_linear(sources, targets, ridge=0)
    assert weight.tolist() == [[2.0], [0.0]]
    assert bias.tolist() == [-9.0, 9.0]
    # centred: x = -1, 1 and y = -2, 2; sum xy = 4, sum xx = 2, mean squared length 1
    weight, bias = fit_linear(sources, targets, ridge=2)
    assert weight.flatten().tolist() == pytest.approx([1.0, 0.0])
    assert bias.tolist() == pytest.approx([-4.0, 9.0])


def test_fit_linear_finds_an_affine_map_and_interpolates_few_points():
    torch.manual_seed(0)
    true_weight, true_bias = torch.randn(3, 4), torch.randn(3)
    many = torch.randn(20, 4)
    weight, bias = fit_linear(many, many @ true_weight.T + true_bias, ridge=0)
    torch.testing.assert_close(weight, true_weight)
    torch.testing.assert_close(bias, true_bias)
    few, targets = torch.randn(3, 9), torch.randn(3, 2)
    weight, bias = fit_linear(few, targets, ridge=0)
    torch.testing.assert_close(few @ weight.T + bias, targets)


def test_fit_linear_is_ridge_regression():
    torch.manual_seed(0)
    sources, targets = torch.randn(10, 4).double(), torch.randn(10, 2).double()
    weight, _ = fit_linear(sources, targets, ridge=0.3)
    x, y = sources - sources.mean(0), targets - targets.mean(0)
    penalty = 0.3 * x.square().sum() / 10
    expected = torch.linalg.solve(x.T @ x + penalty * torch.eye(4).double(), x.T @ y).T
    torch.testing.assert_close(weight, expected.float())


def test_names_become_the_tokens_of_a_word_inside_a_sentence(lm):
    model, tokenizer = lm
    weight = model.get_input_embeddings().weight
    red_dog, dog = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" red dog", " dog"))
    assert len(red_dog) > len(dog) > 0
    length = len(red_dog) + 1
    embeds = class_name_embeddings(["red dog", " dog "], tokenizer, model, length)
    torch.testing.assert_close(embeds[0], weight[[*red_dog, red_dog[-1]]])
    torch.testing.assert_close(embeds[1], weight[dog + dog[-1:] * (length - len(dog))])
    (mean,) = class_name_embeddings(["red dog"], tokenizer, model, 1)
    torch.testing.assert_close(mean[0], weight[red_dog].mean(0))


def test_a_long_name_ends_in_the_mean_of_the_rest(lm):
    model, tokenizer = lm
    ids = tokenizer(" red dog runs in grass", add_special_tokens=False)["input_ids"]
    (embeds,) = class_name_embeddings(["red dog runs in grass"], tokenizer, model, 2)
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(embeds, torch.stack([weight[ids[0]], weight[ids[1:]].mean(0)]))


def test_an_empty_name_is_refused(lm):
    with pytest.raises(ConfigError, match=r"names: got '  ', which has no token"):
        class_name_embeddings(["dog", "  "], lm[1], lm[0], 2)


@pytest.mark.parametrize(
    ("kind", "num_tokens", "options"),
    [
        ("linear", 1, {}),
        ("linear", 1, {"input_norm": True}),
        ("linear", 9, {}),
        ("mlp", 1, {"hidden_dim": 48}),
        ("mlp", 9, {"tokens": "flatten", "hidden_dim": 48}),
        ("transformer", 1, {"hidden_dim": 48, "num_layers": 2, "num_heads": 4}),
        ("perceiver", 9, {"num_layers": 2, "num_heads": 4}),
        ("q_former", 9, {"hidden_dim": 48, "num_layers": 2, "num_heads": 4}),
        ("mapl", 1, {"hidden_dim": 48, "num_layers": 2, "num_heads": 4}),
        ("attention_pool", 9, {"num_heads": 4}),
    ],
)
def test_any_mapper_with_a_last_linear_layer_names_the_classes(kind, num_tokens, options, lm, classes):
    targets = class_name_embeddings(NAMES, lm[1], lm[0], 2)
    mapper = build(kind, num_tokens, **options).train()
    features = classes.vectors[:, None].expand(-1, num_tokens, -1)
    before = {name: p.clone() for name, p in mapper.named_parameters()}
    assert nearest_names(mapper(features), targets)[:, 0].tolist() != list(range(len(NAMES)))

    fit_last_layer(mapper, classes, targets, ridge=1e-3, num_tokens=num_tokens)
    assert nearest_names(mapper(features), targets)[:, 0].tolist() == list(range(len(NAMES)))
    changed = [name for name, p in mapper.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == 4, changed  # last layer and scale, weight and bias each
    assert mapper.training


def test_without_ridge_the_prefix_is_the_names_embeddings(lm, classes):
    """All but the length of the difference from the names' mean, which the layer norm sets."""
    targets = class_name_embeddings(NAMES, lm[1], lm[0], 2)
    mapper = build("linear")
    fit_last_layer(mapper, classes, targets, ridge=0)
    centre = targets.mean(dim=(0, 1))
    got, wanted = mapper(classes.vectors[:, None]) - centre, targets - centre
    wanted_size = wanted.square().mean().sqrt().item()
    wanted = wanted - wanted.mean(-1, keepdim=True)
    assert torch.cosine_similarity(got, wanted, dim=-1).min() > 0.9999
    assert got.square().mean().sqrt().item() == pytest.approx(wanted_size, rel=1e-4)


def test_a_mapper_without_last_linear_layer_is_refused(lm, classes):
    targets = class_name_embeddings(NAMES, lm[1], lm[0], 2)
    mapper = build("transformer", num_layers=1, num_heads=4)
    with pytest.raises(ConfigError, match=r"TransformerMapper does not end in a linear layer"):
        fit_last_layer(mapper, classes, targets)


def test_the_inserted_classifier_names_what_exceeds_the_threshold(lm):
    model, tokenizer = lm
    vectors, bias = torch.eye(len(NAMES), D_ENC), torch.arange(len(NAMES)) / 10
    classes = NamedVectors(vectors, NAMES, bias)
    mapper = closed_form_mapper(classes, tokenizer, model, 2, "mlp")
    insert_classifier(mapper, classes, targets := class_name_embeddings(NAMES, tokenizer, model, 2), threshold=3.0)
    features = torch.zeros(3, 1, D_ENC)
    features[0, 0, 1], features[0, 0, 2] = 2.95, 3.0  # logits 3.05 and 3.2: classes 1 and 2, by 0.05 and 0.2
    features[1, 0, 4] = 2.7  # logit 3.1: class 4
    features[2, 0, 5] = 2.4  # logit 2.9: nothing
    centre = targets.mean(dim=(0, 1))
    got = mapper(features) - centre
    mixed = 0.05 * (targets[1] - centre) + 0.2 * (targets[2] - centre)
    for row, wanted in ((0, mixed), (1, targets[4] - centre)):
        torch.testing.assert_close(
            torch.cosine_similarity(got[row], wanted - wanted.mean(-1, keepdim=True), dim=-1), torch.ones(2)
        )
    torch.testing.assert_close(got[2], torch.zeros_like(got[2]))
    assert nearest_names(mapper(features[:2]), targets)[:, 0].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("kind", "num_tokens", "options"),
    [
        ("linear", 1, {}),
        ("mlp", 1, {"hidden_dim": 8}),
        ("mlp", 1, {"hidden_dim": 9, "activation": "relu"}),
        ("mlp", 1, {"hidden_dim": 8, "activation": "relu", "num_layers": 3}),
        ("mlp", 1, {"hidden_dim": 8, "activation": "relu", "input_norm": True}),
        ("mlp", 9, {"hidden_dim": 8, "activation": "relu"}),
    ],
)
def test_a_classifier_fits_one_kind_of_mapper_only(kind, num_tokens, options, lm, classes):
    targets = class_name_embeddings(NAMES, lm[1], lm[0], 2)
    with pytest.raises(ConfigError, match=r"type mlp with hidden_dim=8, activation=relu"):
        insert_classifier(build(kind, num_tokens, **options), classes, targets)


def test_numbers_that_differ_are_refused(lm, classes):
    with pytest.raises(ConfigError, match=r"shape \(8, 24\), 7 names and 7 biases"):
        NamedVectors(classes.vectors, NAMES[:7])
    with pytest.raises(ConfigError, match=r"8 names and 3 biases"):
        NamedVectors(classes.vectors, NAMES, torch.zeros(3))
    targets = class_name_embeddings(NAMES[:5], lm[1], lm[0], 2)
    with pytest.raises(ConfigError, match=r"targets: got shape \(5, 2, 32\), expected \(8, 2, 32\)"):
        fit_last_layer(build("linear"), classes, targets)
    with pytest.raises(ConfigError, match=r"targets: got shape \(8, 3, 32\), expected \(8, 2, 32\)"):
        fit_last_layer(build("linear"), classes, class_name_embeddings(NAMES, lm[1], lm[0], 3))


def test_the_result_is_an_ordinary_checkpoint(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        tmp_path, "model.mapper={type: linear, prefix_length: 2}", "model.vision_encoder.output=pooled"
    )
    model, processor = build_model(recipe)
    classes = NamedVectors(torch.randn(len(NAMES), model.vision_encoder.encoder_dim), NAMES)
    targets = class_name_embeddings(NAMES, processor.tokenizer, model.language_model, 2)
    fit_last_layer(model.mapper, classes, targets)
    model.save_pretrained(tmp_path / "made")
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "made")
    features = classes.vectors[:, None]
    assert torch.equal(loaded.map_features(features), model.map_features(features))
    assert nearest_names(loaded.map_features(features), targets)[:, 0].tolist() == list(range(len(NAMES)))


# The real classifier, language model and photos


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("closed_form_recipe", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imagenet(script):
    """The classifier, its language model and tokenizer."""

    sections = load_recipe(script.RECIPE).model
    config = LanguageModelConfig(path=sections.language_model.path)
    return (
        script.imagenet_classes(sections.vision_encoder.weights),
        load_language_model(config)[0],
        load_tokenizer(config),
    )


@pytest.mark.slow
@pytest.mark.parametrize("prefix_length", [1, 3])
def test_class_vectors_get_their_own_names(imagenet, prefix_length):
    classes, model, tokenizer = imagenet
    targets = class_name_embeddings(classes.names, tokenizer, model, prefix_length)
    mapper = closed_form_mapper(classes, tokenizer, model, prefix_length)
    with torch.no_grad():
        found = nearest_names(mapper(classes.vectors[:, None]), targets)[:, 0]
    assert (found == torch.arange(1000)).float().mean() > 0.9  # two names stand for two classes each


@pytest.mark.slow
def test_photos_of_dogs_are_named_as_dogs(imagenet, script, data_root):
    """Both mappers, on photos of which every caption says "dog": ImageNet's classes 151 to 268 are breeds of dogs."""
    from frozenprefix.data.images import load_image
    from frozenprefix.models.vision import build_vision_encoder

    folder = data_root / "flickr8k"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    dogs = [row["image"] for row in rows if all("dog" in caption.lower().split() for caption in row["captions"])][:24]
    others = [row["image"] for row in rows if not any("dog" in caption.lower() for caption in row["captions"])][:24]
    encoder = build_vision_encoder(load_recipe(script.RECIPE).model.vision_encoder)
    images = [load_image(folder / name) for name in dogs + others]
    with torch.no_grad():
        features = encoder.module(encoder.image_processor(images, return_tensors="pt")["pixel_values"]).float()

    classes, model, tokenizer = imagenet
    targets = class_name_embeddings(classes.names, tokenizer, model, 3)
    said = (features[:, 0] @ classes.vectors.T + classes.bias).argmax(-1)
    for kind, agreement in (("linear", 0.4), ("mlp", 0.8)):
        mapper = closed_form_mapper(classes, tokenizer, model, 3, kind)
        with torch.no_grad():
            found = nearest_names(mapper(features), targets)[:, 0]
        is_dog = (found >= 151) & (found <= 268)
        assert is_dog[:24].float().mean() > 0.8, kind
        assert is_dog[24:].float().mean() < 0.2, kind
        assert (found == said).float().mean() > agreement, kind


@pytest.mark.slow
def test_the_script_names_a_photo_and_writes_a_checkpoint(script, data_root, tmp_path, monkeypatch, capsys):
    from frozenprefix import Captioner

    monkeypatch.setenv("COLUMNS", "160")
    photo = data_root / "flickr8k" / "images" / "143552697_af27e9acf5.jpg"
    script.main([photo], tmp_path / "made", "mlp")
    assert capsys.readouterr().out.count("mountain bike") == 2  # nearest name, and what the language model says
    (caption,) = Captioner.from_pretrained(tmp_path / "made").caption([photo], num_beams=1, max_new_tokens=2)
    assert caption.text == "mountain bike"
