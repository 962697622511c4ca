"""llama.cpp's C interface, by ctypes, from the library inside the package xllamacpp.

xllamacpp's own Python interface is a server, which takes no embeddings; its library exports every function of llama.h
and mtmd.h. This is the only file that knows their structs. Their layout changes between builds, so the defaults that
the library fills in are compared with the known ones first: a build with another layout is refused, never called.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections import deque
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

from frozenprefix.errors import ConfigError

PACKAGE = "xllamacpp"
F32 = 0  # GGML_TYPE_F32
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_EXTRA = "frozenprefix[llamacpp]"


class ModelParams(Structure):
    """`llama_model_params`, as far as it is used; the rest keeps the library's values."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("_room", ctypes.c_ubyte * 256),
    )


class ContextParams(Structure):
    """`llama_context_params`, as far as it is used."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("_room", ctypes.c_ubyte * 256),
    )


class Batch(Structure):
    """`llama_batch`: tokens or embeddings, one of the two."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class VisionParams(Structure):
    """`mtmd_context_params`."""

    _fields_ = (
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int),
        ("warmup", c_bool),
        ("image_min_tokens", c_int),
        ("image_max_tokens", c_int),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("_room", ctypes.c_ubyte * 256),
    )


class InputText(Structure):
    """`mtmd_input_text`."""

    _fields_ = (("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool))


# What the library fills in, where the layout is the one above: every field that is not zero, and some that are.
_CONTEXT_DEFAULTS = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0},
    **dict.fromkeys(("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type"), -1),
    **dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "defrag_thold"), -1.0),
    **{"ctx_type": 0, "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_orig_ctx": 0, "type_k": 1, "type_v": 1},
    **{"cb_eval": None, "cb_eval_user_data": None},
}
_MODEL_DEFAULTS = {"devices": None, "tensor_buft_overrides": None, "n_gpu_layers": -1}
_VISION_DEFAULTS = {
    **{"use_gpu": True, "device": None, "print_timings": True, "n_threads": 4, "image_marker": None},
    **{"flash_attn_type": -1, "warmup": True, "image_min_tokens": -1, "image_max_tokens": -1, "batch_max_tokens": 1024},
}

