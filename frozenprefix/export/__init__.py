"""Trained prefixes in other engines, and mappers that others trained: verified export, and import."""

from frozenprefix.export.clipcap import import_clipcap
from frozenprefix.export.embeds import export_embeds, request_body
from frozenprefix.export.gguf import export_gguf
from frozenprefix.export.llava import export_llava
from frozenprefix.export.projectors import import_llava, import_nanovlm
from frozenprefix.export.source import Source, built_in_images
from frozenprefix.export.verify import Verification, verify_gguf, verify_llava

__all__ = [
    "Source",
    "Verification",
    "built_in_images",
    "export_embeds",
    "export_gguf",
    "export_llava",
    "import_clipcap",
    "import_llava",
    "import_nanovlm",
    "request_body",
    "verify_gguf",
    "verify_llava",
]
