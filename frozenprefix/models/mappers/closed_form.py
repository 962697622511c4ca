"""Mappers without training: from the class vectors of a classifier to the LM's embeddings of the classes' names.

A classifier's weights, or a joint encoder's text vectors, lie in the space of the pooled image features and have names;
names are words of the LM. Two mappers follow from that without a gradient:

- any mapper that ends in a linear layer: ridge least squares from what the class vectors become in front of that layer
  to the names' embeddings (`fit_last_layer`);
- an MLP whose hidden layer is the classifier itself: classes over a threshold name the image (`insert_classifier`).

Both are ordinary weights: a checkpoint to use as it is, or to train from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.language_model.base import embedding_rms, word_embeddings
from frozenprefix.models.mappers import PrefixMapper, build_mapper
from frozenprefix.models.mappers.mlp import MLPMapper

# Chosen for EfficientNet-Lite0 with SmolLM2-135M on 2,000 photos of Flickr8k: with prefix_length 3 the nearest name is
# the classifier's first choice for 53% of them by least squares, and for 90% with the classifier in the hidden layer.
RIDGE = 10.0
THRESHOLD = 5.0


@dataclass(frozen=True)
class NamedVectors:
    """Vectors in the space of the image features, with a name each.

    Args:
        vectors: float[C, D_enc], a classifier's weight or the text vectors of a joint encoder.
        names: of the C classes.
        bias: float[C], the classifier's; None for zeros.

    Raises:
        ConfigError: when their numbers differ.
    """

    vectors: Tensor
    names: Sequence[str]
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        biases = len(self.names) if self.bias is None else len(self.bias)
        if self.vectors.ndim != 2 or not len(self.vectors) == len(self.names) == biases:
            raise ConfigError(
                f"named vectors: got vectors of shape {tuple(self.vectors.shape)}, {len(self.names)} names and "
                f"{biases} biases; give one name, and one bias, for every row"
            )


@torch.no_grad()
def class_name_embeddings(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, language_model: PreTrainedModel, length: int
) -> Tensor:
    """Word embeddings of names as the LM reads them inside a sentence: float32[C, length, D_lm].

    The last position of a name with more tokens than `length` is the mean of those that are left; a shorter name
    repeats its last token. With `length` 1 that is the mean of all tokens.

    Raises:
        ConfigError: for a name without any token.
    """
    embeddings = word_embeddings(language_model)
    rows = []
    for name in names:
        ids = tokenizer(" " + name.strip(), add_special_tokens=False)["input_ids"] if name.strip() else []
        if not ids:
            raise ConfigError(f"names: got {name!r}, which has no token; every class needs a name")
        # [k, D_lm]
        words = embeddings(torch.tensor(ids, device=embeddings.weight.device)).float()
        head, rest = words[: length - 1], words[length - 1 :]
        last = rest.mean(dim=0, keepdim=True) if len(rest) else words[-1:]
        rows.append(torch.cat([head, last.expand(length - len(head), -1)]))
    return torch.stack(rows)


def fit_linear(sources: Tensor, targets: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Ridge least squares, `targets ≈ sources @ weight.T + bias`; the bias is not shrunk.

    Args:
        sources: float[n, D_in]; targets: float[n, D_out].
        ridge: strength, as a multiple of the mean squared length of the centred sources; 0 interpolates.

    Returns:
        weight float32[D_out, D_in] and bias float32[D_out].
    """
    sources, targets = sources.double(), targets.double()
    mean_source, mean_target = sources.mean(dim=0), targets.mean(dim=0)
    centred = sources - mean_source
    penalty = ridge * centred.square().sum(dim=1).mean()
    # by singular values, so that ridge 0 and fewer sources than dimensions are allowed
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-9 * values.max()
    shrunk = values[kept] / (values[kept].square() + penalty)
    weight = (targets - mean_target).T @ (left[:, kept] * shrunk) @ right[kept]
    return weight.float(), (mean_target - weight @ mean_source).float()


@torch.no_grad()
def fit_last_layer(
    mapper: PrefixMapper, classes: NamedVectors, targets: Tensor, *, ridge: float = RIDGE, num_tokens: int = 1
) -> None:
    """Set the last linear layer of `mapper`, and its scale, so that class vectors become their names' embeddings.

    Args:
        targets: float[C, P, D_lm] of `class_name_embeddings`.
        num_tokens: image tokens of the mapper; a class vector stands in for each of them, as a classifier behind an
            average over the grid suggests.

    Raises:
        ConfigError: when the mapper does not end in a linear layer.
    """
    layer, inputs, prefix_embeds = _last_layer(mapper, classes.vectors.float()[:, None].expand(-1, num_tokens, -1))
    check_targets(targets, prefix_embeds.shape)
    residuals = _set_scale(mapper, targets)
    # [C, P · D_lm] from one input per class, or [C · P, D_lm] from P of them
    weight, bias = fit_linear(inputs, residuals.reshape(len(inputs), -1), ridge)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)


