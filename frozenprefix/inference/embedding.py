"""Images and texts -> unit vectors, with any model that has both in one space."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from frozenprefix.assets import opening_checkpoint
from frozenprefix.config import inference_precision
from frozenprefix.config.base_recipe import DTYPES
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.images import BadImages
from frozenprefix.errors import ConfigError
from frozenprefix.inference.captioner import batched
from frozenprefix.models import auto  # noqa: F401 # makes its classes known to AutoConfig
from frozenprefix.models.checkpoint import checkpoint_config
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.registry import Registry
from frozenprefix.utils import content_hash


class EmbeddingModel(Protocol):
    """A model that maps images and texts to unit vectors in one space."""

    config: Any
    vision_encoder: Any

    @property
    def device(self) -> Any:
        """The device of the inputs."""

    def eval(self) -> Any:
        """Leave training mode."""

    def encode_image(self, *, image_features: Tensor) -> Tensor:
        """float[P, N, D_enc] -> float[P, D]."""

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64[T, L], int64[T, L] -> float[T, D]."""

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained tensors; with `config.identity` they identify the model."""


class EmbeddingProcessor(Protocol):
    """Prepares images and texts for an `EmbeddingModel`."""

    image_processor: Any

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts -> the keyword arguments of `encode_text`."""


def _load_locked(checkpoint: str, **options: Any) -> tuple[EmbeddingModel, EmbeddingProcessor]:
    from frozenprefix.models.contrastive import LockedImageTextModel, load_processor

    model = LockedImageTextModel.from_pretrained(checkpoint, **options)
    return model, load_processor(checkpoint, model.config)


def _load_prefix(checkpoint: str, **options: Any) -> tuple[EmbeddingModel, EmbeddingProcessor]:
    from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
    from frozenprefix.models.processing import FrozenPrefixProcessor

    model = FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint, **options)
    return model, FrozenPrefixProcessor.from_pretrained(checkpoint)


LOADERS: Registry[Any] = Registry("kind of model for retrieval")
LOADERS.register("locked_image_text")(_load_locked)
LOADERS.register("frozenprefix")(_load_prefix)


class Embedder:
    """Embeds image files and texts in batches.

    Args:
        model, processor: as saved together in a checkpoint.
        batch_size: images or texts embedded at once.

    Example:
        >>> from frozenprefix.models.contrastive.heads import ContrastiveHeads
        >>> model.contrastive = ContrastiveHeads(model.lm.dim, dim=8, loss="infonce")
        >>> Embedder(model, processor).embed_texts(["a dog", "a cat"]).shape
        (2, 8)
    """

    def __init__(self, model: EmbeddingModel, processor: EmbeddingProcessor, *, batch_size: int = 32):
        self.model = model
        self.model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.encoder = ImageEncoder.from_model(model, processor)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        batch_size: int = 32,
        language_model: str | Path | None = None,
        precision: str | None = None,
    ) -> Embedder:
        """Load a checkpoint folder or Hub id of any model in `LOADERS` onto `device` (a GPU when there is one).

        Args:
            language_model: where the checkpoint's language model lies, if it has moved.
            precision: of the frozen parts; by default that of the training, so that all vectors of an index are alike.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with opening_checkpoint(checkpoint):
            config = checkpoint_config(AutoConfig, checkpoint, language_model=language_model)
            dtype = None if precision is None else DTYPES[inference_precision(config, precision, device=device)]
            loaded = LOADERS.get(config.model_type)(str(checkpoint), config=config, dtype=dtype, device_map=device)
            return cls(*loaded, batch_size=batch_size)

    def fingerprint(self) -> str:
        """SHA-256 over the trained tensors, the identity of the frozen parts, and the preprocessing of images."""
        parts = [
            hash_tensors(self.model.trainable_state()),
            json.dumps(self.model.config.identity, sort_keys=True),
            self.processor.image_processor.to_json_string(),
        ]
        return content_hash("\n".join(parts))

    @torch.inference_mode()
    def embed_images(self, paths: Iterable[str | Path], bad: BadImages | None = None) -> tuple[list[Path], np.ndarray]:
        """Embed image files.

        Args:
            bad: collects the images that cannot be read, which are left out; without it the first one raises.

        Returns:
            The paths that could be read, and float32[n, D].
        """
        kept: list[Path] = []
        vectors: list[np.ndarray] = []
        for batch, features in self.encoder.batches(map(Path, paths), self.batch_size, bad):
            vectors.append(_array(self.model.encode_image(image_features=features.to(self.model.device))))
            kept += cast(list[Path], batch)
        return kept, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts, in batches of similar length: float32[n, D], in the order of `texts`."""
        if not texts:
            raise ConfigError("texts: got none, expected at least one")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = []
        for places in batched(order, self.batch_size):
            inputs = self.processor.prepare_texts([texts[i] for i in places])
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            vectors.append(_array(self.model.encode_text(**inputs)))
        joined = np.concatenate(vectors)
        out = np.empty_like(joined)
        out[order] = joined
        return out


def _array(embeds: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy()
