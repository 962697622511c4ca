"""The recipe of a mapper between frozen models: `kind: prefix`."""

from __future__ import annotations

from typing import ClassVar, Literal

from frozenprefix.config.base_recipe import SAME_TRAINING, BaseRecipe
from frozenprefix.config.objectives import ObjectivesSection
from frozenprefix.config.sections import EvaluationSection, ModelSection, TrainingSection
from frozenprefix.errors import Problem
from frozenprefix.models.encoder_configuration import OpenClipEncoderConfig


class Recipe(BaseRecipe):
    """Training of a mapper, and of the other trained parts that a recipe names.

    Example:
        >>> recipe.model.mapper.type, recipe.training.max_steps
        ('mlp', 6)
    """

    same_on_resume: ClassVar[dict[str, tuple[str, ...]]] = {
        "": ("seed", "model", "objectives"),
        "data": ("train", "prompts", "text_only", "retrieval", "augmentation"),
        "training": (
            *SAME_TRAINING,
            "learning_rates",
            "packing",
            "tokens_per_row",
            "max_target_tokens",
            "label_smoothing",
            "word_dropout",
        ),
    }

    kind: Literal["prefix"] = "prefix"
    model: ModelSection
    training: TrainingSection
    objectives: ObjectivesSection = ObjectivesSection()
    evaluation: EvaluationSection = EvaluationSection()

    def problems(self) -> list[Problem]:
        return [
            *super().problems(),
            *self._best_problems(),
            *self._cache_problems(),
            *self._augmentation_problems(),
            *self._adalora_problems(),
            *self._text_only_problems(),
            *self._stream_problems(),
        ]

    def _best_problems(self) -> list[Problem]:
        if self.training.best_by == "loss" or self.data.validation:
            return []
        text = f"got '{self.training.best_by}', which needs captions in data.validation"
        return [Problem(text, ("training.best_by", "data.validation"))]

    def _cache_problems(self) -> list[Problem]:
        """A cache holds features of a frozen encoder only."""
        problems, encoder = [], self.model.vision_encoder
        trained = {"trainable": f" {encoder.trainable!r}"} if encoder.trainable != "none" else {}
        trained |= {"peft": ""} if encoder.peft is not None else {}
        for name, value in trained.items():
            if self.data.feature_cache != "off":
                key = f"model.vision_encoder.{name}"
                got = f"got '{self.data.feature_cache}', expected 'off' with {key}{value}"
                problems.append(Problem(f"{got}: the features change with every step", ("data.feature_cache", key)))
        return problems

    def _augmentation_problems(self) -> list[Problem]:
        if self.data.augmentation is None or self.model.vision_encoder.source != "features":
            return []
        text = "got a block of keys, expected null with precomputed features, which are of whole images"
        return [Problem(text, ("data.augmentation", "model.vision_encoder.source"))]

    def _adalora_problems(self) -> list[Problem]:
        """AdaLoRA's ranks follow the number of steps; a time limit would leave them half-way."""
        if self.training.max_minutes is None or not self._has_adalora():
            return []
        text = (
            f"got {self.training.max_minutes:g}, expected null with peft method 'adalora', whose ranks follow the "
            "number of steps; give epochs or max_steps alone"
        )
        return [Problem(text, ("training.max_minutes", "model"))]

    def _has_adalora(self) -> bool:
        methods = (self.model.language_model.peft, self.model.vision_encoder.peft)
        return any(method is not None and method.type == "adalora" for method in methods)

    def _text_only_problems(self) -> list[Problem]:
        if self.data.text_only is None:
            return []
        problems, encoder = [], self.model.vision_encoder
        if not isinstance(encoder, OpenClipEncoderConfig) or encoder.output != "pooled":
            text = (
                "needs an encoder that embeds texts into the space of images, of source 'open_clip', output 'pooled'; "
                f"got '{encoder.name}' of source '{encoder.source}' with output '{encoder.output}'"
            )
            problems.append(Problem(text, ("data.text_only", "model.vision_encoder")))
        for name in ("contrastive", "self_critical"):
            if getattr(self.objectives, name) is not None:
                text = "needs images to train on, which data.text_only leaves out; remove one"
                problems.append(Problem(text, (f"objectives.{name}", "data.text_only")))
        return problems

    def _stream_problems(self) -> list[Problem]:
        """What needs to see all samples before the first step."""
        if self.objectives.self_critical is None or not self.data.streamed:
            return []
        text = "needs the captions of all images, and cannot be used with `stream` in data.train; remove one"
        return [Problem(text, ("objectives.self_critical", "data.train"))]

    def follows_length(self) -> bool:
        return super().follows_length() or self._has_adalora()  # whose ranks follow it
