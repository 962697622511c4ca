"""Trained prefixes in other engines, and mappers that others trained: verified export, and import."""

from frozenprefix.export.embeds import export_embeds, request_body
from frozenprefix.export.gguf import export_gguf
from frozenprefix.export.llava import export_llava
from frozenprefix.export.source import Source, built_in_images
from frozenprefix.export.verify import Verification, verify_gguf, verify_llava

__all__ = [
    "Source",
    "Verification",
    "built_in_images",
    "export_embeds",
    "export_gguf",
    "export_llava",
    "request_body",
    "verify_gguf",
    "verify_llava",
]
