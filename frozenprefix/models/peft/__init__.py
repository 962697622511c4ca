"""Parameter-efficient tuning of the frozen parts, by peft (https://github.com/huggingface/peft).

Importing this package does not import peft, which takes seconds; the first adapter does.
"""

from frozenprefix.models.peft.adapter_set import AdapterSet
from frozenprefix.models.peft.registry import PEFT_METHODS, PROMPT_LEARNING, validate_peft

__all__ = ["PEFT_METHODS", "PROMPT_LEARNING", "AdapterSet", "validate_peft"]
