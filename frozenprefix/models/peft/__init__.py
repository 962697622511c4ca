"""Parameter-efficient tuning of the frozen parts, by peft (https://github.com/huggingface/peft).

Nothing here imports peft itself, which takes seconds, before a recipe or a checkpoint asks for a method.
"""

from __future__ import annotations

from typing import Any

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import PeftMethodConfig
from frozenprefix.models.options import option_problems
from frozenprefix.registry import Registry

__all__ = ["PEFT_METHODS", "PROMPT_LEARNING", "validate_peft"]

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
# methods that put tokens before a text, for which an image encoder has no place
PROMPT_LEARNING = ("prefix_tuning", "prompt_tuning")


def validate_peft(config: PeftMethodConfig, part: str) -> list[str]:
    """Check the method's name and its options; return one line per problem.

    Args:
        part: "language_model" or "vision_encoder".
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
