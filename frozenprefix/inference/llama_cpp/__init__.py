"""llama.cpp as an engine: the language model of a checkpoint from a GGUF file. Needs the extra `llamacpp`."""

from frozenprefix.inference.llama_cpp.captioner import LlamaCppCaptioner, PrefixEncoder
from frozenprefix.inference.llama_cpp.language_model import LlamaCppModel

__all__ = ["LlamaCppCaptioner", "LlamaCppModel", "PrefixEncoder"]
