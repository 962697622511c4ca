"""Captions of similar training images, in the prompt or to choose among beams.

In the prompt: SmallCap (Ramos et al. 2023), section 3. To choose by: consensus reranking (Devlin et al. 2015, "Language
Models for Image Captioning: The Quirks and What Works", section 3.5). Both take the nearest images; here a ridge
regression weighs all of them, unless `images` says how many are looked at.

    retriever = CaptionRetriever.from_samples(train_samples, cache, RetrievalOptions())
    samples = retriever.with_prompts(samples, ImageLookup.from_cache(cache), prompt="")

Images are compared by features of the model's own encoder; SmallCap uses a second model. An image never gets its own
captions, whatever its file is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers.utils import cached_file

from frozenprefix.data.cache import FeatureCache, image_key
from frozenprefix.data.images import read_image
from frozenprefix.data.neighbours import CaptionVectors, NearestImages, RidgeWeights, ngram_counts
from frozenprefix.data.retrieval_options import RetrievalOptions
from frozenprefix.data.samples import Sample
from frozenprefix.errors import CheckpointError, DataError
from frozenprefix.models.processing import IMAGE_TOKEN
from frozenprefix.models.vision.precomputed import feature_table
from frozenprefix.utils import parse_json, read_text, write_text_atomic
from frozenprefix.utils.tensors import load_tensors, save_tensors

TEXTS_FILE, ARRAYS_FILE = "retrieval.json", "retrieval.safetensors"
# marks of a prompt, which are removed from captions
_MARKS = (IMAGE_TOKEN, "{question}")
_IMAGES_AT_ONCE = 64

Places = Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class ImageLookup:
    """How image files become keys (equal for equal images) and features float[n, N, D_enc].

    Example:
        >>> lookup = ImageLookup(keys=lambda paths: ["a"], features=lambda paths: [[[1.0, 0.0]]])
        >>> lookup.keys([image_path])
        ['a']
    """

    keys: Callable[[Sequence[Path]], Sequence[str]]
    features: Callable[[Sequence[Path]], ArrayLike]

    @classmethod
    def from_cache(cls, cache: FeatureCache) -> ImageLookup:
        """By a feature cache, or a table of precomputed features."""
        return cls(cache.keys_of, lambda paths: cache.get(cache.keys_of(paths)))


def image_keys(encoder: torch.nn.Module, paths: Places) -> list[str]:
    """Keys of image files, as the feature cache of this encoder has them.

    Raises:
        BadImageError: for a file that cannot be read.
    """
    table = feature_table(encoder)
    return [image_key(read_image(path)) for path in paths] if table is None else table.keys_of(paths)


class CaptionRetriever:
    """Captions of similar training images, from a datastore in the checkpoint.

    Args:
        keys: of the M training images.
        captions: at least one of each image.
        features: float16[M, D_enc], the mean over each image's feature vectors.
        vectors: of all captions, in order; counted when not given, and always to choose among beams, which takes the
            n-grams themselves.

    Example:
        >>> features = np.array([[1, 0], [0, 1]], np.float16)
        >>> retriever = CaptionRetriever(RetrievalOptions(), ["a", "b"], [["a dog"], ["a cat"]], features)
        >>> retriever([[[1.0, 0.1]]], ["a"])
        [['a cat']]
    """

    def __init__(
        self,
        options: RetrievalOptions,
        keys: Sequence[str],
        captions: Sequence[Sequence[str]],
        features: NDArray[np.float16],
        vectors: CaptionVectors | None = None,
    ):
        self.options, self.keys, self.captions, self.features = options, keys, captions, features
        self._saved = None if options.reranks else vectors
        self._row = {key: row for row, key in enumerate(keys)}
        self._texts = [text for texts in captions for text in texts]
        sizes = np.array([len(texts) for texts in captions])
        self._owner = np.repeat(np.arange(len(sizes)), sizes)  # the image of each caption
        # of each caption in its image's weight
        self._share = torch.from_numpy((1 / sizes)[self._owner].astype(np.float32))

    @classmethod
    def from_samples(
        cls, samples: Iterable[Sample], cache: FeatureCache, options: RetrievalOptions
    ) -> CaptionRetriever:
        """Build the datastore from training samples of task "caption"; equal images are one entry.

        Raises:
            DataError: for a sample with several images, or captions of fewer than two different images.
        """
        texts: dict[str, dict[str, None]] = {}
        listed = [sample for sample in samples if sample.task == "caption"]
        for key, sample in zip(cache.keys_of([_image(sample) for sample in listed]), listed, strict=True):
            texts.setdefault(key, {}).update(dict.fromkeys(filter(None, map(_plain, sample.targets))))
        captions = {key: list(each) for key, each in texts.items() if each}
        if len(captions) < 2:
            raise DataError(
                f"data.retrieval: data.train has captions of {len(captions)} different images, expected at least 2; "
                "an image's own captions are never retrieved"
            )
        keys = list(captions)
        blocks = [keys[start : start + _IMAGES_AT_ONCE] for start in range(0, len(keys), _IMAGES_AT_ONCE)]
        features = np.concatenate([_pooled(cache.get(block)) for block in blocks])
        return cls(options, keys, list(captions.values()), features)

    def __call__(self, features: ArrayLike, keys: Sequence[str]) -> list[list[str]]:
        """Captions for images, those first that agree best with the prediction, or with those of the nearest images.

        Args:
            features: float[n, N, D_enc].
            keys: of the same images; captions of a training image with the same key are left out.
        """
        pooled, own = _pooled(features), self._own(keys)
        if self.options.images is not None:
            nearest = self._nearest(pooled, self.options.images, exclude=own)
            return [self._one_of_each(self._agreeing(rows), None) for rows in nearest]
        chosen = []
        for start in range(0, len(pooled), _IMAGES_AT_ONCE):
            block = slice(start, start + _IMAGES_AT_ONCE)
            weights = self._caption_weights(pooled[block], own[block])
            scores = self._vectors.scores(self._vectors.weighted_sum(weights)).numpy()
            ranked = np.argsort(-scores, axis=1, kind="stable")
            chosen += [self._one_of_each(line, row) for line, row in zip(ranked, own[block], strict=True)]
        return chosen

    def agreement(
        self, texts: Sequence[Sequence[str]], features: ArrayLike, keys: Sequence[str]
    ) -> list[NDArray[np.float64]]:
        """How well each text of an image agrees with the captions that are predicted for it: float[texts] each.

        The weighted mean of the texts' tf-idf cosines with all training captions, averaged over n-grams of one to four
        words, about 0 to 1.

        Args:
            texts: any number for each image.
            features, keys: as of `__call__`.

        Example:
            >>> features = np.array([[1, 0], [0, 1]], np.float16)
            >>> options = RetrievalOptions(use="rerank", images=1)
            >>> retriever = CaptionRetriever(options, ["a", "b"], [["a dog"], ["a cat"]], features)
            >>> retriever.agreement([["a cat", "a dog"]], [[[1.0, 0.1]]], ["a"])[0].round(2).tolist()
            [1.0, 0.0]
        """
        sums = self._vectors.weighted_sum(self._caption_weights(_pooled(features), self._own(keys)))
        return [
            self._vectors.similarity([ngram_counts(_words(text)) for text in written], total)
            for written, total in zip(texts, sums.T.contiguous(), strict=True)
        ]

    def _own(self, keys: Sequence[str]) -> list[int | None]:
        return [self._row.get(key) for key in keys]

    def _caption_weights(self, pooled: NDArray[np.float16], own: Sequence[int | None]) -> Tensor:
        """The weight of every training caption, float32[n, captions]; those of an image sum to one."""
        if self.options.images is None:
            return self._ridge(pooled, exclude=own)[:, self._owner] * self._share
        weights = torch.zeros(len(pooled), len(self._owner))
        for line, rows in zip(weights, self._nearest(pooled, self.options.images, exclude=own), strict=True):
            near = torch.from_numpy(np.isin(self._owner, rows))
            line[near] = 1 / near.sum()
        return weights

    @cached_property
    def _ridge(self) -> RidgeWeights:
        return RidgeWeights(self.features, self.options.ridge)

    @cached_property
    def _nearest(self) -> NearestImages:
        return NearestImages(self.features)

    @cached_property
    def _vectors(self) -> CaptionVectors:
        counts = ([ngram_counts(_words(text)) for text in texts] for texts in self.captions)
        return self._saved or CaptionVectors.from_counts(list(counts))

    def prompts(self, prompts: Sequence[str], features: ArrayLike, keys: Sequence[str]) -> list[str]:
        """Prompts with captions in front of them, one for each image; see `__call__`."""
        retrieved = self(features, keys)
        return [self.options.prompt(texts, prompt) for texts, prompt in zip(retrieved, prompts, strict=True)]

    def with_prompts(
        self,
        samples: Sequence[Sample],
        lookup: ImageLookup,
        *,
        prompt: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """The samples; those of task "caption" with retrieved captions in `Sample.prompt`.

        Args:
            prompt: the task's own prompt, for samples without one.
            progress: called with the numbers of images done and in all.

        Raises:
            DataError: for a caption sample with several images.
        """
        paths = list(dict.fromkeys(_image(sample) for sample in samples if sample.task == "caption"))
        captions: dict[Path, list[str]] = {}
        for start in range(0, len(paths), _IMAGES_AT_ONCE):
            block = paths[start : start + _IMAGES_AT_ONCE]
            captions |= zip(block, self(lookup.features(block), lookup.keys(block)), strict=True)
            if progress is not None:
                progress(len(captions), len(paths))

        prompted = []
        for sample in samples:
            if sample.task == "caption":
                own = prompt if sample.prompt is None else sample.prompt
                sample = replace(sample, prompt=self.options.prompt(captions[sample.images[0]], own))
            prompted.append(sample)
        return prompted

    def _one_of_each(self, ranked: Iterable[int], own: int | None) -> list[str]:
        """The first captions of a ranking, at most one of each image, no wording twice, and none of its own."""
        taken = {own}
        chosen: dict[tuple[str, ...], str] = {}  # by words
        for place in ranked:
            text, owner = self._texts[place], int(self._owner[place])
            words = tuple(_words(text)) or (text,)
            if owner not in taken and words not in chosen:
                taken.add(owner)
                chosen[words] = text
            if len(chosen) == self.options.captions:
                break
        return list(chosen.values())

    def _agreeing(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The captions of some images, those first that agree best with each other."""
        candidates = np.concatenate([np.flatnonzero(self._owner == row) for row in rows])
        return candidates[np.argsort(-self._vectors.agreement(candidates), kind="stable")]

    def save(self, folder: Path) -> None:
        """Write the datastore into a checkpoint folder, as JSON and safetensors."""
        texts = {"options": self.options.used(), "keys": list(self.keys), "captions": list(map(list, self.captions))}
        write_text_atomic(folder / TEXTS_FILE, json.dumps(texts, ensure_ascii=False))
        arrays = {"features": self.features}
        if not self.options.reranks:
            arrays["columns"] = self._vectors.columns.astype(np.int32)
            arrays["weights"] = self._vectors.weights.astype(np.float32)
            arrays["starts"] = self._vectors.starts.astype(np.int64)
        save_tensors({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / ARRAYS_FILE)

    @classmethod
    def load(cls, checkpoint: str | Path) -> CaptionRetriever | None:
        """Read the datastore of a checkpoint folder or Hub id; None if the checkpoint has none.

        Raises:
            CheckpointError: it is damaged or incomplete.
        """
        texts, arrays = (_saved_file(checkpoint, name) for name in (TEXTS_FILE, ARRAYS_FILE))
        if texts is None and arrays is None:
            return None
        try:
            if texts is None or arrays is None:
                raise ValueError(f"{TEXTS_FILE if texts is None else ARRAYS_FILE} is missing")
            loaded = {name: tensor.numpy() for name, tensor in load_tensors(arrays).items()}
            return cls._from_saved(parse_json(read_text(texts)), loaded)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint}: the captions to retrieve from cannot be read ({error}); take another checkpoint"
            ) from error

    @classmethod
    def _from_saved(cls, texts: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> CaptionRetriever:
        options, keys, captions = RetrievalOptions(**texts["options"]), texts["keys"], texts["captions"]
        sizes, held = [len(keys), len(captions)], [len(arrays["features"])] * 2
        vectors = None
        if not options.reranks:
            vectors = CaptionVectors(arrays["columns"], arrays["weights"], arrays["starts"])
            sizes.append(sum(map(len, captions)))
            held.append(len(vectors.starts) - 1)
        if sizes != held:
            raise ValueError(f"got keys, lists of captions and captions {tuple(sizes)}, expected {tuple(held)}")
        return cls(options, keys, captions, arrays["features"], vectors)


def _image(sample: Sample) -> Path:
    if len(sample.images) != 1:
        raise DataError(f"data.retrieval: {sample.label} has {len(sample.images)} images, expected 1")
    return sample.images[0]


def _plain(text: str) -> str:
    """A caption in one line, without the marks of a prompt."""
    for mark in _MARKS:
        text = text.replace(mark, " ")
    return " ".join(text.split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _pooled(features: ArrayLike) -> NDArray[np.float16]:
    """float[n, N, D] → float16[n, D], rounded as in the datastore, so that training images keep their neighbours."""
    return np.asarray(features, dtype=np.float32).mean(axis=1).astype(np.float16)


def _saved_file(checkpoint: str | Path, name: str) -> Path | None:
    try:
        return Path(str(cached_file(str(checkpoint), name)))
    except OSError:
        return None
