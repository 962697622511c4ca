"""The tokens that end a generated text, and those that pad it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def end_tokens(source: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens at which a text ends: the tokenizer's own, and those of the model's generation config.

    Args:
        source: a model with a `generation_config`, or a config with an `eos_token_id` (an id, a list of ids, or None).

    Example:
        >>> end_tokens(model, processor.tokenizer)
        [2]
    """
    own = getattr(source, "generation_config", source).eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else own
    return sorted({tokenizer.eos_token_id, *own})


def padding_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to pad generated texts with: the tokenizer's padding token, or its end token when the LM has no such id.

    Padding that was added to the tokenizer alone is outside the LM's vocabulary, and `generate` reads it again when
    one text of a batch ends early.

    Example:
        >>> padding_token(model, processor.tokenizer) in range(300)
        True
    """
    padding = tokenizer.pad_token_id
    inside = padding is not None and padding < model.get_input_embeddings().num_embeddings
    return padding if inside else end_tokens(model, tokenizer)[0]
