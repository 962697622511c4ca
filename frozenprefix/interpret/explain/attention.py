"""Where a word looks: attention from the word to the prefix embeddings, and from these to the patches.

In the language model each attention weight counts by how much it helps the word: weight times gradient of the word's
log-probability, positive part, mean over heads and layers (Chefer et al. 2021, equation 5, at the row of the word).
In the mapper weights of layers are multiplied, each mixed with the residual path (Abnar and Zuidema 2020).

Shape letters: W words, N patches, P prefix embeddings, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.evidence import Word
from frozenprefix.kernels import recording_attention
from frozenprefix.models.mappers.blocks import Attention, pool_tokens
from frozenprefix.models.mappers.linear import LinearMapper
from frozenprefix.models.mappers.mlp import MLPMapper
from frozenprefix.models.mappers.pixel_shuffle import PixelShuffleMapper, join_squares
from frozenprefix.models.packing import Target, pack


class NotAvailable(Exception):
    """Why a part of an explanation has no meaning for a model; caught by the explainer."""


def attention_maps(captioner: Captioner, target: Target, words: Sequence[Word], features: Tensor) -> Tensor:
    """Maps of attention, float32[W, √N, √N].

    Args:
        target: prompt and text; words: of the text.
        features: float[1, N, D_enc] of the image.

    Raises:
        NotAvailable: with the reason, for a model in which attention does not lead from words to patches.
    """
    side = isqrt(features.shape[1])
    if side < 2 or side * side != features.shape[1]:
        raise NotAvailable("the encoder gives one vector for the whole image, not a grid of patches")
    # [P, N]
    through_mapper = mapper_attention(captioner.model, features)
    # [W, P] @ [P, N]
    maps = prefix_attention(captioner, target, words, features) @ through_mapper
    return maps.view(-1, side, side)


def prefix_attention(captioner: Captioner, target: Target, words: Sequence[Word], features: Tensor) -> Tensor:
    """How much each word draws from each prefix embedding, float32[W, P].

    Raises:
        NotAvailable: for an LM with an encoder, a fusion without a prefix, or attention that cannot be read.
    """
    model = captioner.model
    if model.lm.is_encoder_decoder:
        raise NotAvailable("the language model has an encoder of its own between the prefix and the words")
    if not model.fusion.is_prefix:
        raise NotAvailable(f"fusion '{model.config.fusion.type}' has no prefix that words attend to")
    packed = pack([[target]], image_token_id=_image_token(model), prefix_length=model.placeholders_per_image)
    if model.lm.packing_problem(len(target.input_ids)) is not None:
        packed.lengths = torch.tensor([packed.input_ids.shape[1]])
    packed = packed.to(model.device)
    with torch.no_grad():
        prefix = model.map_features(features.to(model.device))
    with torch.enable_grad(), recording_attention(model.language_model) as weights:
        # a gradient for the prefix makes one for every weight behind it
        hidden = model.packed_hidden(packed, prefix.detach().requires_grad_())
    if not weights:
        raise NotAvailable(f"{model.lm.name} does not let its attention be read")
    with torch.enable_grad():
        log_probs = model.lm.logits(hidden, torch.float32).log_softmax(dim=-1)
        steps = log_probs[packed.edge_source, packed.edge_label]
        places = packed.prefix_index[0] >= 0
        # an adapter's virtual tokens precede the row: as keys, or as words
        above, before = (weights[0].shape[axis] - packed.input_ids.shape[1] for axis in (-2, -1))
        columns = before + places.nonzero()[:, 0]
        # the edges of one text are in its order; step i is read off at its own node
        order = packed.predict_index[packed.edge_source] + above
        rows = []
        for word in words:
            at = order[word.first : word.last]
            if not len(at):
                rows.append(torch.zeros(int(places.sum()), device=hidden.device))
                continue
            gradients = torch.autograd.grad(steps[word.first : word.last].sum(), weights, retain_graph=True)
            rows.append(_helping(weights, gradients, at, columns))
    return torch.stack(rows).float().cpu()


def _helping(weights: Sequence[Tensor], gradients: Sequence[Tensor], at: Tensor, columns: Tensor) -> Tensor:
    """Mean over layers, heads and the word's tokens of the positive part of weight times gradient: float32[P]."""
    total = torch.zeros(len(columns), device=columns.device)
    for weight, gradient in zip(weights, gradients, strict=True):
        # [G, H / G, T, S] -> [G, H / G, tokens, P]
        product = (weight.detach()[0] * gradient[0])[..., at, :][..., columns]
        total += product.float().clamp(min=0).mean(dim=(0, 1, 2))
    return total / len(weights)