_POINTERS = (  # functions that return a pointer
    *("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"),
    *("mtmd_init_from_file", "mtmd_input_chunks_init", "mtmd_input_chunks_get", "mtmd_bitmap_init"),
)
_FLOATS = ("llama_get_logits_ith", "mtmd_get_output_embd")
_ARGUMENTS: dict[str, list[Any]] = {
    "llama_model_load_from_file": [c_char_p, ModelParams],
    "llama_init_from_model": [c_void_p, ContextParams],
    "llama_decode": [c_void_p, Batch],
    "llama_get_logits_ith": [c_void_p, c_int32],
    "llama_memory_clear": [c_void_p, c_bool],
    "llama_tokenize": [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    "llama_set_n_threads": [c_void_p, c_int32, c_int32],
    "mtmd_init_from_file": [c_char_p, c_void_p, VisionParams],
    "mtmd_bitmap_init": [c_uint32, c_uint32, c_char_p],
    "mtmd_tokenize": [c_void_p, c_void_p, POINTER(InputText), POINTER(c_void_p), c_size_t],
    "mtmd_tokenize_from_parts": [c_void_p],  # not called: builds without it have another `mtmd_input_text`
    "mtmd_input_chunks_get": [c_void_p, c_size_t],
    "mtmd_encode_chunk": [c_void_p, c_void_p],
    "mtmd_input_chunk_get_tokens_text": [c_void_p, POINTER(c_size_t)],
}
_ONE_POINTER = (  # functions that take a pointer alone
    *("llama_model_free", "llama_free", "llama_model_get_vocab", "llama_model_n_embd", "llama_get_memory"),
    *("llama_vocab_n_tokens", "llama_vocab_type", "mtmd_free", "mtmd_get_output_embd", "mtmd_bitmap_free"),
    *("mtmd_input_chunks_free", "mtmd_input_chunks_size", "mtmd_input_chunk_get_type"),
    "mtmd_input_chunk_get_n_tokens",
)
_SIZES = ("mtmd_input_chunks_size", "mtmd_input_chunk_get_n_tokens")
_NOTHING = ("llama_model_free", "llama_free", "mtmd_free", "mtmd_bitmap_free", "mtmd_input_chunks_free")


class LlamaCpp:
    """The functions of llama.h and mtmd.h, by name: `library.call.llama_decode(context, batch)`.

    Attributes:
        version: of the package xllamacpp; its last number is llama.cpp's build.
        errors: the latest lines that llama.cpp logged as errors; nothing is printed.
    """

    def __init__(self, path: Path, version: str):
        self.version = version
        self.call: Any = ctypes.CDLL(str(path))
        self.errors: deque[str] = deque(maxlen=4)
        self._declare()
        self._check("llama_context_default_params", ContextParams, _CONTEXT_DEFAULTS)
        self._check("llama_model_default_params", ModelParams, _MODEL_DEFAULTS)
        self._check("mtmd_context_params_default", VisionParams, _VISION_DEFAULTS)
        callback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
        self._log = callback(self._keep_errors)  # kept alive: the library calls it
        for name in ("llama_log_set", "mtmd_log_set"):
            getattr(self.call, name)(self._log, None)
        self.call.llama_backend_init()

    def defaults(self, kind: type[Any]) -> Any:
        """A struct of parameters with the library's values."""
        names = {ModelParams: "llama_model_default_params", ContextParams: "llama_context_default_params"}
        return getattr(self.call, names.get(kind, "mtmd_context_params_default"))()

    def reason(self) -> str:
        """Why the latest call failed, as llama.cpp logged it."""
        return "; ".join(self.errors) or "llama.cpp gives no reason"

    def _keep_errors(self, level: int, text: bytes | None, _: Any) -> None:
        if level == _ERROR and text and text.strip():
            self.errors.append(text.decode(errors="replace").strip())

    def _declare(self) -> None:
        for name, arguments in {**_ARGUMENTS, **{name: [c_void_p] for name in _ONE_POINTER}}.items():
            try:
                function = getattr(self.call, name)
            except AttributeError as error:
                raise self._unsupported(f"it has no {name}") from error
            function.argtypes = arguments
        for names, kind in (
            *((_POINTERS, c_void_p), (_FLOATS, POINTER(c_float)), (_SIZES, c_size_t), (_NOTHING, None)),
            (("mtmd_input_chunk_get_tokens_text",), POINTER(c_int32)),
        ):
            for name in names:
                getattr(self.call, name).restype = kind

    def _check(self, name: str, kind: type[Any], expected: dict[str, Any]) -> None:
        """Compare the defaults in the library's struct with the known ones."""
        function = getattr(self.call, name)
        function.restype = kind
        values = function()
        for field, value in expected.items():
            got = getattr(values, field)
            if got != value:
                raise self._unsupported(f"{name}: {field} is {got}, expected {value}")

    def _unsupported(self, reason: str) -> ConfigError:
        return ConfigError(
            f"engine: {PACKAGE} {self.version} has another C interface than this version of frozenprefix knows "
            f"({reason}); install a supported one: pip install '{_EXTRA}'"
        )


@lru_cache(maxsize=1)
def llama_cpp() -> LlamaCpp:
    """The library, loaded once.

    Raises:
        ConfigError: xllamacpp is not installed, or of a version with another interface.

    Example:
        >>> llama_cpp().version  # doctest: +SKIP
        '2026.10.11549'
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"engine: llama.cpp is not installed; run `pip install '{_EXTRA}'`")
    folder = Path(spec.origin).parent
    files = sorted(file for file in folder.glob(f"{PACKAGE}*") if file.suffix in (".so", ".pyd", ".dylib"))
    if not files:
        raise ConfigError(f"engine: '{folder}' holds no library of llama.cpp; run `pip install '{_EXTRA}'` again")
    from importlib.metadata import version

    return LlamaCpp(files[0], version(PACKAGE))
