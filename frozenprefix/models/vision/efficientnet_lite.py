"""Converts checkpoints of the package `efficientnet-lite-pytorch` to the tensor names of timm's
`tf_efficientnet_lite*`.

Those weights come from TensorFlow, which pads strided convolutions on the right and at the bottom first, so only the
`tf_` variants of timm compute the same network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from frozenprefix.errors import AssetError

# TensorFlow's EfficientNet-Lite scales pixels as (value - 127) / 128, unlike the larger EfficientNets.
PIXEL_MEAN = 127 / 255
PIXEL_STD = 128 / 255

_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def is_lite_checkpoint(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named as in `efficientnet-lite-pytorch`."""
    return "_conv_stem.weight" in state


def convert_lite_checkpoint(state: Mapping[str, Tensor], stage_depths: Sequence[int]) -> dict[str, Tensor]:
    """Rename the tensors of an EfficientNet-Lite checkpoint for timm.

    Args:
        state: tensors named like `_blocks.3._expand_conv.weight`, where blocks are counted through all stages.
        stage_depths: number of blocks in each stage of the timm model, which counts blocks within a stage.

    Raises:
        AssetError: for a name that EfficientNet-Lite does not have.

    Example:
        >>> list(convert_lite_checkpoint({"_blocks.1._expand_conv.weight": torch.zeros(1)}, stage_depths=[1, 2]))
        ['blocks.1.0.conv_pw.weight']
    """
    blocks = [(stage, block) for stage, depth in enumerate(stage_depths) for block in range(depth)]
    return {_convert_name(name, blocks): tensor for name, tensor in state.items()}


def _convert_name(name: str, blocks: list[tuple[int, int]]) -> str:
    parts = name.split(".")
    try:
        if parts[0] != "_blocks":
            return ".".join([_OUTSIDE_BLOCKS[parts[0]], *parts[1:]])
        stage, block = blocks[int(parts[1])]
        names = _FIRST_STAGE if stage == 0 else _LATER_STAGES
        return ".".join(["blocks", str(stage), str(block), names[parts[2]], *parts[3:]])
    except (KeyError, IndexError, ValueError) as error:
        raise AssetError(
            f"'{name}' has no place in this EfficientNet-Lite; give the weights of the same variant (lite0 to lite4)"
        ) from error
