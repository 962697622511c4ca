"""The frozen language model: one interface, `FrozenLM`, and where its weights come from."""

from transformers import PreTrainedModel

from frozenprefix.models.language_model.base import FrozenLM, embedding_rms
from frozenprefix.models.language_model.decoder_only import DecoderOnlyLM
from frozenprefix.models.language_model.encoder_decoder import EncoderDecoderLM
from frozenprefix.models.language_model.end_tokens import end_tokens, padding_token
from frozenprefix.models.language_model.loading import load_language_model, load_tokenizer

__all__ = [
    "DecoderOnlyLM",
    "EncoderDecoderLM",
    "FrozenLM",
    "embedding_rms",
    "end_tokens",
    "load_language_model",
    "load_tokenizer",
    "padding_token",
    "wrap_language_model",
]


def wrap_language_model(model: PreTrainedModel) -> FrozenLM:
    """The `FrozenLM` for a transformers model, which should be frozen and in evaluation mode.

    Example:
        >>> type(wrap_language_model(model.language_model)).__name__
        'DecoderOnlyLM'
    """
    return (EncoderDecoderLM if model.config.is_encoder_decoder else DecoderOnlyLM)(model)
