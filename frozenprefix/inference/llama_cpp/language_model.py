"""A language model in llama.cpp that reads embeddings: greedy search for several prompts at once."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from ctypes import POINTER, c_float, c_int8, c_int32
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.inference.llama_cpp.library import F32, Batch, ContextParams, ModelParams, llama_cpp
from frozenprefix.models.language_model.gguf_header import read_gguf_header

Floats = NDArray[np.float32]
Segment = list[int] | Floats
"""Token ids, or embeddings float32[T, D_lm]: a prompt is a list of segments."""


@dataclass
class Continuation:
    """A generated text: its token ids, the end token included, and their mean log-probability."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        return float(np.mean(self.log_probs)) if self.log_probs else 0.0


class LlamaCppModel:
    """A GGUF file in llama.cpp, on the CPU. Keys and values are float32, so that only the weights are rounded.

    Args:
        path: a GGUF file of a language model.
        prompts: how many texts are generated at once.
        positions: longest text, prompt included, in tokens.
        threads: as many as torch uses by default; llama.cpp's own default is 4 on any machine.

    Attributes:
        dim: width of its embeddings, D_lm.
        vocab_size: number of words.
        threads: that llama.cpp computes with.

    Raises:
        AssetError: a file that is damaged, or that llama.cpp does not read.
        ConfigError: llama.cpp is missing, or of an unsupported version.

    Example:
        >>> LlamaCppModel("missing.gguf")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: GGUF file 'missing.gguf' does not exist
    """

    def __init__(self, path: str | Path, *, prompts: int = 8, positions: int = 512, threads: int | None = None):
        self.path = Path(path)
        self.header = read_gguf_header(self.path)
        self.library = llama_cpp()
        call = self.library.call
        self._model = self._context = None
        self.library.errors.clear()
        params = self.library.defaults(ModelParams)
        params.n_gpu_layers = 0
        self._model = call.llama_model_load_from_file(str(self.path).encode(), params)
        if not self._model:
            raise AssetError(f"GGUF file '{self.path}': llama.cpp could not load it ({self.library.reason()})")
        self.dim = call.llama_model_n_embd(self._model)
        self.vocab = call.llama_model_get_vocab(self._model)
        self.vocab_size = call.llama_vocab_n_tokens(self.vocab)
        self.prompts, self.positions = prompts, positions
        params = self.library.defaults(ContextParams)
        params.n_ctx, params.n_seq_max = prompts * positions, prompts
        params.n_batch = params.n_ubatch = max(positions, prompts)
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        self._context = call.llama_init_from_model(self._model, params)
        if not self._context:
            raise AssetError(f"GGUF file '{self.path}': llama.cpp could not start it ({self.library.reason()})")
        self.threads = threads or torch.get_num_threads()
        call.llama_set_n_threads(self._context, self.threads, self.threads)

    def close(self) -> None:
        """Free llama.cpp's memory."""
        if self._context:
            self.library.call.llama_free(self._context)
        if self._model:
            self.library.call.llama_model_free(self._model)
        self._context = self._model = None

    def __del__(self) -> None:
        if hasattr(self, "_context"):
            self.close()

    @property
    def model_pointer(self) -> int:
        """llama.cpp's model, for its vision part."""
        return self._model  # type: ignore[return-value]

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int] | None:
        """Token ids by llama.cpp's own tokenizer; None if the file has none."""
        if not self.library.call.llama_vocab_type(self.vocab):
            return None
        data = text.encode()
        room = len(data) + 8
        ids = (c_int32 * room)()
        count = self.library.call.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, True)
        return list(ids[: max(0, count)])

    def generate(
        self, prompts: Sequence[Sequence[Segment]], *, max_new_tokens: int, end_tokens: Collection[int]
    ) -> list[Continuation]:
        """Continue up to `prompts` texts by greedy search, all at once.

        Args:
            prompts: segments of token ids and of embeddings float32[T, D_lm].
            end_tokens: a text ends with the first of them.

        Raises:
            ConfigError: for too many or too long prompts, and embeddings of another width.
        """
        self._check(prompts, max_new_tokens)
        call, memory = self.library.call, self.library.call.llama_get_memory(self._context)
        call.llama_memory_clear(memory, True)
        texts = [Continuation() for _ in prompts]
        lengths = []
        for sequence, segments in enumerate(prompts):
            lengths.append(self._read(sequence, segments))
            self._choose(texts[sequence], -1)
        for _ in range(max_new_tokens - 1):
            open_ = [number for number, text in enumerate(texts) if text.ids[-1] not in end_tokens]
            if not open_:
                break
            tokens = np.array([texts[number].ids[-1] for number in open_], np.int32)
            places = [lengths[number] + len(texts[number].ids) - 1 for number in open_]
            self._decode(tokens, places, open_, [True] * len(open_))
            for row, number in enumerate(open_):
                self._choose(texts[number], row)
        return texts

    def _check(self, prompts: Sequence[Sequence[Segment]], max_new_tokens: int) -> None:
        if len(prompts) > self.prompts:
            raise ConfigError(f"prompts: got {len(prompts)}, expected at most {self.prompts}")
        for segments in prompts:
            length = sum(map(len, segments)) + max_new_tokens
            if length > self.positions:
                raise ConfigError(
                    f"max_new_tokens: prompt and text take {length} tokens, expected at most {self.positions}; lower it"
                )
            for segment in segments:
                if isinstance(segment, np.ndarray) and segment.shape[1:] != (self.dim,):
                    raise ConfigError(
                        f"embeddings have width {segment.shape[-1]}, but those of '{self.path.name}' have {self.dim}"
                    )

    def _read(self, sequence: int, segments: Sequence[Segment]) -> int:
        """Read a prompt, with logits for its last token; return its length."""
        place = 0
        segments = [segment for segment in segments if len(segment)]
        for number, segment in enumerate(segments):
            values = segment if isinstance(segment, np.ndarray) else np.array(segment, np.int32)
            length = len(values)
            last = number == len(segments) - 1
            wanted = [last and row == length - 1 for row in range(length)]
            self._decode(values, list(range(place, place + length)), [sequence] * length, wanted)
            place += length
        return place

    def _decode(self, values: NDArray, places: list[int], sequences: list[int], wanted: list[bool]) -> None:
        count = len(values)
        is_tokens = values.dtype == np.int32
        values = np.ascontiguousarray(values, np.int32 if is_tokens else np.float32)
        ids = [(c_int32 * 1)(sequence) for sequence in sequences]
        batch = Batch(
            n_tokens=count,
            token=values.ctypes.data_as(POINTER(c_int32)) if is_tokens else None,
            embd=None if is_tokens else values.ctypes.data_as(POINTER(c_float)),
            pos=(c_int32 * count)(*places),
            n_seq_id=(c_int32 * count)(*[1] * count),
            seq_id=(POINTER(c_int32) * count)(*[ctypes.cast(one, POINTER(c_int32)) for one in ids]),
            logits=(c_int8 * count)(*wanted),
        )
        result = self.library.call.llama_decode(self._context, batch)
        if result:
            raise AssetError(f"GGUF file '{self.path}': llama.cpp failed with {result} ({self.library.reason()})")

    def logits(self, row: int) -> Floats:
        """Logits float32[V] of the latest batch's row, -1 for its last."""
        pointer = self.library.call.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def _choose(self, text: Continuation, row: int) -> None:
        logits = self.logits(row)
        best = int(logits.argmax())
        text.ids.append(best)
        text.log_probs.append(-float(np.log(np.exp((logits - logits[best]).astype(np.float64)).sum())))
