"""Classification: which of some labels an image makes likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frozenprefix.data.image_encoder import ImageInput
from frozenprefix.errors import ConfigError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.likelihood import log_likelihoods
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing import Target
from frozenprefix.models.processing import FrozenPrefixProcessor

LABEL_MARK = "{label}"
Images = Sequence[ImageInput] | Tensor
Normalise = Literal["sum", "mean"]


@dataclass(frozen=True)
class Classification:
    """An image's most likely label, and the softmax of the scores of all labels.

    Example:
        >>> Classification("cat", {"cat": 0.75, "dog": 0.25}).probabilities["dog"]
        0.25
    """

    label: str
    probabilities: dict[str, float]


class Classifier:
    """Scores labels by the likelihood that the language model gives them after an image and a prompt.

    All labels of an image, after all prompts, are read in one row: the image's prefix is computed once for them.

    Args:
        model, processor: as saved together in a checkpoint.
        templates: prompts, such as "A photo of a"; a label follows each after a space, or replaces
            "{label}": "A photo of a {label}." The scores of several are averaged. Without any, the processor's prompt
            of task "classification".
        calibrate: subtract the log-likelihood of a label without the image, so that common words do not win by
            themselves. What is left is the pointwise mutual information of image and label (Holtzman et al. 2021,
            "Surface Form Competition"). It costs accuracy where the mapper has learned such labels, and with them how
            common they are: one early quickstart model named the colour of 42 % of 120 validation drawings without it
            and of 21 % with it.
        normalise: "sum" over a label's tokens, or their "mean".
        end_token: let the text end after the label. Then "dog" is not also the beginning of "dog house"; a model that
            has not learned where texts of this kind end is better judged without.
        batch_size: images at once.

    Example:
        >>> classifier = Classifier(model, processor, templates=["A photo of a"])
        >>> classifier.scores([image], ["circle", "square"]).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        *,
        templates: Sequence[str] | None = None,
        calibrate: bool = False,
        normalise: Normalise = "sum",
        end_token: bool = False,
        batch_size: int = 16,
    ):
        if isinstance(templates, str) or (templates is not None and not templates):
            raise ConfigError(f"templates: got {templates!r}, expected a list of at least one prompt")
        if normalise not in ("sum", "mean"):
            raise ConfigError(f"normalise: got {normalise!r}, expected 'sum' or 'mean'")
        self.captioner = Captioner(model, processor, batch_size=batch_size)
        self.model, self.processor = self.captioner.model, processor
        self.templates = list(templates or [processor.prompts["classification"]])
        self.calibrate, self.normalise, self.end_token = calibrate, normalise, end_token
        self.batch_size = batch_size

    def classify(self, images: Images, labels: Sequence[str]) -> list[Classification]:
        """The most likely label of each image; see `scores`."""
        classifications = []
        for row in self.scores(images, labels):
            probabilities = dict(zip(labels, row.softmax(dim=0).tolist(), strict=True))
            classifications.append(Classification(labels[int(row.argmax())], probabilities))
        return classifications

    @torch.inference_mode()
    def scores(self, images: Images, labels: Sequence[str]) -> Tensor:
        """Score every label for every image: float32[B, L], larger is likelier.

        Args:
            images: files, PIL images, or image features float[B, N, D_enc].

        Raises:
            ConfigError: for no label, or one that occurs twice.
            DataError: for an empty label.
            BadImageError: for an image that cannot be read.
        """
        targets = self._targets(labels)
        prior = self.blind_scores(labels) if self.calibrate else torch.zeros(len(labels))
        rows = []
        for start in range(0, len(images), self.batch_size):
            features = self.captioner.encoder(images[start : start + self.batch_size])
            prefix_embeds = self.model.map_features(features.to(self.model.device))
            values = log_likelihoods(self.model, [targets] * len(features), prefix_embeds, rows_at_once=self.batch_size)
            rows += [self._combined(value, targets) for value in values]
        return torch.stack(rows) - prior if rows else torch.zeros(0, len(labels))

    @torch.inference_mode()
    def blind_scores(self, labels: Sequence[str]) -> Tensor:
        """Score every label without an image: float32[L]."""
        targets = []
        for target, prompt in zip(self._targets(labels), self._prompts(len(labels)), strict=True):
            # the tokens of the label are those that it has after the image
            context = self.processor.encode_prompt(self.captioner.blind_prompt(prompt))
            targets.append(Target([*context, *target.input_ids[target.num_context :]], len(context)))
        return self._combined(log_likelihoods(self.model, [targets])[0], targets)

    def _prompts(self, repeats: int) -> list[str]:
        """The prompt of every target."""
        heads = [template.partition(LABEL_MARK)[0].rstrip(" ") for template in self.templates]
        return [self.processor.with_image(head) for head in heads for _ in range(repeats)]

    def _targets(self, labels: Sequence[str]) -> list[Target]:
        """Every label after every template: the labels of the first one, then those of the second, …"""
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if isinstance(labels, str) or not labels or repeated:
            got = f"{', '.join(repeated)} more than once" if repeated else repr(labels)
            raise ConfigError(f"labels: got {got}, expected a list of different labels")
        tails = [template.partition(LABEL_MARK)[2] for template in self.templates for _ in labels]
        targets = []
        for prompt, tail, label in zip(
            self._prompts(len(labels)), tails, list(labels) * len(self.templates), strict=True
        ):
            context = self.processor.encode_prompt(prompt)
            ids = self.processor.encode_target(prompt, label + tail if label.strip() else "")
            targets.append(Target([*context, *(ids if self.end_token else ids[:-1])], len(context)))
        return targets

    def _combined(self, values: Tensor, targets: Sequence[Target]) -> Tensor:
        """Sums float32[templates * L] of log-probabilities -> scores float32[L]."""
        if self.normalise == "mean":
            values = values / torch.tensor([len(target.input_ids) - target.num_context for target in targets])
        return values.view(len(self.templates), -1).mean(dim=0)
