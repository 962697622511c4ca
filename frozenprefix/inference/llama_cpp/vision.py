"""An exported vision encoder and mapper (mmproj) in llama.cpp: images -> prefix embeddings, computed there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL.Image import Image

from frozenprefix.errors import AssetError
from frozenprefix.inference.llama_cpp.language_model import Floats, LlamaCppModel, Segment
from frozenprefix.inference.llama_cpp.library import InputText, VisionParams
from frozenprefix.models.language_model.gguf_header import read_gguf_header

MARKER = "<__media__>"
_IMAGE = 1  # MTMD_INPUT_CHUNK_TYPE_IMAGE


class LlamaCppVision:
    """llama.cpp's multimodal library (mtmd) with one mmproj file.

    Args:
        path: the mmproj GGUF file.
        model: the language model that reads its embeddings.

    Raises:
        AssetError: a file that is damaged, of another kind, or for another language model.

    Example:
        >>> LlamaCppVision("missing.gguf", None)
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: GGUF file 'missing.gguf' does not exist
    """

    def __init__(self, path: str | Path, model: LlamaCppModel):
        self._context = None
        self.path = Path(path)
        header = read_gguf_header(self.path)
        if header.architecture != "clip":
            raise AssetError(
                f"GGUF file '{path}' holds a model of architecture '{header.architecture}', expected the vision part "
                "of a model (mmproj)"
            )
        self.model, self.library = model, model.library
        params = self.library.defaults(VisionParams)
        params.use_gpu = params.print_timings = params.warmup = False
        params.flash_attn_type = 0
        params.n_threads = model.threads
        self.library.errors.clear()
        self._context = self.library.call.mtmd_init_from_file(str(path).encode(), model.model_pointer, params)
        if not self._context:
            raise AssetError(f"GGUF file '{path}': llama.cpp could not load it ({self.library.reason()})")

    def __del__(self) -> None:
        if self._context:
            self.library.call.mtmd_free(self._context)

    def read(self, prompt: str, images: list[Image]) -> list[Segment]:
        """A prompt as llama.cpp makes it of a text and its images: token ids, and prefix embeddings float32[N, D_lm].

        Args:
            prompt: with a `MARKER` for each image.
            images: RGB; llama.cpp resizes those that have another size than the encoder's.

        Raises:
            AssetError: llama.cpp fails, as its log says.
        """
        segments: list[Segment] = []
        call = self.library.call
        with self._chunks(prompt, images) as chunks:
            for number in range(call.mtmd_input_chunks_size(chunks)):
                chunk = call.mtmd_input_chunks_get(chunks, number)
                count = call.mtmd_input_chunk_get_n_tokens(chunk)
                if call.mtmd_input_chunk_get_type(chunk) != _IMAGE:
                    length = ctypes.c_size_t()
                    ids = call.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
                    segments.append(list(ids[: length.value]))
                    continue
                self._succeed(call.mtmd_encode_chunk(self._context, chunk))
                pointer = call.mtmd_get_output_embd(self._context)
                segments.append(np.ctypeslib.as_array(pointer, (count, self.model.dim)).copy())
        return segments

    def embed(self, image: Image) -> Floats:
        """Prefix embeddings of one image, float32[N, D_lm]."""
        found = [segment for segment in self.read(MARKER, [image]) if isinstance(segment, np.ndarray)]
        return np.concatenate(found)

    @contextmanager
    def _chunks(self, prompt: str, images: list[Image]) -> Iterator[int]:
        call = self.library.call
        self.library.errors.clear()
        bitmaps = []
        chunks = call.mtmd_input_chunks_init()
        try:
            for image in images:
                pixels = image.convert("RGB")
                bitmaps.append(call.mtmd_bitmap_init(pixels.width, pixels.height, pixels.tobytes()))
            data = prompt.encode()
            text = InputText(data, len(data), True, True)
            pointers = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
            self._succeed(call.mtmd_tokenize(self._context, chunks, ctypes.byref(text), pointers, len(bitmaps)))
            yield chunks
        finally:
            for bitmap in bitmaps:
                call.mtmd_bitmap_free(bitmap)
            call.mtmd_input_chunks_free(chunks)

    def _succeed(self, result: int) -> None:
        if result:
            raise AssetError(f"GGUF file '{self.path}': llama.cpp failed with {result} ({self.library.reason()})")
