"""Costs that follow from shapes: arithmetic, memory and bytes moved of a training step, and size of the cache.

Letters: a decoder layer of width h with H query heads and G key-value heads of width d, and an inner width f; V words;
R rows of T cells; b bytes a number of the LM's dtype.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from frozenprefix.config.sections import RunSection
from frozenprefix.data.cache_format import Manifest, StorageDType
from frozenprefix.kernels.linear import TILE
from frozenprefix.kernels.prepack import MAX_BYTES
from frozenprefix.models.language_model.base import word_embeddings
from frozenprefix.models.packing import PackedBatch
from frozenprefix.models.packing.loss import ROWS

INDEX_BYTES = 85  # an image's line in the index of its shard
KEY_BYTES = 90  # and in the list of keys, its path not counted
SHARD_IMAGES, SHARD_BYTES = 500, 5_200  # a tar file is filled up to 10,240 bytes: half of that on average
# bytes that an optimizer keeps for a float32 parameter: two moments, or one (and Adafactor's means of rows and columns)
STATE_BYTES = {"adamw": 8, "muon": 4, "lion": 4, "adafactor": 4}


@dataclass(frozen=True)
class LanguageModelShape:
    """Sizes of a causal LM that decide the cost of a step.

    Attributes:
        gated: whether the feed-forward part has a gate, as LLaMA's has.
        matrix_weights: weights that every cell is multiplied with: all matrices but embeddings and head.
        parameters: all weights; item_bytes: bytes of one.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    gated: bool
    vocabulary: int
    matrix_weights: int
    parameters: int
    item_bytes: int

    @classmethod
    def from_model(cls, language_model: PreTrainedModel) -> LanguageModelShape:
        """Read the sizes off a model, which may be on the meta device.

        Example:
            >>> LanguageModelShape.from_model(model.language_model).layers
            2
        """
        config = language_model.config.get_text_config()
        decoder = language_model.base_model
        embeddings = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
        hidden = word_embeddings(language_model).weight.shape[1]
        heads = config.num_attention_heads
        named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        return cls(
            hidden=hidden,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            inner=next((size for size in named if size), 4 * hidden),
            gated=any("gate" in name.rpartition(".")[2] for name, _ in decoder.named_modules()),
            vocabulary=language_model.get_output_embeddings().weight.shape[0],
            matrix_weights=sum(p.numel() for p in decoder.parameters() if p.ndim == 2 and id(p) not in embeddings),
            parameters=sum(p.numel() for p in language_model.parameters()),
            item_bytes=language_model.dtype.itemsize,
        )


@dataclass(frozen=True)
class StepShape:
    """Size of one optimizer step, or the mean of several.

    Attributes:
        targets, tokens: targets and trained tokens; nodes: tokens that are read after sharing, without padding.
        cells: R * T, tokens that the LM computes; scores: R * T * T, entries of one head's attention matrix.
        predicted: nodes that predict something; row_length: T of the longest micro-batch.
        part_cells: cells of the largest micro-batch, on which the memory depends.
    """

    targets: float
    tokens: float
    nodes: float
    cells: float
    scores: float
    predicted: float
    row_length: float
    part_cells: float

    @classmethod
    def from_parts(cls, parts: Sequence[PackedBatch]) -> StepShape:
        """The size of a step of these micro-batches."""
        sizes = [tuple(part.input_ids.shape) for part in parts]
        return cls(
            targets=sum(part.num_targets for part in parts),
            tokens=sum(part.num_tokens for part in parts),
            nodes=sum(_count_nodes(part) for part in parts),
            cells=sum(rows * length for rows, length in sizes),
            scores=sum(rows * length**2 for rows, length in sizes),
            predicted=sum(len(part.predict_index) for part in parts),
            row_length=max(length for _, length in sizes),
            part_cells=max(rows * length for rows, length in sizes),
        )

    @classmethod
    def mean(cls, steps: Sequence[StepShape]) -> StepShape:
        """The mean of each size.

        Example:
            >>> StepShape.mean([StepShape(*[1.0] * 8), StepShape(*[3.0] * 8)]).targets
            2.0
        """
        return cls(**{f.name: sum(getattr(step, f.name) for step in steps) / len(steps) for f in fields(cls)})


def _count_nodes(packed: PackedBatch) -> int:
    """Cells that are not padding. Padding comes after the last trie of a row, with position 0."""
    lengths = (packed.position_ids != 0).long() * torch.arange(packed.position_ids.shape[1])
    return int((lengths.max(dim=1).values + 1).sum())


def step_flops(lm: LanguageModelShape, step: StepShape, mapper_flops: float) -> dict[str, float]:
    """Floating-point operations of a step, by part. A multiplication and an addition count as two.

    The frozen LM has a forward pass and a backward pass to its input: twice the forward cost, and no gradient of a
    weight. Attention's two products each have two in the backward pass.
    """
    forward = 2 * lm.matrix_weights * step.cells
    attention = 4 * step.scores * lm.heads * lm.head_dim * lm.layers
    return {
        "language model": 2 * forward,
        "attention": 3 * attention,
        "head": 4 * step.predicted * lm.hidden * lm.vocabulary,
        "mapper": mapper_flops,
    }


