"""The peft methods by name, and the check of their options."""

from __future__ import annotations

from typing import Any

from frozenprefix.errors import ConfigError
from frozenprefix.models.options import option_problems
from frozenprefix.models.section import PeftMethodConfig
from frozenprefix.registry import Registry

PEFT_METHODS: Registry[Any] = Registry(
    "peft method",
    {
        "lora": "frozenprefix.models.peft.methods:lora",
        "dora": "frozenprefix.models.peft.methods:dora",
        "adalora": "frozenprefix.models.peft.methods:adalora",
        "ia3": "frozenprefix.models.peft.methods:ia3",
        "prefix_tuning": "frozenprefix.models.peft.methods:prefix_tuning",
        "prompt_tuning": "frozenprefix.models.peft.methods:prompt_tuning",
    },
)
# methods that put tokens before a text, which an image encoder does not read
PROMPT_LEARNING = ("prefix_tuning", "prompt_tuning")


def validate_peft(config: PeftMethodConfig, part: str) -> list[str]:
    """Check the method's name and its options; return one line per problem.

    Args:
        part: "language_model" or "vision_encoder".

    Example:
        >>> validate_peft(PeftMethodConfig(type="prompt_tuning"), "vision_encoder")
        ["model.vision_encoder.peft.type: got 'prompt_tuning', which puts tokens before a text; expected one of: \
adalora, dora, ia3, lora"]
    """
    field = f"model.{part}.peft"
    if part != "language_model" and config.type in PROMPT_LEARNING:
        others = ", ".join(name for name in PEFT_METHODS.names() if name not in PROMPT_LEARNING)
        return [f"{field}.type: got '{config.type}', which puts tokens before a text; expected one of: {others}"]
    problems = option_problems(PEFT_METHODS, field, config.type, config.options, set())
    if not problems:
        try:
            PEFT_METHODS.get(config.type)(**config.options)
        except (ConfigError, ValueError) as error:
            problems = [f"{field}: {error}"]
    return problems
