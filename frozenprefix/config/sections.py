"""The blocks of a recipe, their defaults, and the checks of each block."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from frozenprefix.config.errors import Clash, Problem, collect_problems, shorten
from frozenprefix.data.cache_format import StorageDType
from frozenprefix.data.caption_retriever import CAPTIONS_MARK, RetrievalOptions
from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.sources import SOURCES
from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.models.configuration import FusionConfig, LanguageModelConfig, MapperConfig, VisionEncoderConfig
from frozenprefix.models.encoder_options import encoder_problems
from frozenprefix.models.packing.trie import Packing
from frozenprefix.models.processing import DEFAULT_PROMPTS, IMAGE_TOKEN


class RecipeSection(BaseModel):
    """A block of a recipe: unknown keys are refused, and it does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ImageModelSection(RecipeSection):
    """A model that sees, of any kind."""

    vision_encoder: VisionEncoderConfig

    @field_validator("vision_encoder")
    @classmethod
    def _check_vision_encoder(cls, vision_encoder: VisionEncoderConfig) -> VisionEncoderConfig:
        key = "model.vision_encoder"
        lines = encoder_problems(vision_encoder)
        raise_clash([Problem((f"{key}.{line.split(maxsplit=1)[0]}",), f"{key}.{line}") for line in lines])
        return vision_encoder

    @field_validator("vision_encoder", "language_model", check_fields=False)
    @classmethod
    def _check_peft(cls, section: Any, info: ValidationInfo) -> Any:
        from frozenprefix.models.peft import validate_peft

        method = getattr(section, "peft", None)
        lines = [] if method is None else validate_peft(method, str(info.field_name))
        raise_clash([Problem((line.partition(": ")[0],), line) for line in lines])
        return section


class ModelSection(ImageModelSection):
    """What the model is made of; the sections are those of the model's own config."""

    mapper: MapperConfig = Field(default_factory=MapperConfig)
    language_model: LanguageModelConfig
    fusion: FusionConfig = Field(default_factory=FusionConfig)

    @field_validator("mapper")
    @classmethod
    def _check_mapper(cls, mapper: MapperConfig) -> MapperConfig:
        from frozenprefix.models.mappers import validate_mapper

        raise_clash([Problem((line.partition(": ")[0],), line) for line in validate_mapper(mapper)])
        return mapper

    @field_validator("fusion")
    @classmethod
    def _check_fusion(cls, fusion: FusionConfig) -> FusionConfig:
        from frozenprefix.models.fusion import validate_fusion

        raise_clash([Problem((line.partition(": ")[0],), line) for line in validate_fusion(fusion)])
        return fusion


class TextOnlySection(RecipeSection):
    """Training on texts alone, their vectors in place of the images': CapDec (Nukrai et al. 2022)."""

    noise: float = Field(0.016, ge=0, description="variance of the noise on a text's vector")


class RetrievalSection(RecipeSection):
    """Captions of similar training images in the prompt, as in SmallCap (Ramos et al. 2023)."""

    images: int = Field(15, ge=1, description="nearest training images that are looked at")
    captions: int = Field(4, ge=1, description="captions of them in the prompt, at most one per image")
    template: str = Field(RetrievalOptions.template, description="what stands in front of the prompt")

    @model_validator(mode="after")
    def _check_together(self) -> RetrievalSection:
        key, problems = "data.retrieval", []
        if self.captions > self.images:
            keys = (f"{key}.captions", f"{key}.images")
            line = f"{keys[0]}: got {self.captions}, expected at most one for each of the {self.images} images"
            problems.append(Problem(keys, line))
        marks = {CAPTIONS_MARK: (1, 1), IMAGE_TOKEN: (0, 1), "{question}": (0, 0)}
        if any(not low <= self.template.count(mark) <= high for mark, (low, high) in marks.items()):
            line = f"{key}.template: got {self.template!r}, expected {CAPTIONS_MARK} once, and <image> at most once"
            problems.append(Problem((f"{key}.template",), line))
        raise_clash(problems)
        return self

    @property
    def options(self) -> RetrievalOptions:
        return RetrievalOptions(**self.model_dump())


