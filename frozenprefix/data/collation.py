"""From images and their samples to model inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset

from frozenprefix.data.augmentation import Augmentation
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.images import load_image
from frozenprefix.data.samplers import ImageStream, choose_targets
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.data.streaming.groups import TrainingSet
from frozenprefix.errors import BadImageError, DataError, FrozenPrefixError
from frozenprefix.models.packing import PackedBatch, Packing, Target, pack
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.utils import report

_TARGETS_AT_ONCE = 4096  # encoded in one call of the tokenizer


class Collator:
    """Turns groups of samples that share images into `{"packed": …, "image_features" or "pixel_values": …}`.

    Args:
        processor: tokenizer, image processor and prompts.
        features: cached features; None decodes the images.
        packing, tokens_per_row: see `models.packing.pack`.
        max_target_tokens: longer targets are cut (the end token still follows), and counted.
        keep_samples: add the groups and targets of the batch as `samples`: a list of (group, [(sample, target), …]).
        remember: keep the token ids of every text, which occurs once an epoch; False for streams, which may be endless.
            Targets are then checked in the step that takes them.
        positions: with `remember=False`, tokens that an LM with learned positions can read; None: any number.

    Example:
        >>> sample = Sample("1", (image_path,), ("a dog",))
        >>> batch = Collator(processor)([ImageGroup(sample.images, (sample,))], [[(sample, "a dog")]])
        >>> sorted(batch), batch["pixel_values"].shape
        (['packed', 'pixel_values'], torch.Size([1, 3, 32, 32]))
    """

    def __init__(
        self,
        processor: FrozenPrefixProcessor,
        features: FeatureCache | None = None,
        *,
        packing: Packing = "trie",
        tokens_per_row: int | None = None,
        max_target_tokens: int | None = None,
        keep_samples: bool = False,
        remember: bool = True,
        positions: int | None = None,
    ):
        self.processor = processor
        self.features = features
        self.packing = packing
        self.tokens_per_row = tokens_per_row
        self.max_target_tokens = max_target_tokens
        self.keep_samples = keep_samples
        self.remember, self.positions = remember, positions
        self.cut_targets: list[str] = []  # each once
        self._prompt_ids: dict[str, list[int]] = {}
        self._target_ids: dict[tuple[str, str], list[int]] = {}

    def __call__(
        self,
        groups: Sequence[ImageGroup],
        chosen: Sequence[Sequence[tuple[Sample, str]]],
        image_inputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Collate images with the (sample, target) pairs chosen for each.

        Args:
            image_inputs: what the model sees of the images, in place of the whole ones; see `Augmentation`.
        """
        if image_inputs is None:
            image_inputs = self.image_inputs([path for group in groups for path in group.images])
        batch: dict[str, Any] = {**image_inputs}
        batch["packed"] = self.pack(chosen, [len(group.images) for group in groups])
        if self.keep_samples:
            batch["samples"] = list(zip(groups, chosen, strict=True))
        return batch

    def pack(self, chosen: Sequence[Sequence[tuple[Sample, str]]], images_per_group: Sequence[int]) -> PackedBatch:
        """Packed rows of the (sample, target) pairs of each group of images."""
        if self.remember:
            targets = [[self.target(sample, text) for sample, text in pairs] for pairs in chosen]
        else:
            targets = self._checked_targets(chosen)
        return pack(
            targets,
            image_token_id=self.processor.image_token_id,
            prefix_length=self.processor.prefix_length,
            images_per_group=images_per_group,
            packing=self.packing,
            tokens_per_row=self.tokens_per_row,
        )

    def image_inputs(self, paths: Sequence[Path]) -> dict[str, Tensor]:
        """Model inputs of images: `image_features` float[n, N, D_enc] or `pixel_values` float[n, 3, H, W], if any."""
        if not paths:
            return {}
        if self.features is not None:
            keys = [self.features.key_of(path) for path in paths]
            return {"image_features": torch.from_numpy(self.features.get(keys)).float()}
        return dict(self.processor.image_processor([load_image(path) for path in paths], return_tensors="pt"))

    def target(self, sample: Sample, text: str) -> Target:
        """Token ids of one prompt and target."""
        # Prompts occur in many samples and targets in every epoch, so that each text is tokenized once.
        prompt = prompt_of(sample, self.processor)
        if prompt not in self._prompt_ids:
            self._prompt_ids[prompt] = self.processor.encode_prompt(prompt)
        if (prompt, text) not in self._target_ids:
            ids = self.processor.encode_target(prompt, text)
            if self.max_target_tokens is not None and len(ids) > self.max_target_tokens:
                self.cut_targets.append(text)
                ids = self.processor.encode_target(prompt, text, self.max_target_tokens)
            self._target_ids[prompt, text] = ids
        context = self._prompt_ids[prompt]
        return Target([*context, *self._target_ids[prompt, text]], len(context))

    def _checked_targets(self, chosen: Sequence[Sequence[tuple[Sample, str]]]) -> list[list[Target]]:
        """The targets of a batch, checked; nothing is remembered."""
        self._encode_ahead((sample, text) for pairs in chosen for sample, text in pairs)
        try:
            return [[self.check(sample, text, self.positions) for sample, text in pairs] for pairs in chosen]
        finally:
            for remembered in (self._prompt_ids, self._target_ids, self.cut_targets):
                remembered.clear()

    def check_targets(self, groups: Iterable[ImageGroup], positions: int | None = None, *, where: str = "data") -> None:
        """Encode every target, so that a text that cannot be learned is known before the first step.

        Targets that are too long are counted in the log, each different one once.

        Args:
            where: names the samples in messages: "data.train".
            positions: tokens that an LM with learned positions can read; None where nothing limits them.

        Raises:
            DataError: naming the sample, its file and its line.
        """
        pairs = [(sample, text) for group in groups for sample in group.samples for text in sample.targets]
        self._encode_ahead(pairs)
        known = len(self.cut_targets)
        for sample, text in pairs:
            self.check(sample, text, positions)
        different = {text for _, text in pairs}
        cut = dict.fromkeys(self.cut_targets[known:])
        reason = f"longer than training.max_target_tokens = {self.max_target_tokens}"
        examples = [text[:80] for text in cut]
        report(where, len(different), {reason: len(cut)}, done="cut", what="targets", examples=examples)

    def check(self, sample: Sample, text: str, positions: int | None) -> Target:
        """`target`, or an error that names the sample; see `check_targets`."""
        try:
            target = self.target(sample, text)
        except (FrozenPrefixError, TemplateError, ValueError) as error:
            raise DataError(f"{sample.label}: {error}") from error
        length = len(target.input_ids)
        if positions is not None and length > positions + 1:  # the last token is not read
            raise DataError(
                f"{sample.label}: prompt and target take {length} tokens, but the language model has "
                f"learned {positions} positions; shorten the prompt, or lower training.max_target_tokens"
            )
        marks = list(target.input_ids).count(self.processor.image_token_id) // self.processor.prefix_length
        if marks != len(sample.images):
            raise DataError(
                f"{sample.label}: the prompt has {marks} <image> marks, expected {len(sample.images)}, one "
                "for each image"
            )
        return target

    def _encode_ahead(self, pairs: Iterable[tuple[Sample, str]]) -> None:
        """Put the ids of the targets into the cache in large batches. Texts with a problem are left to `target`."""
        texts: dict[tuple[str, str], None] = {}
        prompt, of = "", None
        for sample, text in pairs:
            try:
                if sample is not of:
                    prompt, of = prompt_of(sample, self.processor), sample
            except (FrozenPrefixError, TemplateError, ValueError):
                continue
            if text.strip():
                texts[prompt, text] = None
        todo = list(texts)
        for start in range(0, len(todo), _TARGETS_AT_ONCE):
            block = todo[start : start + _TARGETS_AT_ONCE]
            for pair, ids in zip(block, self.processor.encode_targets(block), strict=True):
                if self.max_target_tokens is None or len(ids) <= self.max_target_tokens:
                    self._target_ids[pair] = ids


