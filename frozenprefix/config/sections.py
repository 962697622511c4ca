"""The blocks of a recipe, their defaults, and the checks of each block."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, ValidationError, ValidationInfo, field_validator

from frozenprefix.config.errors import collect_problems
from frozenprefix.data.augmentation import AugmentationOptions, View
from frozenprefix.data.cache_format import StorageDType
from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.retrieval_options import RetrievalOptions
from frozenprefix.data.sources import SOURCES
from frozenprefix.errors import ConfigError, Problem, SectionError, did_you_mean, shorten
from frozenprefix.models.configuration import FusionConfig, LanguageModelConfig, MapperConfig
from frozenprefix.models.encoder_configuration import VisionEncoderConfig
from frozenprefix.models.packing import Packing
from frozenprefix.models.processing import DEFAULT_PROMPTS
from frozenprefix.models.section import Section


class RecipeSection(Section):
    """A block of a recipe; immutable."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class ImageModelSection(RecipeSection):
    """Sections that models of all kinds have."""

    vision_encoder: VisionEncoderConfig

    @field_validator("vision_encoder")
    @classmethod
    def _check_own_encoder(cls, section: VisionEncoderConfig) -> VisionEncoderConfig:
        from frozenprefix.models.vision import validate_vision_encoder

        SectionError.check(_relative(validate_vision_encoder(section), "model.vision_encoder"))
        return section

    @field_validator("vision_encoder", "language_model", check_fields=False)
    @classmethod
    def _check_peft(cls, section: Any, info: ValidationInfo) -> Any:
        from frozenprefix.models.peft import validate_peft

        part = str(info.field_name)
        lines = [] if section.peft is None else validate_peft(section.peft, part)
        SectionError.check(_relative(lines, f"model.{part}"))
        return section


class ModelSection(ImageModelSection):
    """Parts of a model with a mapper: the same sections as in the model's own config."""

    mapper: MapperConfig = Field(default_factory=MapperConfig)
    language_model: LanguageModelConfig
    fusion: FusionConfig = Field(default_factory=FusionConfig)

    @field_validator("mapper")
    @classmethod
    def _check_mapper(cls, mapper: MapperConfig) -> MapperConfig:
        from frozenprefix.models.mappers import validate_mapper

        SectionError.check(_relative(validate_mapper(mapper), "model.mapper"))
        return mapper

    @field_validator("fusion")
    @classmethod
    def _check_fusion(cls, fusion: FusionConfig) -> FusionConfig:
        from frozenprefix.models.fusion import validate_fusion

        SectionError.check(_relative(validate_fusion(fusion), "model.fusion"))
        return fusion


class TextOnlySection(RecipeSection):
    """Training on text embeddings in place of image features: CapDec (Nukrai et al. 2022)."""

    noise: float = Field(0.016, ge=0, description="variance of the noise on a text's embedding")


