"""The methods, with peft's own names and defaults for their options.

Not offered: options that would change frozen weights (`bias`, `modules_to_save`, `trainable_token_indices`,
initialisations such as PiSSA that take a part out of the weights), options that need data or training code of their
own, and options that follow from the model.
"""

from __future__ import annotations

from functools import wraps
from typing import Annotated, Any, Literal

from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from pydantic import Field

from frozenprefix.errors import ConfigError
from frozenprefix.models.options import Count, Dropout, Ratio

# module names, or a regular expression; peft's own choice for the model type when not given
Modules = list[str] | str | None
Steps = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]
# AdaLoRA needs the steps of the run, which are known when training starts (`AdapterSet.set_total_steps`)
STEPS_UNKNOWN = 10**9


def lora(
    *,
    r: Count = 8,
    target_modules: Modules = None,
    exclude_modules: Modules = None,
    lora_alpha: Ratio = 8,
    lora_dropout: Dropout = 0.0,
    use_rslora: bool = False,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
) -> LoraConfig:
    """LoRA: low-rank updates of frozen matrices (Hu et al. 2022).

    Example:
        >>> from frozenprefix.models.peft import PEFT_METHODS
        >>> PEFT_METHODS.get("lora")(r=4, target_modules=["q_proj"]).lora_alpha
        8
    """
    return LoraConfig(
        r=r,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
    )


# with the options of lora and their types, which a recipe is checked against
@wraps(lora, assigned=("__annotations__",))
def dora(**options: Any) -> LoraConfig:
    """DoRA: LoRA on the direction of every column, and a trained length (Liu et al. 2024)."""
    config = lora(**options)
    config.use_dora = True
    return config


def adalora(
    *,
    target_r: Count = 8,
    init_r: Count = 12,
    tinit: Steps = 0,
    tfinal: Steps = 0,
    deltaT: Count = 1,
    beta1: Decay = 0.85,
    beta2: Decay = 0.85,
    orth_reg_weight: Ratio = 0.5,
    target_modules: Modules = None,
    exclude_modules: Modules = None,
    lora_alpha: Ratio = 8,
    lora_dropout: Dropout = 0.0,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
) -> AdaLoraConfig:
    """AdaLoRA: ranks move during training to the matrices that need them (Zhang et al. 2023).

    Ranks fall from `init_r` after `tinit` steps to `target_r` on average, `tfinal` steps before the end.
    """
    if target_r >= init_r:
        raise ConfigError(f"target_r: got {target_r}, expected fewer than init_r {init_r}; else no rank would change")
    return AdaLoraConfig(
        target_r=target_r,
        init_r=init_r,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=deltaT,
        beta1=beta1,
        beta2=beta2,
        orth_reg_weight=orth_reg_weight,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        total_step=STEPS_UNKNOWN,
    )


def ia3(
    *, target_modules: Modules = None, exclude_modules: Modules = None, feedforward_modules: Modules = None
) -> IA3Config:
    """IA3: learned scales of keys, values and inner activations (Liu et al. 2022, T-Few)."""
    options: dict[str, Any] = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    if feedforward_modules is not None:
        options["feedforward_modules"] = feedforward_modules
    return IA3Config(**options)


def prefix_tuning(*, num_virtual_tokens: Count = 20, init_weights: Literal["zero"] | None = None) -> PrefixTuningConfig:
    """Prefix tuning: keys and values of virtual tokens in every layer (Li & Liang 2021).

    Without the paper's reparametrisation: peft's checkpoints hold only its result, so training could not be resumed.
    """
    return PrefixTuningConfig(num_virtual_tokens=num_virtual_tokens, init_weights=init_weights)


def prompt_tuning(
    *,
    num_virtual_tokens: Count = 20,
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM"] = "SAMPLE_VOCAB",
) -> PromptTuningConfig:
    """Prompt tuning: embeddings of virtual tokens (Lester et al. 2021).

    They start as words of the vocabulary, which the paper's section 3.2 found better than random numbers; peft's
    default, a standard normal, is many times as large as the word embeddings of most LMs.
    """
    return PromptTuningConfig(num_virtual_tokens=num_virtual_tokens, prompt_tuning_init=prompt_tuning_init)
