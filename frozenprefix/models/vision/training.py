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
    """Freeze an encoder except for the parameters to train.

    Args:
        trainable: "none", "all", or a number of last blocks, to which what comes after them belongs (final norm, head
            convolution, pooling, projection). Blocks after an inner `layer`, which do not influence the features, are
            not counted, and parameters without influence on the features are never trained.
        compute_dtype: dtype that a trained encoder computes in, by autocast; its weights are float32.

    Returns:
        The encoder in evaluation mode: dropout is off and batch-norm statistics do not change. The scale and shift of a
        batch norm are trained like other weights.

    Raises:
        ConfigError: if there are fewer blocks.

    Example:
        >>> encoder = train_encoder(model.vision_encoder, "none", torch.float32)
        >>> any(parameter.requires_grad for parameter in encoder.parameters())
        False
    """
    freeze(encoder)
    if trainable == "none":
        return encoder
    encoder.float()
    encoder.autocast_dtype = None if compute_dtype == torch.float32 else compute_dtype
    for parameter in _parameters_to_train(encoder, trainable):
        parameter.requires_grad_(True)
    return encoder


def _parameters_to_train(encoder: VisionEncoder, trainable: Literal["all"] | int) -> list[nn.Parameter]:
    """Parameters that `trainable` means; for a fused encoder, those of each of its parts."""
    used = _used_parameters(encoder)
    if trainable == "all":
        return [parameter for parameter in encoder.parameters() if id(parameter) in used]
    parameters: list[nn.Parameter] = []
    for part in encoder.parts():
        parameters += [parameter for parameter in _last_blocks(part, trainable) if id(parameter) in used]
    return parameters


def _last_blocks(part: VisionEncoder, count: int) -> list[nn.Parameter]:
    """Parameters of the last `count` blocks, and all that are registered after them."""
    used = _used_parameters(part)
    blocks = [block for block in part.blocks() if any(id(parameter) in used for parameter in block.parameters())]
    if count > len(blocks):
        raise ConfigError(
            f"model.vision_encoder.trainable: got {count}, but the features of '{part.name}' depend on {len(blocks)} "
            f"blocks; expected at most {len(blocks)}, or 'all'"
        )
    first = next(blocks[-count].parameters())
    parameters = list(part.parameters())
    start = next(place for place, parameter in enumerate(parameters) if parameter is first)
    registered = {id(parameter) for parameter in parameters[start:]}
    late = [parameter for parameter in part.late_parameters() if id(parameter) not in registered]
    return [*late, *parameters[start:]]


def _used_parameters(encoder: VisionEncoder) -> set[int]:
    """`id` of each parameter that the features depend on, read off the autograd graph of one image."""
    before = [parameter.requires_grad for parameter in encoder.parameters()]
    encoder.requires_grad_(True)
    with image_probe(encoder, encoder.name, encoder.image_size) as image, torch.enable_grad():
        features = encoder(image)
    for parameter, required in zip(encoder.parameters(), before, strict=True):
        parameter.requires_grad_(required)
    used: set[int] = set()
    visited, stack = set(), [features.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):  # the node that accumulates a parameter's gradient
            used.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return used
