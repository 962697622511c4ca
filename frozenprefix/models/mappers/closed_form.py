"""Mappers without training: from the class vectors of a classifier to the LM's embeddings of the class names.

The weights of a classifier, or the text vectors of a joint encoder, are vectors in the space of the pooled image
features. Each has a name, and names are words of the LM. Two mappers follow from that without a gradient:

- Any mapper that ends in a linear layer. Ridge regression maps the input of that layer for each class vector to the
  embeddings of the class name (`fit_last_layer`).
- An MLP whose hidden layer is the classifier itself. The classes above a threshold name the image
  (`insert_classifier`).

Both give ordinary weights, to use as they are or to train from.
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

# Chosen for EfficientNet-Lite0 with SmolLM2-135M on 2,000 photos of Flickr8k. With prefix_length 3 the nearest name is
# the classifier's first choice for 53 % of them by regression, and for 90 % with the classifier as the hidden layer.
RIDGE = 10.0
THRESHOLD = 5.0


@dataclass(frozen=True)
class NamedVectors:
    """Vectors in the space of the image features, each with a name.

    Args:
        vectors: float[C, D_enc], the weight of a classifier, or text vectors of a joint encoder.
        names: names of the C classes.
        bias: float[C], of the classifier; None for zeros.

    Raises:
        ConfigError: if their numbers differ.

    Example:
        >>> len(NamedVectors(torch.randn(2, 16), ["cat", "dog"]).names)
        2
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
    """Word embeddings of names, as the LM reads them inside a sentence.

    Returns:
        float32[C, length, D_lm]. If a name has more tokens than `length`, the last position is the mean of the rest;
        with `length` 1 this is the mean of all tokens. A shorter name repeats its last token.

    Raises:
        ConfigError: for a name without any token.

    Example:
        >>> class_name_embeddings(["cat", "red dog"], processor.tokenizer, model.language_model, length=2).shape
        torch.Size([2, 2, 32])
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
    """Ridge regression, `targets ≈ sources @ weight.T + bias`, without a penalty on the bias.

    Args:
        sources: float[n, D_in]; targets: float[n, D_out].
        ridge: strength, as a multiple of the mean squared length of the centred sources; 0 interpolates.

    Returns:
        weight float32[D_out, D_in] and bias float32[D_out].

    Example:
        >>> weight, bias = fit_linear(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]), ridge=0)
        >>> round(weight.item(), 4), round(bias.item(), 4)
        (2.0, 1.0)
    """
    sources, targets = sources.double(), targets.double()
    mean_source, mean_target = sources.mean(dim=0), targets.mean(dim=0)
    centred = sources - mean_source
    penalty = ridge * centred.square().sum(dim=1).mean()
    # by singular values, which also works with ridge 0 and with fewer sources than dimensions
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    significant = values > 1e-9 * values.max()
    shrunk = values[significant] / (values[significant].square() + penalty)
    weight = (targets - mean_target).T @ (left[:, significant] * shrunk) @ right[significant]
    return weight.float(), (mean_target - weight @ mean_source).float()


@torch.no_grad()
def fit_last_layer(
    mapper: PrefixMapper, classes: NamedVectors, targets: Tensor, *, ridge: float = RIDGE, num_tokens: int = 1
) -> None:
    """Set the last linear layer of `mapper`, and its scale, so that class vectors become the embeddings of their names.

    Args:
        targets: float[C, P, D_lm] from `class_name_embeddings`.
        num_tokens: image tokens of the mapper. A class vector takes the place of each of them, which fits a classifier
            that reads the average over the grid.

    Raises:
        ConfigError: if the mapper does not end in a linear layer.
    """
    layer, inputs, prefix_embeds = _last_layer(mapper, classes.vectors.float()[:, None].expand(-1, num_tokens, -1))
    _check_targets(targets, prefix_embeds.shape)
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
    """Set the hidden layer of an MLP mapper to the classifier, and its last layer to the embeddings of the names.

    The prefix of an image is the sum of the names of all classes whose logit exceeds `threshold`, weighted by how far.
    An image without such a class gets the mean of all names, which says nothing.

    Args:
        mapper: of type "mlp" on a pooled feature, with options hidden_dim=C, activation=relu, and no input_norm.
        targets: float[C, P, D_lm] from `class_name_embeddings`.

    Raises:
        ConfigError: for any other mapper.
    """
    hidden, last = _two_layers(mapper, tuple(classes.vectors.shape))
    lm_dim = _layer_norm(mapper).normalized_shape[0]
    _check_targets(targets, (len(classes.names), last.out_features // lm_dim, lm_dim))
    hidden.weight.copy_(classes.vectors)
    hidden.bias.fill_(-threshold)
    if classes.bias is not None:
        hidden.bias.add_(classes.bias.to(hidden.bias))
    # [C, P, D_lm] -> [P * D_lm, C]
    last.weight.copy_(_set_scale(mapper, targets).flatten(1).T)
    last.bias.zero_()


def closed_form_mapper(
    classes: NamedVectors,
    tokenizer: PreTrainedTokenizerBase,
    language_model: PreTrainedModel,
    prefix_length: int = 3,
    kind: Literal["linear", "mlp"] = "linear",
) -> PrefixMapper:
    """Build a mapper of pooled features from class vectors and their names: "linear" by regression, or "mlp".

    Example:
        >>> classes = NamedVectors(torch.randn(2, 16), ["cat", "dog"])
        >>> mapper = closed_form_mapper(classes, processor.tokenizer, model.language_model)
        >>> mapper(classes.vectors[:, None]).shape
        torch.Size([2, 3, 32])
    """
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
    """Find the names that prefixes are nearest to, best first.

    Names share tokens and a common direction, so the cosine is taken after whitening: the names are centred by their
    mean, and each of their principal directions is scaled to the same spread.

    Args:
        prefix_embeds: float[B, P, D_lm].
        targets: float[C, P, D_lm] from `class_name_embeddings`.

    Returns:
        int64[B, count], indices of names.

    Example:
        >>> targets = torch.randn(4, 3, 8)
        >>> nearest_names(targets, targets).flatten().tolist()
        [0, 1, 2, 3]
    """
    names = targets.mean(dim=1).double()
    centre = names.mean(dim=0)
    _, spread, directions = torch.linalg.svd(names - centre, full_matrices=False)
    significant = spread > 1e-6 * spread[0]

    def whiten(points: Tensor) -> Tensor:
        return nn.functional.normalize((points - centre) @ directions[significant].T / spread[significant], dim=-1)

    return (whiten(prefix_embeds.mean(dim=1).double()) @ whiten(names).T).topk(count, dim=-1).indices


def _check_targets(targets: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(targets.shape) != tuple(expected):
        raise ConfigError(
            f"targets: got shape {tuple(targets.shape)}, expected {tuple(expected)}: classes, prefix_length, lm_dim; "
            "compute them with class_name_embeddings from the same names, language model and length"
        )


def _set_scale(mapper: PrefixMapper, targets: Tensor) -> Tensor:
    """Set the mapper's layer norm to the mean and spread of the names; return what is left for the body to predict.

    The layer norm gives all prefix embeddings the same length, so the body only has to predict the direction from the
    mean of the names, and it does no harm that the regression shrinks it.
    """
    centre = targets.mean(dim=(0, 1))
    residuals = targets - centre
    spread = residuals.square().mean().sqrt()
    norm = _layer_norm(mapper)
    norm.bias.copy_(centre)
    norm.weight.fill_(spread)
    return residuals / spread


def _layer_norm(mapper: PrefixMapper) -> nn.LayerNorm:
    if isinstance(mapper.scale, nn.Identity):
        raise ConfigError(
            "model.mapper.output_norm: got 'none', expected 'layer': the closed form puts mean and spread of the names "
            "into the layer norm behind the mapper"
        )
    return mapper.scale.norm


def _two_layers(mapper: PrefixMapper, shape: tuple[int, ...]) -> tuple[nn.Linear, nn.Linear]:
    """The two layers of an MLP mapper whose hidden layer has the `shape` of the classifier, [C, D_enc]."""
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
        f"{shape[1]}; this mapper is different"
    )


def _last_layer(mapper: PrefixMapper, image_features: Tensor) -> tuple[nn.Linear, Tensor, Tensor]:
    """The layer that computes the body's output, its input float[rows, D_in], and the output float[B, P, D_lm]."""
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
            f"model.mapper: {type(mapper.body).__name__} does not end in a linear layer to fit; set a hidden_dim "
            "other than the LM's, or use type linear or mlp"
        )
    return layer, inputs.flatten(0, -2), prefix_embeds
