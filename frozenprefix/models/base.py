"""Base class of the models: identity of frozen parts, checks of image features, checkpoints without frozen parts."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from frozenprefix.errors import ConfigError
from frozenprefix.models.checkpoint import check_identity, load_checkpoint, save_checkpoint, trainable_state
from frozenprefix.models.peft import AdapterSet
from frozenprefix.models.vision import VisionEncoder


class ImageModel(PreTrainedModel):
    """A transformers model that reads images with a vision encoder, and is saved without its frozen parts.

    Attributes:
        part_names: constructor arguments that take ready-made parts.
        adapters: peft's adapters in the frozen parts.
    """

    part_names: ClassVar[tuple[str, ...]]
    vision_encoder: VisionEncoder
    adapters: AdapterSet
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers reads it from the class
    # transformers' checkpointing does nothing in evaluation mode, in which frozen parts always are
    supports_gradient_checkpointing = False

    def use_identity(self, identity: dict[str, dict[str, str]]) -> None:
        """Check the identity of loaded parts against the config, and add it there.

        Raises:
            CheckpointError: for a part other than the one that the checkpoint was trained with.
        """
        check_identity(self.config.identity, identity)
        known = self.config.identity
        loaded = {part: {**known.get(part, {}), **entries} for part, entries in identity.items()}
        self.config.identity = {**known, **loaded}

    def check_features(self, image_features: Tensor) -> None:
        """Raise `ConfigError` for image features of another shape than the encoder's, float[images, N, D_enc]."""
        expected = (self.vision_encoder.num_tokens, self.vision_encoder.encoder_dim)
        if image_features.ndim != 3 or tuple(image_features.shape[1:]) != expected:
            raise ConfigError(
                f"image_features: got shape {tuple(image_features.shape)}, "
                f"expected (images, {expected[0]}, {expected[1]})"
            )

    def init_weights(self) -> None:
        """Do nothing: parts arrive with their weights, which transformers' initialisation must not touch."""

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes, by name; adapters are saved in files of their own."""
        return trainable_state(self)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """Write config.json (with the identity of frozen parts), trained tensors, adapters; see `save_checkpoint`."""
        if is_main_process:
            save_checkpoint(self, save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a checkpoint folder or Hub id; frozen parts come from where its config says; see `load_checkpoint`."""
        if args:
            raise ConfigError(f"from_pretrained: got {len(args)} more arguments by position; give them by name")
        return load_checkpoint(cls, pretrained_model_name_or_path, cls.part_names, **kwargs)