class DataSection(RecipeSection):
    """Where samples come from, and how their images are read.

    Example:
        >>> DataSection(train=[{"type": "captions", "path": "photos"}]).feature_cache
        'auto'
    """

    train: list[dict[str, Any]] = Field(min_length=1, description="a list of sources, each with a `type`")
    validation: list[dict[str, Any]] = Field([], description="a list of sources; none means no validation")
    prompts: dict[str, str] = Field(DEFAULT_PROMPTS, description="prompt template per task")
    feature_cache: str = Field("auto", min_length=1, description="'auto', 'off' or a folder")
    feature_dtype: StorageDType = Field("float16", description="how cached features are stored")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of bad images from which the run stops")
    workers: int = Field(2, ge=0, description="processes that decode images")
    text_only: TextOnlySection | None = Field(None, description="train on texts alone, without reading images")
    retrieval: RetrievalOptions | None = Field(None, description="captions of similar images in caption prompts")
    augmentation: AugmentationOptions | None = Field(None, description="crops and mirror images of training images")

    @property
    def further_views(self) -> list[View]:
        """Views of the training images besides the whole ones."""
        return [] if self.augmentation is None else self.augmentation.views[1:]

    @property
    def feature_storage(self) -> FeatureStorage:
        """Where image features are kept, and how."""
        return FeatureStorage(self.feature_cache, self.feature_dtype)

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _check_sources(cls, sources: Any) -> Any:
        if isinstance(sources, list):
            SectionError.check(p for i, source in enumerate(sources) for p in _check_source(source, str(i)))
        return sources

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, prompts: dict[str, str]) -> dict[str, str]:
        problems = []
        for task, template in prompts.items():
            if task not in DEFAULT_PROMPTS:
                known = f"{did_you_mean(task, DEFAULT_PROMPTS)}; known: {', '.join(DEFAULT_PROMPTS)}"
                problems.append(Problem(f"unknown task{known}", (task,)))
            elif ("{question}" in template) != ("{question}" in DEFAULT_PROMPTS[task]):
                rule = "with" if "{question}" in DEFAULT_PROMPTS[task] else "without"
                text = f"got {template!r}, expected a template {rule} a place for the {{question}}"
                problems.append(Problem(text, (task,)))
        SectionError.check(problems)
        return {**DEFAULT_PROMPTS, **prompts}

    @field_validator("feature_cache")
    @classmethod
    def _check_feature_cache(cls, value: str) -> str:
        word = value.strip().lower()
        if value not in ("auto", "off") and word in ("auto", "off", "on", "none", "no", "false", "true", "yes"):
            text = f"got {value!r}, expected 'auto', 'off' or a folder (a folder of that name: './{value}')"
            raise SectionError([Problem(text)])
        return value

    def problems(self) -> list[Problem]:
        problems = self._mixture_problems()
        if self.feature_cache == "off" and self.feature_dtype != "float16":
            text = f"got '{self.feature_dtype}', which has no effect with feature_cache 'off'; remove it"
            problems.append(Problem(text, ("feature_dtype", "feature_cache")))
        if self.augmentation is not None and self.text_only is not None:
            text = "got a block of keys, expected null with data.text_only, which reads no training image"
            problems.append(Problem(text, ("augmentation", "text_only")))
        if self.retrieval is not None:
            because = "with data.retrieval, which compares features"
            if self.feature_cache == "off":
                text = f"got 'off', expected 'auto' or a folder {because}"
                problems.append(Problem(text, ("feature_cache", "retrieval")))
            if self.text_only is not None:
                text = f"got a block of keys, expected null {because}"
                problems.append(Problem(text, ("text_only", "retrieval")))
        return problems

    @property
    def streamed(self) -> bool:
        """Whether any training source is streamed."""
        return any(source.get("stream") for source in self.train)

    @property
    def mixed(self) -> bool:
        """Whether training sources are streamed, or have weights."""
        return self.streamed or any(source.get("weight") is not None for source in self.train)

    def _mixture_problems(self) -> list[Problem]:
        problems = []
        for number, source in enumerate(self.validation):
            for key in ("stream", "weight"):
                if source.get(key) not in (None, False):
                    text = "has no effect in data.validation, which is read as a whole; remove it"
                    problems.append(Problem(text, (f"validation.{number}.{key}",)))
        weighted = [source.get("weight") is not None for source in self.train]
        if any(weighted) and not all(weighted):
            text = "missing, expected one here as the other sources of data.train have one"
            problems.append(Problem(text, (f"train.{weighted.index(False)}.weight",)))
        if self.mixed:
            keys = [key for key in ("text_only", "retrieval", "augmentation") if getattr(self, key) is not None]
            text = "needs all samples in one list, without `stream` and `weight` in data.train; remove one"
            problems += [Problem(text, (key, "train")) for key in keys]
        return problems


