"""The loss of a step: what is learned from a batch, in weighted parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from frozenprefix.config.objectives import ContrastiveObjective, DistillationSection, Weight
from frozenprefix.data.collation import Collator
from frozenprefix.data.samplers import ImageStream
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.metrics.recall import first_ranks
from frozenprefix.evaluation.text_ability import read_text, text_windows
from frozenprefix.models.contrastive.losses import contrastive_loss
from frozenprefix.models.language_model.loading import cap
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor

TEXTS = 128  # texts that are encoded at once in validation
CHUNK = 256  # rows of logits at a time
PIECE = 64  # tokens of a piece of the text that the LM is kept near on
Batch = dict[str, Any]


class Objective(Protocol):
    """A part of the loss beside the LM's own.

    Attributes:
        name: as in the recipe and the log; weight: as there.
        figures: what else there is to log of the latest batch.
    """

    name: str
    weight: Weight
    figures: dict[str, float]

    def prepare(self, batch: Batch, number: int) -> None:
        """Add to a batch what the loss needs; `number` counts the micro-batches of the run, over all processes."""

    def count(self, batch: Batch) -> int:
        """What the loss of this batch is a mean over."""

    def loss(self, batch: Batch, prefix_embeds: Tensor) -> Tensor:
        """Scalar, with gradient."""

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """Measures on validation images, taken `size` at a time."""


class Contrastive:
    """Images near their captions and away from those of others, through the model's heads (Koh et al. 2023)."""

    name = "contrastive"

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        section: ContrastiveObjective,
    ):
        self.model, self.processor, self.section, self.weight = model, processor, section, section.weight
        self.figures: dict[str, float] = {}

    def prepare(self, batch: Batch, number: int) -> None:
        ids = [_image_id(group) for group, _ in batch["samples"]]
        texts = [id_ for id_, (_, pairs) in zip(ids, batch["samples"], strict=True) for _ in pairs]
        batch["image_ids"] = torch.tensor(ids, device=self.model.device)
        batch["text_ids"] = torch.tensor(texts, device=self.model.device)

    def count(self, batch: Batch) -> int:
        return 1  # the loss is one number for the images and texts of all processes

    def loss(self, batch: Batch, prefix_embeds: Tensor) -> Tensor:
        return contrastive_loss(
            self.section.loss,
            self.model.heads.logit_scale,
            self.model.encode_prefix(prefix_embeds),
            self.model.encode_text(**batch["texts"]),
            batch["image_ids"],
            batch["text_ids"],
        )

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """`recall@1` between all images and all their captions, the mean of both directions."""
        samples = [(i, sample) for i, group in enumerate(groups) for sample in group.samples]
        texts = [(i, text) for i, sample in samples if sample.task == "caption" for text in sample.targets]
        if not texts:
            return {}
        owners = torch.tensor([owner for owner, _ in texts])
        shown = owners.unique().tolist()
        images, captions = [], []
        for start in range(0, len(shown), size):
            inputs = collator.image_inputs([groups[i].images[0] for i in shown[start : start + size]])
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            images.append(self.model.encode_image(**inputs).cpu())
        for start in range(0, len(texts), TEXTS):
            part = self.processor.prepare_texts([text for _, text in texts[start : start + TEXTS]])
            inputs = {name: value.to(self.model.device) for name, value in part.items()}
            captions.append(self.model.encode_text(**inputs).cpu())
        cosines = (torch.cat(images) @ torch.cat(captions).t()).numpy()
        right = [(owners == i).nonzero().flatten().tolist() for i in shown]
        found = first_ranks(cosines, right), first_ranks(cosines.T, [[shown.index(i)] for i in owners.tolist()])
        return {"recall@1": sum(float((ranks == 1).mean()) for ranks in found) / 2}