class DataSection(RecipeSection):
    """Where samples come from."""

    train: list[dict[str, Any]] = Field(min_length=1, description="a list of sources, each with a `type`")
    validation: list[dict[str, Any]] = Field([], description="a list of sources; none means no validation")
    prompts: dict[str, str] = Field(DEFAULT_PROMPTS, description="prompt template per task")
    feature_cache: str = Field("auto", min_length=1, description="'auto', 'off' or a folder")
    feature_dtype: StorageDType = Field("float16", description="how cached features are stored")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of bad images from which the run stops")
    workers: int = Field(2, ge=0, description="processes that decode images")
    text_only: TextOnlySection | None = Field(None, description="no image is read in training, only its texts")
    retrieval: RetrievalSection | None = Field(None, description="captions of similar images in caption prompts")

    @property
    def feature_storage(self) -> FeatureStorage:
        """Where image features are kept, and how."""
        return FeatureStorage(self.feature_cache, self.feature_dtype)

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _check_sources(cls, sources: Any, info: ValidationInfo) -> Any:
        if isinstance(sources, list):
            key = f"data.{info.field_name}"
            raise_clash([p for i, source in enumerate(sources) for p in _check_source(source, f"{key}.{i}")])
        return sources

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, prompts: dict[str, str]) -> dict[str, str]:
        problems = []
        for task, template in prompts.items():
            key = f"data.prompts.{task}"
            if task not in DEFAULT_PROMPTS:
                known = f"{did_you_mean(task, DEFAULT_PROMPTS)}; known: {', '.join(DEFAULT_PROMPTS)}"
                problems.append(Problem((key,), f"{key}: unknown task{known}"))
            elif ("{question}" in template) != ("{question}" in DEFAULT_PROMPTS[task]):
                rule = "with" if "{question}" in DEFAULT_PROMPTS[task] else "without"
                line = f"{key}: got {template!r}, expected a template {rule} a place for the {{question}}"
                problems.append(Problem((key,), line))
        raise_clash(problems)
        return {**DEFAULT_PROMPTS, **prompts}

    @field_validator("feature_cache")
    @classmethod
    def _check_feature_cache(cls, value: str) -> str:
        word = value.strip().lower()
        if value not in ("auto", "off") and word in ("auto", "off", "on", "none", "no", "false", "true", "yes"):
            key = "data.feature_cache"
            line = f"{key}: got {value!r}, expected 'auto', 'off' or a folder (a folder of that name: './{value}')"
            raise_clash([Problem((key,), line)])
        return value

    @model_validator(mode="after")
    def _check_dtype_has_effect(self) -> DataSection:
        if self.feature_cache == "off" and self.feature_dtype != "float16":
            key = "data.feature_dtype"
            line = f"{key}: got '{self.feature_dtype}', which has no effect with feature_cache 'off'; remove it"
            raise_clash([Problem((key, "data.feature_cache"), line)])
        return self

    @model_validator(mode="after")
    def _check_retrieval_has_features(self) -> DataSection:
        if self.retrieval is not None:
            key, others = "data.retrieval", []
            if self.feature_cache == "off":
                others.append(("data.feature_cache", "'auto' or a folder", "'off'"))
            if self.text_only is not None:
                others.append(("data.text_only", "null", "a block of keys"))
            lines = [
                (other, f"{other}: got {got}, expected {want} with {key}, which compares features")
                for other, want, got in others
            ]
            raise_clash([Problem((other, key), line) for other, line in lines])
        return self