class RunSection(RecipeSection):
    """Length of a run, its optimizer and learning rate, and how often it logs, validates and saves.

    One of `epochs` and `max_steps` has to be given.

    Example:
        >>> RunSection(max_steps=200).warmup_steps
        20
    """

    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    epochs: int | None = Field(None, ge=1, description="times that every image is seen")
    max_minutes: float | None = Field(
        None, gt=0, description="ends the run by the clock, which the schedule follows: not repeatable bit for bit"
    )
    images_per_step: int = Field(12, ge=1)
    targets_per_image: int | None = Field(4, ge=1, description="targets drawn per image; null for all")
    optimizer: Literal["adamw", "muon", "lion", "adafactor"] = Field("adamw", description="all but adamw are timm's")
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="of matrices; not of biases and norms")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adafactor has none")
    warmup_steps: int = Field(
        default_factory=lambda values: min(50, (values.get("max_steps") or 500) // 10),
        ge=0,
        description="50 when not given, but at most a tenth of max_steps",
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float | None = Field(1.0, gt=0, description="null for no clipping")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is validated and kept as the best",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: the faster of fp32 and bf16")
    log_every: int = Field(10, ge=1, description="steps")
    validate_every: int = Field(200, ge=1, description="steps")
    validation_images: int | None = Field(256, ge=2, description="images per validation; null for all")
    save_every: int = Field(200, ge=1, description="steps")
    keep_last: int = Field(1, ge=1, description="states to keep: last/, and earlier ones as step-NNNNNN/")
    max_bad_steps: int = Field(
        3,
        ge=0,
        description="steps in a row that may be left out because loss or gradient is not finite",
    )
    early_stopping_patience: int | None = Field(None, ge=1, description="validations without a better one")
    process_timeout: float = Field(
        60.0, gt=0, description="seconds that a process may not answer, or load a batch or validate while others wait"
    )

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise SectionError([Problem(f"got {list(betas)}, expected two numbers from 0 to below 1")])
        return betas

    def problems(self) -> list[Problem]:
        problems = []
        if self.epochs is not None and self.max_steps is not None:
            text = f"got {self.epochs} with max_steps {self.max_steps}, expected one of the two; set the other to null"
            problems.append(Problem(text, ("epochs", "max_steps")))
        if self.epochs is None and self.max_steps is None:
            text = "missing, expected a number, or a number for max_steps"
            problems.append(Problem(text, ("epochs", "max_steps")))
        if self.max_steps is not None and 0 < self.max_steps <= self.warmup_steps:
            text = f"got {self.warmup_steps}, expected fewer than max_steps {self.max_steps}"
            problems.append(Problem(text, ("warmup_steps", "max_steps")))
        return problems


class TrainingSection(RunSection):
    """Training of a mapper, and of other parts, through the language model.

    Example:
        >>> TrainingSection(epochs=2).packing
        'trie'
    """

    gradient_accumulation_steps: int = Field(1, ge=1)
    packing: Packing = "trie"
    tokens_per_row: int | None = Field(None, ge=1, description="null lets the packer choose")
    max_target_tokens: int = Field(40, ge=2, description="a longer target is cut; the end token counts")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a target token's probability that is spread over the vocabulary"
    )
    word_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of a target's words that the language model reads as zeros, while training"
    )
    init_from: str | None = Field(None, description="a checkpoint folder, whose weights training starts from")
    learning_rates: dict[Literal["vision_encoder", "mapper", "fusion", "language_model"], PositiveFloat] = Field(
        {}, description="of parts of the model that differ from learning_rate; adapters belong to the part they are in"
    )
    best_by: Literal["loss", "cider_d"] = Field(
        "loss", description="what the best checkpoint is chosen by; with self-critical training it is cider_d"
    )

    def problems(self) -> list[Problem]:
        problems = super().problems()
        if self.tokens_per_row is not None and self.packing == "none":
            text = (
                f"got {self.tokens_per_row}, which has no effect with packing 'none'; expected null, or other packing"
            )
            problems.append(Problem(text, ("tokens_per_row", "packing")))
        if self.images_per_step % self.gradient_accumulation_steps:
            text = (
                f"got {self.images_per_step}, expected a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
            problems.append(Problem(text, ("images_per_step", "gradient_accumulation_steps")))
        return problems


class EvaluationSection(RecipeSection):
    """Defaults of `frozenprefix evaluate` for the run's checkpoints, and a text to measure the LM on.

    Example:
        >>> EvaluationSection(num_beams=3).limit is None
        True
    """

    num_beams: int | None = Field(None, ge=1, description="null for the task's own: 5 for captions, 1 for answers")
    max_new_tokens: int | None = Field(None, ge=1, description="null for the task's own: 30 or 10")
    limit: int | None = Field(None, ge=1, description="images; null for all")
    text: str | None = Field(None, description="a text file, on which the LM is measured before and after training")


class TrackingSection(RecipeSection):
    """Where figures go besides the run's own log.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False


def _relative(lines: list[str], field: str) -> list[Problem]:
    """Problems of an exchangeable part, whose lines start with its dotted `field`, with keys below the field."""
    problems = []
    for line in lines:
        key, _, text = line.partition(": ")
        problems.append(Problem(text, (key.removeprefix(field).strip("."),)))
    return problems


def _check_source(source: Any, key: str) -> list[Problem]:
    if not isinstance(source, dict):
        return [Problem(f"got {shorten(source)}, expected a block of keys with a type", (key,))]
    if not isinstance(source.get("type"), str):
        got = f"got {shorten(source['type'])}" if "type" in source else "missing"
        return [Problem(f"{got}, expected one of: {', '.join(SOURCES.names())}", (f"{key}.type",))]
    try:
        schema = SOURCES.get(source["type"])
        schema.model_validate_json(json.dumps(source), strict=True)
    except ConfigError as error:
        return [Problem(problem, (f"{key}.type",)) for problem in error.problems]
    except ValidationError as error:
        return collect_problems(error.errors(), source, schema, f"{key}.")
    return []
