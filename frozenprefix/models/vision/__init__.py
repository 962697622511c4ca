"""Vision encoders: images -> image features, by a network of timm, open_clip or transformers, or from a file."""

from frozenprefix.models.vision.base import BuiltEncoder, VisionEncoder
from frozenprefix.models.vision.build import (
    VISION_SOURCES,
    build_vision_encoder,
    register_vision_encoder,
    validate_vision_encoder,
)
from frozenprefix.models.vision.image_processing import FrozenPrefixImageProcessor
from frozenprefix.models.vision.precomputed import FeatureTable, PrecomputedFeatures, feature_table
from frozenprefix.models.vision.training import train_encoder
from frozenprefix.models.vision.weights import find_weights_file, read_weights

__all__ = [
    "VISION_SOURCES",
    "BuiltEncoder",
    "FeatureTable",
    "FrozenPrefixImageProcessor",
    "PrecomputedFeatures",
    "VisionEncoder",
    "build_vision_encoder",
    "feature_table",
    "find_weights_file",
    "read_weights",
    "register_vision_encoder",
    "train_encoder",
    "validate_vision_encoder",
]