class Distillation:
    """Keeps the next-token distributions of the adapted LM near those of the bare LM, on text alone.

    The loss is KL(bare || adapted), a mean over tokens. The bare LM is the same one with its adapters switched off.

    Args:
        pieces: token ids of a text that is learned on; None learns on the targets of the batch.
        images: images of a micro-batch, which takes as many pieces.
    """

    name = "distillation"

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        section: DistillationSection,
        pieces: list[list[int]] | None,
        images: int,
        seed: int,
    ):
        self.model, self.weight, self.pieces = model, section.weight, pieces
        self.stream = None if pieces is None else ImageStream(len(pieces), images, seed)
        self.figures: dict[str, float] = {}

    def prepare(self, batch: Batch, number: int) -> None:
        if self.pieces is None or self.stream is None:
            batch["kept"] = batch["texts"]
            return
        taken = [torch.tensor(self.pieces[piece]) for _, piece in self.stream.step(number)]
        ids = nn.utils.rnn.pad_sequence(taken, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(piece) for piece in taken], batch_first=True)
        batch["kept"] = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def count(self, batch: Batch) -> int:
        return int(batch["kept"]["attention_mask"][:, 1:].sum())

    def loss(self, batch: Batch, prefix_embeds: Tensor) -> Tensor:
        _, head, softcap = self.model.parts()
        # states that predict a token of their text: [K, D_lm]
        predicts = batch["kept"]["attention_mask"][:, 1:].bool()
        with torch.no_grad(), self.model.bare_language_model():
            bare = self.model.text_states(**batch["kept"])[:, :-1][predicts]
        adapted = self.model.text_states(**batch["kept"])[:, :-1][predicts]
        chunks = zip(bare.split(CHUNK), adapted.split(CHUNK), strict=True)
        # logits of one chunk at a time, made again for the backward pass
        parts = [checkpoint(_divergence, head, softcap, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(parts).sum() / len(bare)

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        return {}


def _divergence(head: nn.Module, softcap: float | None, bare: Tensor, adapted: Tensor) -> Tensor:
    """Sum over rows of KL(bare || adapted) of the distributions behind hidden states float[K, D_lm]."""
    wanted, found = (_log_probabilities(head, softcap, hidden) for hidden in (bare, adapted))
    return F.kl_div(found, wanted, reduction="sum", log_target=True)


def _log_probabilities(head: nn.Module, softcap: float | None, hidden: Tensor) -> Tensor:
    return cap(head(hidden).float(), softcap).log_softmax(dim=-1)


class Objectives(nn.Module):
    """A model and the parts of its loss: what is trained, and wrapped for several processes, in place of the model.

    Args:
        lm: weight of the LM's own loss; others: the further parts.
        noise: variance of the noise on image features in training; for texts in the place of images.
        max_target_tokens: longer texts are cut.
    """

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        *,
        lm: Weight = 1.0,
        others: Sequence[Objective] = (),
        noise: float = 0.0,
        max_target_tokens: int | None = None,
    ):
        super().__init__()
        self.model = model
        self.weights: dict[str, Weight] = {"lm": lm, **{other.name: other.weight for other in others}}
        self._processor, self._others = processor, list(others)
        self._noise, self._max_target_tokens = noise, max_target_tokens

    @property
    def names(self) -> list[str]:
        """The parts that ever count."""
        return [name for name, weight in self.weights.items() if weight not in (0.0, (0.0, 0.0))]

    @torch.no_grad()
    def prepare(self, batch: Batch, number: int) -> Batch:
        """Make a collated batch ready for `forward`; see `Objective.prepare`."""
        if self._noise:
            features = batch["image_features"]
            noise = torch.randn_like(features) * self._noise**0.5
            batch["image_features"] = F.normalize(features + noise, dim=-1)
        if self._others:
            texts = [text for _, pairs in batch["samples"] for _, text in pairs]
            prepared = self._processor.prepare_texts(texts, self._max_target_tokens)
            batch["texts"] = {name: value.to(self.model.device) for name, value in prepared.items()}
        for other in self._others:
            other.prepare(batch, number)
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        """What each part's loss is a mean over."""
        counts = {"lm": batch["packed"].num_tokens, **{other.name: other.count(batch) for other in self._others}}
        return {name: counts[name] for name in self.names}

    @property
    def figures(self) -> dict[str, float]:
        """What the parts say of the latest batch beside their losses."""
        return {f"{o.name}/{name}": value for o in self._others for name, value in o.figures.items()}

    @torch.no_grad()
    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """Measures of the further parts on validation images."""
        training = self.model.training
        self.model.eval()
        values: dict[str, float] = {}
        for other in self._others:
            values |= other.validate(collator, groups, size)
        self.model.train(training)
        return values

    def best_by(self, values: dict[str, float]) -> tuple[str, float]:
        """What the best checkpoint is chosen by, and how good it is, lower is better: the validation loss, or for
        self-critical training, under which that loss rises, minus CIDEr-D; without the LM's loss minus Recall@1."""
        for name in ("cider_d", "recall@1") if "lm" not in self.names else ("cider_d",):
            if name in values:
                return f"minus {name}", -values[name]
        return "loss", values["loss"]

    def forward(self, batch: Batch, factors: dict[str, float]) -> dict[str, Tensor]:
        """Each part's loss times its factor."""
        images = {name: batch[name] for name in ("pixel_values", "image_features") if name in batch}
        losses: dict[str, Tensor] = {}
        if "lm" in factors:
            output = self.model(**images, packed=batch["packed"])
            losses["lm"], prefix_embeds = output.loss * factors["lm"], output.prefix_embeds
        else:
            prefix_embeds = self.model.prefix(**images)
        for other in self._others:
            if other.name in factors:
                losses[other.name] = other.loss(batch, prefix_embeds) * factors[other.name]
        return losses


def check_captions(samples: Sequence[Sample], key: str) -> None:
    """Refuse training data that holds more than captions of single images.

    Raises:
        ConfigError: for an objective that cannot use it; `key` names the objective.
    """
    for sample in samples:
        if sample.task != "caption" or len(sample.images) != 1:
            raise ConfigError(
                f"{key}: learns from captions of one image each; data.train holds sample '{sample.id}' of task "
                f"'{sample.task}' with {len(sample.images)} images"
            )


def distillation_pieces(processor: FrozenPrefixProcessor, texts: str) -> list[list[int]] | None:
    """Token ids of a text file in pieces, or None for 'targets'."""
    if texts == "targets":
        return None
    key = "objectives.distillation.texts"
    try:
        return text_windows(processor.tokenizer, read_text(texts, key), PIECE)
    except DataError as error:
        raise DataError(f"{key}: '{texts}': {error}") from error


def _image_id(group: ImageGroup) -> int:
    """The same number for the same images in every process."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, group.images)).encode()).digest()[:7], "big")