@torch.no_grad()
def insert_classifier(
    mapper: PrefixMapper, classes: NamedVectors, targets: Tensor, *, threshold: float = THRESHOLD
) -> None:
    """Make the hidden layer of an MLP mapper the classifier, and its last layer the names' embeddings.

    The prefix of an image is the names of all classes whose logit exceeds `threshold`, weighted by how far. An image
    with none gets the mean of all names, which says nothing.

    Args:
        mapper: of type "mlp" on a pooled feature, with options hidden_dim=C, activation=relu, and no input_norm.
        targets: float[C, P, D_lm] of `class_name_embeddings`.

    Raises:
        ConfigError: for any other mapper.
    """
    hidden, last = _two_layers(mapper, tuple(classes.vectors.shape))
    lm_dim = mapper.scale.norm.normalized_shape[0]
    check_targets(targets, (len(classes.names), last.out_features // lm_dim, lm_dim))
    hidden.weight.copy_(classes.vectors)
    hidden.bias.fill_(-threshold)
    if classes.bias is not None:
        hidden.bias.add_(classes.bias.to(hidden.bias))
    # [C, P, D_lm] -> [P · D_lm, C]
    last.weight.copy_(_set_scale(mapper, targets).flatten(1).T)
    last.bias.zero_()


def closed_form_mapper(
    classes: NamedVectors,
    tokenizer: PreTrainedTokenizerBase,
    language_model: PreTrainedModel,
    prefix_length: int = 3,
    kind: Literal["linear", "mlp"] = "linear",
) -> PrefixMapper:
    """A mapper of pooled features, made of class vectors and their names: "linear" by least squares, or "mlp"."""
    options = {"hidden_dim": len(classes.names), "activation": "relu"} if kind == "mlp" else {}
    mapper = build_mapper(
        MapperConfig(type=kind, prefix_length=prefix_length, **options),
        encoder_dim=classes.vectors.shape[1],
        num_tokens=1,
        lm_dim=word_embeddings(language_model).weight.shape[1],
        embedding_rms=embedding_rms(language_model),
    )
    targets = class_name_embeddings(classes.names, tokenizer, language_model, prefix_length)
    initialize = insert_classifier if kind == "mlp" else fit_last_layer
    initialize(mapper, classes, targets)
    return mapper


def nearest_names(prefix_embeds: Tensor, targets: Tensor, count: int = 1) -> Tensor:
    """Which names a prefix is nearest to, best first.

    Names share tokens and a common direction, so the cosine is taken after whitening: centred by the names' mean, each
    principal direction of the names scaled to the same spread.

    Args:
        prefix_embeds: float[B, P, D_lm]; targets: float[C, P, D_lm] of `class_name_embeddings`.

    Returns:
        int64[B, count], indices of names.
    """
    names = targets.mean(dim=1).double()
    centre = names.mean(dim=0)
    _, spread, directions = torch.linalg.svd(names - centre, full_matrices=False)
    kept = spread > 1e-6 * spread[0]

    def whiten(points: Tensor) -> Tensor:
        return nn.functional.normalize((points - centre) @ directions[kept].T / spread[kept], dim=-1)

    return (whiten(prefix_embeds.mean(dim=1).double()) @ whiten(names).T).topk(count, dim=-1).indices


def check_targets(targets: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(targets.shape) != tuple(expected):
        raise ConfigError(
            f"targets: got shape {tuple(targets.shape)}, expected {tuple(expected)}: classes, prefix_length, lm_dim; "
            "make them with class_name_embeddings from the same names, language model and length"
        )


def _set_scale(mapper: PrefixMapper, targets: Tensor) -> Tensor:
    """Centre the mapper's layer norm on the names, with their spread, and return what the body has to give.

    The layer norm sets every prefix embedding to one length, so that only the direction from the names' mean is left
    for the body: least squares may shrink it as it likes.
    """
    centre = targets.mean(dim=(0, 1))
    residuals = targets - centre
    spread = residuals.square().mean().sqrt()
    mapper.scale.norm.bias.copy_(centre)
    mapper.scale.norm.weight.fill_(spread)
    return residuals / spread


def _two_layers(mapper: PrefixMapper, shape: tuple[int, ...]) -> tuple[nn.Linear, nn.Linear]:
    """The layers of an MLP mapper that takes a classifier of `shape`, [C, D_enc], as it is."""
    body = mapper.body
    layers = list(body.layers) if isinstance(body, MLPMapper) and isinstance(body.input_norm, nn.Identity) else []
    kinds = [type(layer) for layer in layers]
    if kinds == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]:
        hidden, last = cast(nn.Linear, layers[0]), cast(nn.Linear, layers[-1])
        if tuple(hidden.weight.shape) == shape and cast(MLPMapper, body).together:
            return hidden, last
    raise ConfigError(
        f"model.mapper: a classifier of {shape[0]} classes and {shape[1]} features goes into a mapper of type mlp with "
        f"hidden_dim={shape[0]}, activation=relu, num_layers=2 and input_norm=false, on a pooled feature of "
        f"{shape[1]}; this one is another"
    )


def _last_layer(mapper: PrefixMapper, image_features: Tensor) -> tuple[nn.Linear, Tensor, Tensor]:
    """The linear layer that gives the body's output, what it reads for these features (float[rows, D_in]), and gives
    (float[B, P, D_lm]).
    """
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, args, output: calls.append((layer, args[0], output)))
        for module in mapper.body.modules()
        if isinstance(module, nn.Linear)
    ]
    was_training = mapper.training
    try:
        prefix_embeds = mapper.eval().body(image_features)
    finally:
        mapper.train(was_training)
        for hook in hooks:
            hook.remove()
    layer, inputs, output = calls[-1]
    if not torch.equal(output.flatten(), prefix_embeds.flatten()):
        raise ConfigError(
            f"model.mapper: {type(mapper.body).__name__} does not end in a linear layer, which is what class vectors "
            "can set; give it a hidden_dim other than the LM's, or take type linear or mlp"
        )
    return layer, inputs.flatten(0, -2), prefix_embeds
