"""The recipe: one YAML per experiment, checked as a whole before anything is loaded."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from frozenprefix.config.errors import Problem
from frozenprefix.config.objectives import ObjectivesSection
from frozenprefix.config.recipe_base import SAME_TRAINING, RecipeFile
from frozenprefix.config.sections import EvaluationSection, ModelSection, TrainingSection, raise_clash


class Recipe(RecipeFile):
    """Training a mapper, and what else in an image-reading model a recipe names."""

    same_on_resume: ClassVar[dict[str, tuple[str, ...]]] = {
        "": ("seed", "model", "objectives"),
        "data": ("train", "prompts", "text_only", "retrieval"),
        "training": (
            *SAME_TRAINING,
            "gradient_accumulation_steps",
            "packing",
            "tokens_per_row",
            "max_target_tokens",
        ),
    }

    kind: Literal["prefix"] = "prefix"
    model: ModelSection
    training: TrainingSection
    objectives: ObjectivesSection = ObjectivesSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _check_cache_is_off(self) -> Recipe:
        for name, none in (("trainable", "none"), ("peft", None)):
            value = getattr(self.model.vision_encoder, name)
            if value != none and self.data.feature_cache != "off":
                keys = ("data.feature_cache", f"model.vision_encoder.{name}")
                given = f" {value!r}" if name == "trainable" else ""
                got = f"got '{self.data.feature_cache}', expected 'off' with {keys[1]}{given}"
                raise_clash([Problem(keys, f"{keys[0]}: {got}: the features change with every step")])
        return self

    @model_validator(mode="after")
    def _check_adalora(self) -> Recipe:
        """AdaLoRA's ranks follow the number of steps; a clock that ends the run would leave them half-way."""
        if self.training.max_minutes is not None and self._has_adalora():
            key = "training.max_minutes"
            line = (
                f"{key}: got {self.training.max_minutes:g}, expected null with peft method 'adalora', whose ranks "
                "follow the number of steps; give epochs or max_steps alone"
            )
            raise_clash([Problem((key, "model"), line)])
        return self

    def _has_adalora(self) -> bool:
        methods = (self.model.language_model.peft, self.model.vision_encoder.peft)
        return any(method is not None and method.type == "adalora" for method in methods)

    @model_validator(mode="after")
    def _check_text_only(self) -> Recipe:
        if self.data.text_only is None:
            return self
        key, encoder = "data.text_only", self.model.vision_encoder
        problems = []
        if encoder.source != "open_clip" or encoder.output != "pooled":
            keys = (key, "model.vision_encoder")
            line = (
                f"{key}: needs an encoder that shares its space with texts, of source 'open_clip', output 'pooled'; "
                f"got '{encoder.name}' of source '{encoder.source}' with output '{encoder.output}'"
            )
            problems.append(Problem(keys, line))
        for name in ("contrastive", "self_critical"):
            if getattr(self.objectives, name) is not None:
                line = f"objectives.{name}: needs images to train on, which data.text_only leaves out; remove one"
                problems.append(Problem((f"objectives.{name}", key), line))
        raise_clash(problems)
        return self

    def follows_length(self) -> bool:
        return super().follows_length() or self._has_adalora()  # whose ranks follow it
