"""Encoders that are trained, in part or as a whole, through the frozen language model (Tsimpoukelli et al. 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.freezing import freeze
from frozenprefix.models.vision.base import VisionEncoder, image_probe

Trainable = Literal["none", "all"] | int


def train_encoder(encoder: VisionEncoder, trainable: Trainable, compute_dtype: torch.dtype) -> VisionEncoder:
    """Freeze an encoder but for what is to be trained.

    Args:
        trainable: "none", "all", or how many of its last blocks, with what stands behind them (final norm, head
            convolution, pooling, projection). Blocks that the features do not depend on (behind an inner `layer`) are
            not counted, and nothing that has no influence on the features is ever trained.
        compute_dtype: what a trained encoder computes in, by autocast; all its weights are held in float32.

    Returns:
        The encoder, in evaluation mode: dropout is off and batch-norm statistics stay where they are. The scale and
        shift of a batch norm are trained like other weights.

    Raises:
        ConfigError: for more blocks than there are.
    """
    freeze(encoder)
    if trainable == "none":
        return encoder
    encoder.float()
    encoder.autocast_dtype = None if compute_dtype == torch.float32 else compute_dtype
    for parameter in trained_parameters(encoder, trainable):
        parameter.requires_grad_(True)
    return encoder


def trained_parameters(encoder: VisionEncoder, trainable: Literal["all"] | int) -> list[nn.Parameter]:
    """The parameters that `trainable` names; of fused encoders, those of each of its parts."""
    used = _used_parameters(encoder)
    if trainable == "all":
        return [p for p in encoder.parameters() if id(p) in used]
    return [p for part in encoder.parts() for p in _behind(part, trainable) if id(p) in used]


def _behind(part: VisionEncoder, count: int) -> list[nn.Parameter]:
    """Parameters of the last `count` blocks, and all that are registered behind them."""
    used = _used_parameters(part)
    blocks = [block for block in part.blocks() if any(id(p) in used for p in block.parameters())]
    if count > len(blocks):
        raise ConfigError(
            f"model.vision_encoder.trainable: got {count}, but the features of '{part.name}' depend on {len(blocks)} "
            f"blocks; expected at most {len(blocks)}, or 'all'"
        )
    first = next(blocks[-count].parameters())
    parameters = list(part.parameters())
    start = next(place for place, p in enumerate(parameters) if p is first)
    late = [p for p in part.late_parameters() if not any(p is other for other in parameters[start:])]
    return [*late, *parameters[start:]]


def _used_parameters(encoder: VisionEncoder) -> set[int]:
    """Identities of the parameters that the features depend on, read off the graph of one image."""
    wanted = [p.requires_grad for p in encoder.parameters()]
    encoder.requires_grad_(True)
    with image_probe(encoder, encoder.name, encoder.image_size) as image, torch.enable_grad():
        features = encoder(image)
    for parameter, before in zip(encoder.parameters(), wanted, strict=True):
        parameter.requires_grad_(before)
    found: set[int] = set()
    seen, stack = set(), [features.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a gradient is collected
            found.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return found
