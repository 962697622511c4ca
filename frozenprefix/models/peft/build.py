"""From a recipe's method, or a user's peft model, to an `Adapter`."""

from __future__ import annotations

import warnings

from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from frozenprefix.errors import ConfigError
from frozenprefix.models.peft.adalora import AdaLoraAdapter
from frozenprefix.models.peft.adapter import NAME, Adapter
from frozenprefix.models.peft.registry import PEFT_METHODS, validate_peft
from frozenprefix.models.section import PeftMethodConfig


def make_adapter(module: nn.Module, config: PeftMethodConfig, part: str) -> Adapter:
    """Inject the layers of a peft method into a frozen module, in place.

    Args:
        part: "language_model" or "vision_encoder".

    Raises:
        ConfigError: for wrong options, target modules that do not exist, or a method that does not fit this module.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> adapter = make_adapter(block, PeftMethodConfig(type="lora", r=2, target_modules=["0"]), "vision_encoder")
        >>> {name: tuple(p.shape) for name, p in adapter.named_parameters().items()}
        {'base_model.model.0.lora_A.default.weight': (2, 4), 'base_model.model.0.lora_B.default.weight': (4, 2)}
    """
    field = f"model.{part}.peft"
    problems = validate_peft(config, part)
    if problems:
        raise ConfigError(problems)
    settings = PEFT_METHODS.get(config.type)(**config.options)
    if isinstance(module, PreTrainedModel) and part == "language_model":
        two_parts = module.config.is_encoder_decoder
        settings.task_type = TaskType.SEQ_2_SEQ_LM if two_parts else TaskType.CAUSAL_LM
        if two_parts and settings.is_prompt_learning:
            raise ConfigError(f"{field}.type: '{config.type}' needs an LM without an encoder; use lora")
    if hasattr(settings, "fan_in_fan_out"):
        settings.fan_in_fan_out = any(isinstance(m, Conv1D) for m in module.modules())
    tied = tied_modules(module)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # refused below
            peft_model = get_peft_model(module, settings, adapter_name=NAME)
    except ValueError as error:
        raise ConfigError(_refusal(module, config, field, error)) from error
    check_targets(peft_model, tied, field)
    return adapter_of(peft_model, field)


def adapter_of(peft_model: PeftModel, field: str) -> Adapter:
    """Wrap an existing peft model, which must hold one adapter with peft's default name."""
    if list(peft_model.peft_config) != [NAME]:
        names = ", ".join(peft_model.peft_config)
        raise ConfigError(f"{field}: got a peft model with the adapters {names}; expected one, named '{NAME}'")
    kind = AdaLoraAdapter if peft_model.peft_config[NAME].peft_type == "ADALORA" else Adapter
    return kind(peft_model, field)


def _refusal(module: nn.Module, config: PeftMethodConfig, field: str, error: ValueError) -> str:
    """Turn peft's error about target modules into one line that lists the linear layers of the module."""
    names = {name.split(".")[-1] for name, one in module.named_modules() if isinstance(one, (nn.Linear, Conv1D))}
    known = f"linear layers of {type(module).__name__}: {', '.join(sorted(names))}"
    if config.options.get("target_modules") is None and "lease specify" in str(error):
        return f"{field}.target_modules: missing, and peft has no default for this model; {known}"
    return f"{field}: {str(error).splitlines()[0]} ({known})"


def tied_modules(module: nn.Module) -> list[nn.Module]:
    """Word embeddings and output layer of a language model if they share one weight, else nothing."""
    if not isinstance(module, PreTrainedModel):
        return []
    pair = [module.get_input_embeddings(), module.get_output_embeddings()]
    weights = [getattr(one, "weight", None) for one in pair]
    return pair if weights[0] is not None and weights[0] is weights[1] else []


def check_targets(peft_model: PeftModel, tied: list[nn.Module], field: str) -> None:
    """Refuse target layers whose frozen weights peft would change."""
    for name, layer in peft_model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        name = name.removeprefix("base_model.model.")
        if any(layer.get_base_layer() is one for one in tied):
            raise ConfigError(
                f"{field}.target_modules: '{name}' shares its weight between word embeddings and output layer, so "
                "merging into one would change the other; name other modules"
            )
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            raise ConfigError(
                f"{field}.target_modules: '{name}' is a torch.nn.MultiheadAttention, whose frozen weights peft changes "
                "in every step; name linear layers, as [mlp.c_fc, mlp.c_proj]"
            )
