"""Private names of torch and transformers, and what differs between their supported releases.

No other package may use a private name of a library. Here each is looked up when it is needed, by `private`
unless its absence is no loss. If a release has dropped or renamed it, the caller takes the plain path, and one line in
the log says so.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

CACHE = (
    "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)  # fmt: skip
"""Name of the key-value cache in arguments and outputs of a language model: `past_key_values` before 5.24."""


def private(owner: Any, name: str, consequence: str) -> Any:
    """Return `owner.name`, or None where this release does not have it; the first time, log the `consequence`.

    Example:
        >>> private(torch, "_no_such_name", "attention is slower") is None
        True
    """
    value = getattr(owner, name, None)
    if value is None:
        say_once(f"this release has no '{name}': {consequence}")
    return value


@cache
def say_once(message: str) -> None:
    """Log a warning the first time that it is given.

    Example:
        >>> say_once("this release has no '_attention': attention is slower")
    """
    logger.warning(message)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered on `module` or on all modules; True if this torch does not tell.

    Example:
        >>> has_hooks(torch.nn.Linear(2, 2))
        False
    """
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        for owner, attribute in ((module, name), (nn.modules.module, f"_global{name}")):
            hooks = private(owner, attribute, "decoder layers keep their own forward pass")
            if hooks is None or len(hooks):
                return True
    return False


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores from that of `weights = softmax(scores)`, over the last axis; may overwrite `grad`.

    Example:
        >>> weights = torch.tensor([[0.5, 0.5]])
        >>> softmax_backward(torch.tensor([[1.0, 0.0]]), weights).tolist()
        [[0.25, -0.25]]
    """
    backward = private(torch, "_softmax_backward_data", "the backward pass of attention takes more memory")
    if backward is not None:
        return backward(grad, weights, -1, weights.dtype, grad_input=grad)
    product = grad.mul_(weights)
    return product.addcmul_(weights, product.sum(dim=-1, keepdim=True), value=-1.0)


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention that a language model uses: "sdpa", "eager", …; None if this release does not tell.

    Example:
        >>> attention_implementation(model.language_model.config)
        'sdpa'
    """
    return private(config, "_attn_implementation", "torch's attention is used for packed rows")


def config_option(config: PreTrainedConfig, name: str) -> Any:
    """What an argument of `from_pretrained` was, of those that the Auto classes put into the config; else None.

    Args:
        name: "attn_implementation" or "experts_implementation".

    Example:
        >>> config_option(type(model.config)(attn_implementation="eager"), "attn_implementation")
        'eager'
    """
    # absent in releases without the argument, which then refuse it themselves
    return getattr(config, f"_{name}_internal", None)


def follow_attention(config: PreTrainedConfig, language_model: PreTrainedModel | None) -> None:
    """Let a config name the attention of the language model inside, where loading it again finds it.

    Without a language model, and for experts, what transformers' constructor sets goes: it would look as if someone had
    asked for it.
    """
    if config_option(config, "attn_implementation") is not None:
        config._attn_implementation = (
            None if language_model is None else attention_implementation(language_model.config)
        )
    if config_option(config, "experts_implementation") is not None:
        config._experts_implementation = None


def layer_class_names(language_model: PreTrainedModel) -> tuple[str, ...]:
    """Class names of the layers that transformers keeps on one device: the decoder layers; none if it does not tell.

    Example:
        >>> layer_class_names(model.language_model)
        ('LlamaDecoderLayer',)
    """
    return tuple(private(language_model, "_no_split_modules", "FSDP2 has to be told the class of the layers") or ())


def is_recurrent(language_model: PreTrainedModel) -> bool:
    """Whether a language model has layers with a state that cannot go back to an earlier token.

    Example:
        >>> is_recurrent(model.language_model)
        False
    """
    return bool(private(language_model, "_is_stateful", "a recurrent language model may answer from a wrong history"))
