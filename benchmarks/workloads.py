"""Synthetic captions, language models with random weights, and a captioning model of this package around them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from frozenprefix import FrozenPrefixConfig, FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing import Target
from frozenprefix.models.vision import PrecomputedFeatures

FLOAT = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREFIX = 10
FEATURE = 512  # CLIP ViT-B/32's pooled feature
CAPTIONS_PER_IMAGE = 5
END, OPENINGS, SUBJECTS = 1, 20, 400
# Probability that a caption follows its image's common phrase for one more word, if it has followed it so far. With
# these values 9 % of all words are shared, as in Flickr8k.
AGREE = (0.85, 0.5, 0.4, 0.4, 0.4)


@dataclass(frozen=True)
class Shape:
    """The config of a language model, and the number of images per step."""

    config: PreTrainedConfig
    images: int = 8


def shapes(quick: bool = False) -> dict[str, Shape]:
    """GPT-2 small and SmolLM2-135M; with `quick`, two-layer models of the same kinds."""
    if quick:
        llama = LlamaConfig(
            vocab_size=500, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=END, pad_token_id=END,
        )  # fmt: skip
        gpt2 = GPT2Config(vocab_size=500, n_embd=48, n_layer=2, n_head=4, bos_token_id=END, eos_token_id=END)
        return {"gpt2": Shape(gpt2, 2), "llama": Shape(llama, 2)}
    llama = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    return {"gpt2": Shape(GPT2Config(bos_token_id=END, eos_token_id=END)), "llama": Shape(llama)}


def random_lm(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype)


def synthetic_captions(images: int, vocab_size: int, seed: int = 0) -> list[list[list[int]]]:
    """Five captions per image as token ids, without the end token.

    Their lengths are distributed like those of COCO captions: mean 11.4 tokens, standard deviation 2.7, minimum 7, and
    3 of 2000 captions are long (20 to 45 tokens).
    """
    draw = random.Random(seed)

    def word(place: int) -> int:
        low, high = (
            (2, 2 + OPENINGS)
            if place == 0
            else (30, min(30 + SUBJECTS, vocab_size))
            if place == 1
            else (30, vocab_size)
        )
        return low + int((high - low) * draw.random() ** 2)

    groups = []
    for _ in range(images):
        phrase = [word(place) for place in range(len(AGREE))]
        captions = []
        for _ in range(CAPTIONS_PER_IMAGE):
            length = draw.randint(20, 45) if draw.random() < 0.0015 else 7 + int(draw.gammavariate(3.9, 1.25))
            agreed = 0
            while agreed < len(AGREE) and draw.random() < AGREE[agreed]:
                agreed += 1
            captions.append([*phrase[:agreed], *(word(place) for place in range(agreed, length))])
        groups.append(captions)
    return groups


def targets_of(captions: list[list[list[int]]], image_token_id: int) -> list[list[Target]]:
    """Captions with prefix placeholders and end token, as the collator passes them to `pack`."""
    return [[Target([image_token_id] * PREFIX + words + [END], PREFIX) for words in texts] for texts in captions]


def our_model(config: PreTrainedConfig, dtype: torch.dtype, **mapper: int) -> FrozenPrefixForConditionalGeneration:
    """This package's model with a random LM and ClipCap's MLP on a pooled feature; `mapper` overrides its options."""
    language_model = random_lm(config, dtype)
    torch.manual_seed(1)
    model = FrozenPrefixForConditionalGeneration(
        FrozenPrefixConfig(
            vision_encoder={"source": "timm", "name": "precomputed", "output": "pooled"},
            mapper={"type": "mlp", "prefix_length": PREFIX, **mapper},
            language_model={"path": "random", "dtype": str(dtype).removeprefix("torch.")},
            image_token_id=config.vocab_size,
        ),
        vision_encoder=PrecomputedFeatures(1, FEATURE),  # as in training with a feature cache
        language_model=language_model,
    )
    return model.train()


def features_of(images: int, seed: int = 0) -> Tensor:
    """float32[images, 1, 512]."""
    return torch.randn(images, 1, FEATURE, generator=torch.Generator().manual_seed(seed))