class RunSection(RecipeSection):
    """How long a run is, how its learning rate goes, and what it leaves on the way. One of `epochs` and `max_steps` has
    to be given."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    epochs: int | None = Field(None, ge=1, description="times that every image is seen")
    max_minutes: float | None = Field(None, gt=0, description="wall clock; the schedule then follows the time")
    images_per_step: int = Field(12, ge=1)
    targets_per_image: int | None = Field(4, ge=1, description="targets drawn per image; null for all")
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(
        default_factory=lambda given: min(50, (given.get("max_steps") or 500) // 10),
        ge=0,
        description="50 when not given, but at most a tenth of max_steps",
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float | None = Field(1.0, gt=0, description="null for no clipping")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    log_every: int = Field(10, ge=1, description="steps")
    validate_every: int = Field(200, ge=1, description="steps")
    validation_images: int | None = Field(256, ge=2, description="images per validation; null for all")
    save_every: int = Field(200, ge=1, description="steps")
    early_stopping_patience: int | None = Field(None, ge=1, description="validations without a better one")

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            key = "training.betas"
            raise_clash([Problem((key,), f"{key}: got {list(betas)}, expected two numbers from 0 to below 1")])
        return betas

    @model_validator(mode="after")
    def _check_together(self) -> RunSection:
        clashes = []
        for text, *keys in self._clashes():
            dotted = tuple(f"training.{key}" for key in keys)
            clashes.append(Problem(dotted, f"{dotted[0]}: {text}"))
        raise_clash(clashes)
        return self

    def _clashes(self) -> list[tuple[str, ...]]:
        """What does not go together: a text, and the keys that it is about."""
        clashes: list[tuple[str, ...]] = []
        if self.epochs is not None and self.max_steps is not None:
            text = (
                f"got {self.epochs} beside max_steps {self.max_steps}, expected one of the two; set the other to null"
            )
            clashes.append((text, "epochs", "max_steps"))
        if self.epochs is None and self.max_steps is None:
            clashes.append(("missing, expected a number, or a number for max_steps", "epochs", "max_steps"))
        if self.max_steps is not None and 0 < self.max_steps <= self.warmup_steps:
            text = f"got {self.warmup_steps}, expected fewer than max_steps {self.max_steps}"
            clashes.append((text, "warmup_steps", "max_steps"))
        return clashes


class TrainingSection(RunSection):
    """How the trainable part is trained."""

    gradient_accumulation_steps: int = Field(1, ge=1)
    packing: Packing = "trie"
    tokens_per_row: int | None = Field(None, ge=1, description="null lets the packer choose")
    max_target_tokens: int = Field(40, ge=2, description="a longer target is cut; the end token counts")
    init_from: str | None = Field(None, description="a checkpoint folder, whose weights training starts from")

    def _clashes(self) -> list[tuple[str, ...]]:
        clashes = super()._clashes()
        if self.tokens_per_row is not None and self.packing == "none":
            text = (
                f"got {self.tokens_per_row}, which has no effect with packing 'none'; expected null, or other packing"
            )
            clashes.append((text, "tokens_per_row", "packing"))
        return clashes


class EvaluationSection(RecipeSection):
    """How captions and answers are generated when a run is evaluated."""

    num_beams: int = Field(5, ge=1)
    max_new_tokens: int = Field(30, ge=1)
    batch_size: int = Field(32, ge=1)
    limit: int | None = Field(None, ge=1, description="images; null for all")
    text: str | None = Field(None, description="a text file, on which the LM is measured before and after training")


class TrackingSection(RecipeSection):
    """Where figures go beside the run's own log.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: bool = False


def _check_source(source: Any, key: str) -> list[Problem]:
    if not isinstance(source, dict):
        return [Problem((key,), f"{key}: got {shorten(source)}, expected a block of keys with a type")]
    if not isinstance(source.get("type"), str):
        got = f"got {shorten(source['type'])}" if "type" in source else "missing"
        return [Problem((key,), f"{key}.type: {got}, expected one of: {', '.join(SOURCES.names())}")]
    try:
        schema = SOURCES.get(source["type"])
        schema.model_validate_json(json.dumps(source), strict=True)
    except ConfigError as error:
        return [Problem((key,), f"{key}.type: {problem}") for problem in error.problems]
    except ValidationError as error:
        return collect_problems(error.errors(), source, schema, f"{key}.")
    return []


def raise_clash(problems: list[Problem]) -> None:
    if problems:
        raise Clash(problems)
