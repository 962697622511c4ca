"""Tiny random models and a tokenizer made on the spot: everything here works offline and in seconds."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# a failed assert in a helper shows its values, as one in a test does
pytest.register_assert_rewrite("tests.training_parts")

WORDS = "a the dog cat man woman red blue green runs sits on in grass street shape what color is this question answer"
TINY = {"hidden": 32, "layers": 2, "heads": 4, "positions": 128}


def tiny_lm_config(family: str, vocab_size: int = 300):
    """A two-layer config of one LM family."""
    import transformers as t

    h, n, a, p = TINY["hidden"], TINY["layers"], TINY["heads"], TINY["positions"]
    llama_like = {
        "vocab_size": vocab_size,
        "hidden_size": h,
        "intermediate_size": 2 * h,
        "num_hidden_layers": n,
        "num_attention_heads": a,
        "num_key_value_heads": 2,
        "max_position_embeddings": p,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    builders = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=vocab_size, n_embd=h, n_layer=n, n_head=a, n_positions=p, bos_token_id=1, eos_token_id=2
        ),
        "opt": lambda: t.OPTConfig(
            vocab_size=vocab_size,
            hidden_size=h,
            num_hidden_layers=n,
            num_attention_heads=a,
            ffn_dim=2 * h,
            max_position_embeddings=p,
            word_embed_proj_dim=h,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=h,
            num_hidden_layers=n,
            num_attention_heads=a,
            intermediate_size=2 * h,
            max_position_embeddings=p,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "llama": lambda: t.LlamaConfig(**llama_like, tie_word_embeddings=True),
        "mistral": lambda: t.MistralConfig(**llama_like, sliding_window=None),
        "qwen2": lambda: t.Qwen2Config(**llama_like),
        "qwen3": lambda: t.Qwen3Config(**llama_like, head_dim=8),
        "phi3": lambda: t.Phi3Config(**llama_like),
        "t5": lambda: t.T5Config(
            vocab_size=vocab_size,
            d_model=h,
            d_kv=h // a,
            d_ff=2 * h,
            num_layers=n,
            num_heads=a,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=0,
        ),
        "gemma": lambda: t.GemmaConfig(**llama_like, head_dim=8),
        "gemma2": lambda: t.Gemma2Config(**llama_like, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
        "gemma3": lambda: t.Gemma3TextConfig(**llama_like, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
    }
    return builders[family]()


def make_tokenizer():
    """A byte-level BPE tokenizer with 300 entries at most, `<s>` = 1 and `</s>` = 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tiny_lm(folder: Path, family: str, sharpness: float = 1.0) -> Path:
    """Save a random LM and the tokenizer. A `sharpness` over 1 makes its words depend on more than the last token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = tiny_lm_config(family)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= sharpness
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """`tiny_lm("llama")` -> folder with a tiny random causal LM of that family and a tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = save_tiny_lm(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


class DeprecatedCalls(logging.Handler):
    """Makes an error of what transformers only logs: a deprecated name in a call of this package."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        frame = sys._getframe()
        while frame is not None and "deprecated" in message:
            library = Path(frame.f_code.co_filename)
            if "peft" in library.parts:
                return  # it calls with names of its own choice
            if "frozenprefix" in library.parts[-5:-1]:
                raise FutureWarning(message)
            frame = frame.f_back


@pytest.fixture(autouse=True, scope="session")
def deprecated_calls():
    """Deprecations that transformers logs fail the test that causes them."""
    handler = DeprecatedCalls()
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with flickr8k/ and daquar/."""
    root = os.environ.get("FROZENPREFIX_DATA")
    if not root:
        pytest.skip("FROZENPREFIX_DATA is not set: no real photos to test on")
    return Path(root)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Fast tests never read or write the user's cache of features and converted models."""
    if "FROZENPREFIX_HOME" not in os.environ:
        os.environ["FROZENPREFIX_HOME"] = str(tmp_path_factory.mktemp("home"))


COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", "triangle", "cross")


def draw_shape(colour: str, shape: str):
    """A 48 x 48 picture of one coloured shape on white."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (48, 48), "white")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((8, 8, 40, 40), fill=colour)
    elif shape == "square":
        draw.rectangle((8, 8, 40, 40), fill=colour)
    elif shape == "triangle":
        draw.polygon([(24, 6), (42, 42), (6, 42)], fill=colour)
    else:
        draw.line((8, 8, 40, 40), fill=colour, width=8)
        draw.line((40, 8, 8, 40), fill=colour, width=8)
    return image


def write_shapes(folder: Path) -> Path:
    """12 drawings with captions.jsonl and qa.jsonl: 8 in split train, 4 (one of each shape) in split val."""
    (folder / "images").mkdir(parents=True)
    captions, questions = [], []
    for number, (colour, shape) in enumerate((colour, shape) for shape in SHAPES for colour in COLOURS):
        name, split = f"images/{colour}_{shape}.png", "val" if number % 3 == 2 else "train"
        draw_shape(colour, shape).save(folder / name)
        texts = [f"a {colour} {shape}", f"a {shape} in {colour}", f"the {shape} is {colour}"]
        captions.append({"image": name, "captions": texts, "split": split})
        for kind, answer in (("color", colour), ("shape", shape)):
            question = f"what {kind} is this?"
            questions.append({"image": name, "question": question, "answer": answer, "type": kind, "split": split})
    for name, rows in (("captions.jsonl", captions), ("qa.jsonl", questions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Folder of drawings; not to be written to. `write_shapes` makes another one."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def tiny_recipe_dict(lm: Path, data: Path, output_dir: Path) -> dict[str, Any]:
    """A run of 6 steps that takes a second or two."""
    return {
        "name": "tiny",
        "output_dir": str(output_dir),
        "model": {
            "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32},
            "mapper": {"type": "mlp", "prefix_length": 2, "hidden_dim": 32, "tokens": "flatten"},
            "language_model": {"path": str(lm)},
        },
        "data": {
            "train": [
                {"type": "captions", "path": str(data), "split": "train", "name": "captions"},
                {"type": "qa", "path": str(data), "split": "train", "name": "qa"},
            ],
            "validation": [{"type": "captions", "path": str(data), "split": "val"}],
            "workers": 0,
        },
        "training": {
            "max_steps": 6,
            "warmup_steps": 0,
            "pictures_per_step": 4,
            "targets_per_picture": 2,
            "learning_rate": 0.01,
            "log_every": 1,
            "validate_every": 3,
            "save_every": 3,
        },
    }


@pytest.fixture(scope="session")
def tiny_recipe(tiny_lm, shapes) -> Callable[..., Any]:
    """`tiny_recipe(output_dir, "training.max_steps=3", lm=…, data=…)` -> `Recipe`."""
    from frozenprefix.training.recipe import Recipe

    def make(output_dir: Path, *overrides: str, lm: Path | None = None, data: Path | None = None) -> Recipe:
        return Recipe.from_dict(tiny_recipe_dict(lm or tiny_lm("llama"), data or shapes, output_dir), overrides)

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
    from .lit_parts import save_tiny_bert

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

    from .peft_parts import shake

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
    """Five pictures of noise, float32 [5, 3, 32, 32]."""
    import torch

    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint):
    """A tiny captioner that asks for three texts at once."""
    from frozenprefix.inference import Captioner

    return Captioner.from_pretrained(tiny_checkpoint, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def questions(shapes):
    """8 questions about 4 pictures, two different ones: model, blind LM and shuffled are asked 18 in all."""
    from frozenprefix.data.sources import load_source

    return load_source({"type": "qa", "path": str(shapes), "split": "val"})


@pytest.fixture
def colour_embedder():
    """An `Embedder` whose vectors are known: it sees and reads red, green and blue."""
    from frozenprefix.inference.embedding import Embedder

    from .retrieval_parts import ColourModel, ColourProcessor

    return Embedder(ColourModel(), ColourProcessor(), batch_size=4)


@pytest.fixture
def colour_pictures(tmp_path) -> Path:
    """A folder with a square of each colour: red.png, …"""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in COLOURS:
        draw_shape(colour, "square").save(folder / f"{colour}.png")
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def pack_samples(collator: Any, samples: list[Any], packing: str = "trie") -> Any:
    """A `PackedBatch` of samples that share one picture each."""
    from frozenprefix.models.packing import pack

    return pack(
        [[collator.target(sample, text) for text in sample.targets] for sample in samples],
        image_token_id=collator.processor.image_token_id,
        prefix_length=collator.processor.prefix_length,
        packing=packing,
    )