def prompt_of(sample: Sample, processor: FrozenPrefixProcessor) -> str:
    """The text in front of a sample's target, with an `<image>` mark for each of its images.

    Example:
        >>> prompt_of(Sample("1", (image_path,), (), prompt="A photo of"), processor)
        '<image>A photo of'
    """
    if sample.history is not None:
        return processor.chat_prompt(sample.history, sample.question or "", images=len(sample.images))
    return processor.prompt_for(sample.task, sample.question, template=sample.prompt, images=len(sample.images))


class StepDataset(Dataset):
    """Micro-batch number i of this process, collated; it does not depend on earlier ones.

    Args:
        groups: training images with their samples; a `TrainingSet` reads those of shards when they are asked for.
        stream: the images of each optimizer step.
        collator: builds the batch.
        targets_per_image: targets of an image in one step; None takes all.
        num_parts: micro-batches that a step is divided into, over all processes.
        parts: numbers of those of this process.
        augmentation: the views of the images; None shows the whole ones.

    Example:
        >>> sample = Sample("1", (image_path,), ("a dog",))
        >>> groups = [ImageGroup(sample.images, (sample,))]
        >>> len(StepDataset(groups, ImageStream(1, 1, seed=0), Collator(processor), num_steps=3))
        3
    """

    def __init__(
        self,
        groups: Sequence[ImageGroup],
        stream: ImageStream,
        collator: Collator,
        *,
        num_steps: int,
        targets_per_image: int | None = None,
        num_parts: int = 1,
        parts: Sequence[int] = (0,),
        augmentation: Augmentation | None = None,
    ):
        self.augmentation = augmentation
        self.groups, self.stream, self.collator = groups, stream, collator
        self.streamed = isinstance(groups, TrainingSet) and groups.streamed
        self.num_steps, self.targets_per_image = num_steps, targets_per_image
        self.num_parts, self.parts = num_parts, list(parts)

    def __len__(self) -> int:
        return self.num_steps * len(self.parts)

    def images_of(self, index: int) -> list[tuple[int, int]]:
        """Epoch and number of each image of a micro-batch."""
        step, micro = divmod(index, len(self.parts))
        # part k of n takes every n-th image
        return self.stream.step(step)[self.parts[micro] :: self.num_parts]

    def ids_of(self, index: int) -> list[str]:
        """Ids of the samples that the images of a micro-batch have, without those that cannot be read."""
        groups, _ = self._read(index)
        return [sample.id for _, _, group in groups for sample in group.samples]

    def _read(self, index: int) -> tuple[list[tuple[int, int, ImageGroup]], list[BadImage]]:
        """Epoch, number and group of each image of a micro-batch, and what could not be read."""
        groups, bad = [], []
        for epoch, image in self.images_of(index):
            try:
                groups.append((epoch, image, self.groups[image]))
            except BadImageError as error:
                assert isinstance(self.groups, TrainingSet)  # others are in memory
                bad.append(BadImage(self.groups.name_of(image), error.reason, str(error)))
        return groups, bad

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The batch; of images in shards also `bad`, those that are left out of it.

        Raises:
            DataError: not one image of the micro-batch can be used.
        """
        read, bad = self._read(index)
        try:
            batch = self._collate(read, index, bad)
        except BadImageError:
            if not self.streamed:
                raise
            # images of shards are decoded here, and not before
            read, broken = divide_by_image(read)
            bad += broken
            batch = self._collate(read, index, bad)
        return batch | {"bad": bad} if bad else batch

    def _collate(
        self, read: Sequence[tuple[int, int, ImageGroup]], index: int, bad: Sequence[BadImage]
    ) -> dict[str, Any]:
        if not read:
            raise DataError(
                f"step {index // len(self.parts) + 1}: not one image of a micro-batch can be used "
                f"({'; '.join(item.message for item in bad[:3])}); repair the shards, or raise training.images_per_step"
            )
        chosen, seed = [], self.stream.seed
        for epoch, image, group in read:
            pairs = [(sample, text) for sample in group.samples for text in sample.targets]
            chosen.append(choose_targets(pairs, self.targets_per_image, seed=seed, image=image, epoch=epoch))
        views = {} if self.augmentation is None else {"image_inputs": self.augmentation.inputs(read)}
        return self.collator([group for _, _, group in read], chosen, **views)


class BadImage(NamedTuple):
    """An image that a step has left out."""

    name: str
    reason: str
    message: str


def divide_by_image(
    read: Sequence[tuple[int, int, ImageGroup]],
) -> tuple[list[tuple[int, int, ImageGroup]], list[BadImage]]:
    """Images that can be decoded, and those that cannot."""
    good, bad = [], []
    for item in read:
        try:
            for path in item[2].images:
                load_image(path)
            good.append(item)
        except BadImageError as error:
            bad.append(BadImage(str(path), error.reason, str(error)))
    return good, bad
