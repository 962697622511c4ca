"""Prefix embeddings as files, for every engine that takes embeddings in place of token ids."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frozenprefix.errors import DataError
from frozenprefix.export.source import Source
from frozenprefix.utils import atomic_folder, write_jsonl, write_text_atomic
from frozenprefix.utils.tensors import save_tensors


@torch.no_grad()
def export_embeds(
    source: Source,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 30,
) -> Path:
    """Write what the language model reads of images, for engines that take embeddings.

    The folder holds

    - `embeds.safetensors`: `prefix_embeds`, float32[images, P, D_lm], and `prompt_embeds`, float32[images, T, D_lm],
      which are the prefix with the words of the prompt around it;
    - `images.jsonl`: the image of each row;
    - `prompt_embeds/NUMBER.pt`: a row of `prompt_embeds` by `torch.save`, for vLLM's `{"prompt_embeds": tensor}`;
    - `requests.jsonl`: bodies for vLLM's `/v1/completions` (`vllm serve … --enable-prompt-embeds`);
    - `embeds.json`: prompt, end tokens, and the identity of encoder and language model.

    Args:
        images: files.
        prompt: text before the caption; by default that of the training.
        max_new_tokens: in the request bodies.

    Raises:
        DataError: without images.
        BadImageError: for an image that cannot be read.

    Example:
        >>> folder = export_embeds(Source(checkpoint, model, processor), [image_path], tmp_path / "embeds")
        >>> sorted(path.name for path in folder.iterdir())
        ['embeds.json', 'embeds.safetensors', 'images.jsonl', 'prompt_embeds', 'requests.jsonl']
    """
    if not images:
        raise DataError("IMAGE: got none, expected image files or folders")
    text = source.prompt() if prompt is None else source.processor.with_image(prompt)
    prefixes, prompts = [], []
    for _, features in source.captioner.encoder.batches(map(Path, images), 8, None):
        for one in features.split(1):
            prefixes.append(source.model.map_features(one)[0])
            prompts.append(source.prompt_embeds(text, one))
    with atomic_folder(out) as folder:
        tensors = {"prefix_embeds": torch.stack(prefixes), "prompt_embeds": torch.stack(prompts)}
        save_tensors(tensors, folder / "embeds.safetensors")
        write_jsonl(folder / "images.jsonl", [{"row": row, "image": str(path)} for row, path in enumerate(images)])
        (folder / "prompt_embeds").mkdir()
        for row, embeds in enumerate(prompts):
            torch.save(embeds.clone(), folder / "prompt_embeds" / f"{row}.pt")
        model = str(getattr(source.model.config.language_model, "path", ""))
        write_jsonl(folder / "requests.jsonl", _requests(prompts, model, max_new_tokens, source.end_tokens))
        about = {"prompt": text, "end_tokens": source.end_tokens, "identity": source.model.config.identity}
        write_text_atomic(folder / "embeds.json", json.dumps(about, indent=2) + "\n")
    return Path(out)


def _requests(prompts: Iterable[Tensor], model: str, max_new_tokens: int, ends: list[int]) -> list[dict[str, Any]]:
    return [request_body(embeds, model, max_new_tokens=max_new_tokens, stop_token_ids=ends) for embeds in prompts]


def request_body(prompt_embeds: Tensor, model: str, **options: Any) -> dict[str, Any]:
    """The body of a greedy completion by vLLM's server: the tensor as base64 of what `torch.save` writes.

    Args:
        prompt_embeds: float[T, D_lm].
        model: its name on the server.
        options: `max_new_tokens`, and further fields of the body.

    Example:
        >>> body = request_body(torch.zeros(3, 4), "smollm", max_new_tokens=5)
        >>> sorted(body), body["max_tokens"]
        (['max_tokens', 'model', 'prompt_embeds', 'temperature'], 5)
    """
    buffer = io.BytesIO()
    torch.save(prompt_embeds.detach().cpu().clone(), buffer)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    length = options.pop("max_new_tokens", 30)
    return {"model": model, "prompt_embeds": encoded, "max_tokens": length, "temperature": 0, **options}
