"""Captions with encoder and mapper here, and the language model in llama.cpp, which reads the prefix embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.assets import opening_checkpoint, resolve
from frozenprefix.config.base_recipe import DTYPES
from frozenprefix.data.caption_retriever import CaptionRetriever
from frozenprefix.data.image_encoder import ImageEncoder, ImageInput
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.inference.captioner import (
    Captioner,
    Generation,
    batched,
    images_per_group,
)
from frozenprefix.inference.generate_options import CAPTIONER_REFUSES, check_generate
from frozenprefix.inference.llama_cpp.language_model import LlamaCppModel, Segment
from frozenprefix.models.checkpoint import (
    check_identity,
    checkpoint_config,
    checkpoint_generation_config,
    read_checkpoint,
)
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.language_model import end_tokens
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor
from frozenprefix.models.state_dict import copy_into
from frozenprefix.models.vision import VisionEncoder, build_vision_encoder
from frozenprefix.utils import file_sha256, progress_bar

SHA256_KEY = "frozenprefix.language_model.sha256"
"""Key of an exported GGUF file that names the weights it was made of."""
_NEEDS_TORCH = "use --engine torch"


class LlamaCppCaptioner(Captioner):
    """A `Captioner` whose language model runs in llama.cpp: greedy search, several images at once.

    Prefix embeddings are computed by this package, so that every encoder and every mapper works; the words before and
    after them are read from the GGUF file's own embeddings.

    Args:
        prefixes: encoder and mapper of the checkpoint.
        llama: the language model.
        processor, retriever: as of `Captioner`.
        ends: ids of the tokens that end a text.

    Example:
        >>> captioner = LlamaCppCaptioner.from_pretrained("runs/mlp/best")  # doctest: +SKIP
        >>> next(captioner.caption(["photo.jpg"], num_beams=1)).text  # doctest: +SKIP
        'A brown dog is running through the grass.'
    """

    def __init__(
        self,
        prefixes: PrefixEncoder,
        llama: LlamaCppModel,
        processor: FrozenPrefixProcessor,
        *,
        ends: Sequence[int],
        retriever: CaptionRetriever | None = None,
    ):
        self.model: Any = prefixes
        self.llama = llama
        self.processor = processor
        self.batch_size = llama.prompts
        self.retriever, self.reranker = retriever, None  # greedy search has nothing to choose from
        self.ensemble = None
        self.encoder = ImageEncoder.from_model(prefixes, processor)
        self.ends = tuple(ends)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        checkpoint: str | Path,
        *,
        batch_size: int = 8,
        language_model: str | Path | None = None,
        precision: str = "auto",
        threads: int | None = None,
        positions: int = 512,
    ) -> LlamaCppCaptioner:
        """Load a checkpoint without its language model, and that into llama.cpp.

        Args:
            batch_size: texts generated at once.
            language_model: GGUF file, if it is not where the checkpoint says, or was written by `export gguf`.
            precision: of the encoder; "auto" is fp32.
            threads: of llama.cpp; as many as torch uses by default.
            positions: longest prompt and text together, in tokens.

        Raises:
            ConfigError: for a checkpoint whose language model has trained parts, or that cannot be read by llama.cpp.
            CheckpointError: for a GGUF file that does not hold the language model of the training.
        """
        with opening_checkpoint(checkpoint), progress_bar("loading the model"):
            config = checkpoint_config(FrozenPrefixConfig, checkpoint, language_model=language_model)
            check_supported(config)
            gguf = find_gguf(config, checkpoint)
            processor = FrozenPrefixProcessor.from_pretrained(checkpoint)
            llama = LlamaCppModel(gguf, prompts=batch_size, positions=positions, threads=threads)
            _check_same(config, gguf, llama, str(checkpoint))
            dtype = getattr(torch, DTYPES["fp32" if precision == "auto" else precision])
            prefixes = PrefixEncoder.from_checkpoint(checkpoint, config, llama.dim, dtype)
            generation = checkpoint_generation_config(checkpoint) or SimpleNamespace(eos_token_id=None)
            ends = end_tokens(generation, processor.tokenizer)
            retriever = CaptionRetriever.load(checkpoint)
            if retriever is not None and not retriever.options.prompts:
                retriever = None
        return cls(prefixes, llama, processor, ends=ends, retriever=retriever)

    def generate_groups(
        self,
        groups: Sequence[Sequence[str]],
        images: Sequence[ImageInput] | Tensor | None = None,
        *,
        max_new_tokens: int = 30,
        **generate: Any,
    ) -> list[list[Generation]]:
        """As `Captioner.generate_groups`, by greedy search."""
        check_generate({"max_new_tokens": max_new_tokens, **generate}, CAPTIONER_REFUSES)
        others = {name: value for name, value in generate.items() if value not in (None, False)}
        if others.pop("num_beams", 1) != 1 or others:
            names = ", ".join(f"{name}={value!r}" for name, value in generate.items())
            raise ConfigError(f"engine: llama.cpp searches greedily, got {names}; give --beams 1, or {_NEEDS_TORCH}")
        if images is None:
            groups = [[self.blind_prompt(prompt) for prompt in prompts] for prompts in groups]
        counts = images_per_group(groups)
        prefixes = None if images is None else self.model.map_features(self.encoder(images))
        if prefixes is not None and sum(counts) != len(prefixes):
            raise DataError(f"images: got {len(prefixes)} for {sum(counts)} {IMAGE_TOKEN} marks, expected one for each")
        prompts, first = [], 0
        for group, count in zip(groups, counts, strict=True):
            own = None if prefixes is None else prefixes[first : first + count].numpy()
            prompts += [self.segments(self.processor.encode_prompt(prompt), own) for prompt in group]
            first += count
        texts = iter(self._continue(prompts, max_new_tokens))
        return [[next(texts) for _ in group] for group in groups]

    def segments(self, ids: Sequence[int], prefixes: np.ndarray | None) -> list[Segment]:
        """A prompt as llama.cpp reads it: token ids, and the embeddings in place of each `<image>`."""
        result: list[Segment] = []
        rows = None if prefixes is None else prefixes.reshape(-1, prefixes.shape[-1])
        place = 0
        for is_image, run in groupby(ids, key=lambda token: token == self.processor.image_token_id):
            tokens = list(run)
            if is_image and rows is not None:
                result.append(rows[place : place + len(tokens)])
                place += len(tokens)
            else:
                result.append(tokens)
        return result

    def _continue(self, prompts: Sequence[list[Segment]], max_new_tokens: int) -> list[Generation]:
        texts = []
        for batch in batched(prompts, self.llama.prompts):
            for text in self.llama.generate(batch, max_new_tokens=max_new_tokens, end_tokens=self.ends):
                texts.append(Generation(self.processor.decode(text.ids), text.score))
        return texts

    def blind_prompt(self, prompt: str) -> str:
        raise ConfigError(f"engine: llama.cpp captions images; for prompts without one, {_NEEDS_TORCH}")


class PrefixEncoder(nn.Module):
    """Encoder and mapper of a checkpoint, without its language model: images -> prefix embeddings.

    Args:
        config: of the checkpoint.
        vision_encoder, mapper: with their weights.

    Example:
        >>> prefixes = PrefixEncoder.from_checkpoint(checkpoint, model.config, model.lm.dim)
        >>> prefixes.map_features(torch.zeros(3, 4, 64)).shape
        torch.Size([3, 2, 32])
    """

    def __init__(self, config: FrozenPrefixConfig, vision_encoder: VisionEncoder, mapper: nn.Module):
        super().__init__()
        self.config = config
        self.vision_encoder = vision_encoder
        self.mapper = mapper.eval()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, config: FrozenPrefixConfig, lm_dim: int, dtype: torch.dtype = torch.float32
    ) -> PrefixEncoder:
        """Build both parts and load the mapper's tensors, strictly.

        Raises:
            CheckpointError: for other tensors or another encoder than those of the training.
        """
        section = config.vision_encoder.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        built = build_vision_encoder(section)
        check_identity(config.identity, {"vision_encoder": built.identity})
        mapper = build_mapper(
            config.mapper,
            encoder_dim=built.module.encoder_dim,
            num_tokens=built.module.num_tokens,
            lm_dim=lm_dim,
            embedding_rms=1.0,
        )
        own = {f"mapper.{name}": tensor for name, tensor in mapper.state_dict().items()}
        tensors = read_checkpoint(checkpoint)
        heads = {} if config.contrastive is None else {name for name in tensors if name.startswith("contrastive.")}
        copy_into(own, {name: tensor for name, tensor in tensors.items() if name not in heads}, str(checkpoint))
        return cls(config, built.module, mapper)

    @torch.no_grad()
    def map_features(self, image_features: Tensor) -> Tensor:
        """float[images, N, D_enc] -> prefix embeddings float32[images, P, D_lm]."""
        image_features = image_features.float()
        if self.config.unit_features:
            image_features = F.normalize(image_features, dim=-1)
        return self.mapper(image_features)


def check_supported(config: FrozenPrefixConfig) -> None:
    """Refuse checkpoints whose language model would need more than prefix embeddings.

    Raises:
        ConfigError: naming every such part.

    Example:
        >>> check_supported(model.config)
    """
    problems = []
    if config.fusion.type != "prefix":
        problems.append(
            f"engine: llama.cpp reads prefix embeddings, but fusion '{config.fusion.type}' changes the language model "
            f"inside; {_NEEDS_TORCH}"
        )
    for part in ("language_model", "vision_encoder"):
        if getattr(getattr(config, part), "peft", None) is not None:
            problems.append(f"engine: model.{part}.peft trains layers that llama.cpp does not have; {_NEEDS_TORCH}")
    if config.vision_encoder.trainable != "none":
        problems.append(f"engine: model.vision_encoder.trainable: its weights are in the checkpoint; {_NEEDS_TORCH}")
    if problems:
        raise ConfigError(problems)


def find_gguf(config: FrozenPrefixConfig, checkpoint: str | Path) -> Path:
    """The GGUF file of a checkpoint's language model.

    Raises:
        ConfigError: the language model is no GGUF file.
    """
    path = config.language_model.path
    if not path.split("#")[0].endswith(".gguf"):
        raise ConfigError(
            f"engine: llama.cpp reads GGUF files, but the language model of '{checkpoint}' is '{path}'; write one with "
            f"`frozenprefix export gguf {checkpoint} --out DIR --only-language-model`, and give it as --language-model"
        )
    return resolve(path)


def _check_same(config: FrozenPrefixConfig, gguf: Path, llama: LlamaCppModel, checkpoint: str) -> None:
    """Refuse a GGUF file of other weights than those of the training."""
    expected = config.identity.get("language_model", {}).get("sha256")
    if expected is None or expected in (llama.header.values.get(SHA256_KEY), file_sha256(gguf)):
        return
    raise CheckpointError(
        f"language_model: '{gguf}' does not hold the weights that '{checkpoint}' was trained with; give the GGUF file "
        f"of the training, or one that `frozenprefix export gguf` has written"
    )
