"""Registration with transformers' Auto classes; `import frozenprefix` imports this module.

Example:
    >>> from transformers import AutoModelForImageTextToText
    >>> type(AutoModelForImageTextToText.from_pretrained(checkpoint)).__name__
    'FrozenPrefixForConditionalGeneration'
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.contrastive.configuration import LockedImageTextConfig
from frozenprefix.models.contrastive.modeling import LockedImageTextModel
from frozenprefix.models.contrastive.processing import LockedImageTextProcessor
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor

AutoConfig.register(FrozenPrefixConfig.model_type, FrozenPrefixConfig, exist_ok=True)
AutoProcessor.register(FrozenPrefixConfig, FrozenPrefixProcessor, exist_ok=True)
# AutoModel gives the same class: without its head no part of the model is of use.
AutoModel.register(FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, exist_ok=True)
if hasattr(transformers, "AutoModelForMultimodalLM"):  # loaded by `transformers serve`; newer than the oldest release
    transformers.AutoModelForMultimodalLM.register(
        FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, exist_ok=True
    )

AutoConfig.register(LockedImageTextConfig.model_type, LockedImageTextConfig, exist_ok=True)
AutoProcessor.register(LockedImageTextConfig, LockedImageTextProcessor, exist_ok=True)
AutoModel.register(LockedImageTextConfig, LockedImageTextModel, exist_ok=True)