def _image_token(model: Any) -> int:
    return int(model.config.image_token_id)


# ── through the mapper ──


def mapper_attention(model: Any, features: Tensor) -> Tensor:
    """How much each prefix embedding draws from each patch: float32[P, N], rows sum to 1.

    Args:
        features: float[1, N, D_enc].

    Raises:
        NotAvailable: for a mapper that mixes all patches without attention.

    Example:
        >>> mapper_attention(model, torch.randn(1, 4, 64))
        Traceback (most recent call last):
        frozenprefix.interpret.explain.attention.NotAvailable: mapper 'mlp' mixes all patches in one layer, ...
    """
    body = model.mapper.body
    patches, length = features.shape[1], model.config.prefix_length
    one_hot = torch.eye(patches)[None]
    if isinstance(body, LinearMapper | MLPMapper) and not getattr(body, "together", False):
        return pool_tokens(one_hot, length)[0]
    if isinstance(body, PixelShuffleMapper):
        return join_squares(one_hot, body.shuffle)[0].unflatten(1, (-1, patches)).mean(dim=1)
    layers = [module for module in body.modules() if isinstance(module, Attention)]
    if not layers:
        raise NotAvailable(
            f"mapper '{model.config.mapper.type}' mixes all patches in one layer, without attention to single ones"
        )
    return _rollout(_mapper_weights(model, layers, features), patches, length)


def _mapper_weights(model: Any, layers: Sequence[nn.Module], features: Tensor) -> list[tuple[Tensor, bool]]:
    """For each attention of the mapper its weights float32[T, S], mean over heads, and whether it reads a context."""
    found: list[tuple[Tensor, bool]] = []

    def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        queries, context = args[0], args[1] if len(args) > 1 else None
        key = module.to_kv(queries if context is None else context).chunk(2, dim=-1)[0]
        query, key = (
            part.float().unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in (module.to_q(queries), key)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        found.append((scores.softmax(dim=-1).mean(dim=1)[0].cpu(), context is not None))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.no_grad():
            model.map_features(features.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rollout(weights: Sequence[tuple[Tensor, bool]], patches: int, length: int) -> Tensor:
    """Multiply the layers' weights, half of each passing by on the residual path: float32[P, N], rows sum to 1.

    Each token of a layer is known by its share in the patches; queries begin with none.

    Example:
        >>> cross = torch.tensor([[0.5, 0.5, 0.0]])  # one query that reads three patches
        >>> _rollout([(cross, True)], patches=3, length=1).tolist()
        [[0.5, 0.5, 0.0]]
    """
    image, queries = torch.eye(patches), torch.zeros(length, patches)
    together: Tensor | None = None  # patches and queries as one sequence
    for weight, has_context in weights:
        size = weight.shape[1]
        if not has_context and size == patches + length:
            state = torch.cat([image, queries]) if together is None else together
            together = (state + weight @ state) / 2
        elif size == length and not has_context:
            queries = (queries + weight @ queries) / 2
        elif size == patches:
            queries = (queries + weight @ image) / 2
        elif size == patches + length:
            queries = (queries + weight @ torch.cat([image, queries])) / 2
        else:
            raise NotAvailable(f"the mapper attends to {size} tokens, which are neither patches nor queries")
    rows = queries if together is None else together[patches:]
    return rows / rows.sum(dim=1, keepdim=True).clamp(min=1e-12)
