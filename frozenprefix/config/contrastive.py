"""The recipe of locked-image tuning: `kind: contrastive`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from frozenprefix.config.base_recipe import SAME_TRAINING, BaseRecipe
from frozenprefix.config.sections import ImageModelSection, RunSection
from frozenprefix.errors import Problem
from frozenprefix.models.contrastive.configuration import Objective, ProjectionConfig, TextTowerConfig
from frozenprefix.models.processing import DEFAULT_PROMPTS


class ContrastiveModelSection(ImageModelSection):
    """Parts of a locked-image text model: the same sections as in the model's own config."""

    text_tower: TextTowerConfig
    image_projection: ProjectionConfig = Field(default_factory=ProjectionConfig)
    text_projection: ProjectionConfig = Field(default_factory=ProjectionConfig)
    projection_dim: int = Field(256, ge=1, description="size of the space that both towers are projected into")
    objective: Objective = "infonce"


class ContrastiveTrainingSection(RunSection):
    """How the text tower and the projections are trained."""

    images_per_step: int = Field(128, ge=2, description="images that are compared with each other")
    targets_per_image: int | None = Field(1, ge=1, description="texts drawn per image; null for all")
    learning_rate: float = Field(1e-3, gt=0, description="of the projections and the logit scale")
    tower_learning_rate: float = Field(1e-4, gt=0, description="of the text tower")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; not of biases, norms and the logit scale")
    betas: tuple[float, float] = (0.9, 0.98)
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: the faster of fp32 and bf16")
    texts_per_chunk: int = Field(64, ge=1, description="texts of similar length that are encoded together")
    gradient_cache: bool = Field(False, description="keep the activations of one chunk at a time; costs a forward pass")


class ContrastiveRecipe(BaseRecipe):
    """One experiment of locked-image tuning.

    Example:
        >>> from frozenprefix.config import load_recipe
        >>> load_recipe("recipes/lit_flickr8k.yaml").model.projection_dim
        384
    """

    same_on_resume: ClassVar[dict[str, tuple[str, ...]]] = {
        "": ("seed", "model"),
        "data": ("train",),
        "training": (*SAME_TRAINING, "tower_learning_rate", "texts_per_chunk"),
    }

    kind: Literal["contrastive"]
    model: ContrastiveModelSection
    training: ContrastiveTrainingSection

    def problems(self) -> list[Problem]:
        problems = super().problems()
        for name in ("prompts", "text_only", "retrieval", "augmentation"):
            if getattr(self.data, name) not in (None, DEFAULT_PROMPTS):
                problems.append(Problem("has no effect in a contrastive recipe; remove it", (f"data.{name}",)))
        encoder, key = self.model.vision_encoder, "model.vision_encoder"
        if encoder.trainable != "none":
            text = f"got {encoder.trainable!r}, expected 'none': the image encoder is locked"
            problems.append(Problem(text, (f"{key}.trainable",)))
        if encoder.peft is not None:
            text = f"got '{encoder.peft.type}', expected null: the image encoder is locked"
            problems.append(Problem(text, (f"{key}.peft",)))
        return problems