def activation_bytes(lm: LanguageModelShape, cells: float, row_length: float) -> float:
    """Bytes that a forward pass keeps for the backward pass when no weight of the LM gets a gradient.

    A layer keeps, for each cell, the inputs of its two norms (in float32), the query, key and value, the attention
    weights of all heads, and of the inner width the activation's input, or that, its output and what they are
    multiplied with when there is a gate. A linear layer with frozen weights keeps nothing. Layers of the Llama family
    keep less than this on a CPU (`kernels/llama_layer.py`).
    """
    attention = lm.head_dim * (lm.heads + 2 * lm.kv_heads) + lm.heads * row_length
    per_cell = 2 * 4 * lm.hidden + lm.item_bytes * (attention + (3 if lm.gated else 1) * lm.inner)
    return lm.layers * cells * per_cell


PREPACKED_COPIES = "prepacked copies (on a CPU only)"


@dataclass(frozen=True)
class OptimizerCosts:
    """Bytes for each trained parameter, all in float32.

    Attributes:
        kept: parameter, gradient, the optimizer's state, and the moving average if there is one.
        moved: in a step; all but the gradient are read and written.

    Example:
        >>> OptimizerCosts.from_settings(recipe.training)
        OptimizerCosts(kept=16, moved=28)
    """

    kept: int
    moved: int

    @classmethod
    def from_settings(cls, settings: RunSection) -> OptimizerCosts:
        state, average = STATE_BYTES[settings.optimizer], 0 if settings.ema is None else 4
        # the average reads the parameter once more
        return cls(kept=8 + state + average, moved=12 + 2 * state + 3 * average)


def step_memory(
    lm: LanguageModelShape, step: StepShape, *, encoder_bytes: float, trainable: int, optimizer: OptimizerCosts
) -> dict[str, float]:
    """Bytes in use at the peak of a step, by part."""
    activations = activation_bytes(lm, step.part_cells, step.row_length)
    # with the head or, as `prepackable_layers` chooses, without
    weights = (lm.matrix_weights + lm.hidden * lm.vocabulary, lm.matrix_weights)
    packed = [2 * number * lm.item_bytes for number in weights]
    return {
        "language model (frozen)": lm.parameters * lm.item_bytes,
        PREPACKED_COPIES: next((size for size in packed if size <= MAX_BYTES), 0),
        "vision encoder (frozen)": encoder_bytes,
        "mapper, gradients, optimizer": optimizer.kept * trainable,
        "activations": activations,
        # temporaries of one layer, and the gradients of what it kept
        "layer being computed": 2 * activations / lm.layers,
        "logits": ROWS * min(TILE, lm.vocabulary) * lm.item_bytes,
    }


def step_bytes(lm: LanguageModelShape, step: StepShape, trainable: int, optimizer: OptimizerCosts) -> dict[str, float]:
    """Bytes that a step moves through memory, by part."""
    blocks = -(-step.predicted // ROWS)
    return {
        "weights": 2 * lm.matrix_weights * lm.item_bytes,
        # written, read by the next operation, and read again by the backward pass
        "activations": 3 * activation_bytes(lm, step.cells, step.scores / step.cells),
        # its weights are read for every block of rows, forward and backward; a tile of logits stays in the caches
        "head": blocks * 2 * lm.vocabulary * lm.hidden * lm.item_bytes,
        "optimizer": optimizer.moved * trainable,
    }


def cached_bytes(dtype: StorageDType, tokens: int, dim: int) -> int:
    """Bytes that one image takes in the feature cache: tar members with their headers, and its line in the index.

    Example:
        >>> cached_bytes("int8", 49, 1280) < cached_bytes("float16", 49, 1280)
        True
    """
    manifest = Manifest({}, dtype, tokens, dim)
    members = [manifest.features_length] + ([manifest.scale_length] if dtype == "int8" else [])
    block = tarfile.BLOCKSIZE
    return sum(block + -(-length // block) * block for length in members) + INDEX_BYTES


def cache_size(dtype: StorageDType, tokens: int, dim: int, paths: Sequence[Path]) -> int:
    """Bytes of a feature cache of these images.

    Example:
        >>> cache_size("float16", 1, 64, [image_path]) > cached_bytes("float16", 1, 64)
        True
    """
    keys = sum(len(str(path.absolute())) + KEY_BYTES for path in paths)
    shards = -(-len(paths) // SHARD_IMAGES)
    return len(paths) * cached_bytes(dtype, tokens, dim) + keys + shards * SHARD_BYTES


def mapper_flops(mapper: nn.Module, image_features: Tensor) -> int:
    """Operations of the mapper's forward and backward pass.

    Args:
        mapper, image_features: the module and its input float[B, N, D_enc]; both may be on the meta device.

    Example:
        >>> mapper_flops(torch.nn.Linear(8, 4), torch.randn(2, 1, 8))
        256
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        mapper(image_features).sum().backward()
    mapper.zero_grad(set_to_none=True)
    return counter.get_total_flops()


@torch.no_grad()
def encoder_cost(encoder: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    """Cost of encoding one image, float[1, 3, H, W], when every layer's output is written once and read once.

    Returns:
        Operations, and bytes moved.
    """
    numbers = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal numbers
        numbers += output.numel() if isinstance(output, Tensor) else 0

    hooks = [module.register_forward_hook(count) for module in encoder.modules() if not list(module.children())]
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encoder(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops(), 2 * numbers * next(encoder.parameters()).dtype.itemsize
