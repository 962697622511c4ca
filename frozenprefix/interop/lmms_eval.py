"""Checkpoints as a model of lmms-eval, found by the entry point `lmms_eval.models`:

    lmms-eval --model frozenprefix --model_args pretrained=runs/mine/best,prompt=caption --tasks …

The library is not a requirement of this package: lmms-eval is what imports this module.
"""

from __future__ import annotations

from typing import Any

import torch

from frozenprefix.errors import ConfigError
from frozenprefix.interop.requests import Answerer, Request

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.protocol import ChatMessages
except ImportError as error:
    raise ConfigError(f"frozenprefix.interop.lmms_eval needs lmms-eval 0.6 or newer ({error})") from error

MANIFEST = ModelManifest(
    model_id="frozenprefix", chat_class_path="frozenprefix.interop.lmms_eval.FrozenPrefixForLmmsEval"
)


class FrozenPrefixForLmmsEval(lmms):
    """Answers lmms-eval's requests by a checkpoint.

    Args:
        pretrained: a checkpoint folder or Hub id.
        prompt: as of `Answerer`: "vqa", "caption" or "chat".
        device: "cpu", "cuda", …; a GPU when there is one.
        batch_size: requests at once; 8 for lmms-eval's "auto".
        precision, language_model: as of `Captioner.from_pretrained`.
        max_batch_size: not used; lmms-eval passes it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        prompt: str = "vqa",
        device: str | None = None,
        batch_size: int | str = 8,
        precision: str = "auto",
        language_model: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.batch_size_per_gpu = int(batch_size) if str(batch_size).isdecimal() else 8
        self.answerer = Answerer.from_pretrained(
            pretrained,
            prompt=prompt,
            device=device,
            batch_size=self.batch_size_per_gpu,
            precision=precision,
            language_model=language_model,
        )

    @property
    def device(self) -> torch.device:
        return self.answerer.captioner.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Continue chats; a request's `args` are (text, doc_to_messages, options, doc_id, task, split)."""
        texts = self.answerer([self._request(request.args) for request in requests])
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)
        return texts

    def _request(self, args: tuple[Any, ...]) -> Request:
        _, doc_to_messages, options, doc_id, task, split = args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        return Request(messages.to_hf_messages(), options)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise ConfigError("lmms-eval: loglikelihood: it asks chat models for generated text only; choose another task")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise ConfigError("lmms-eval: tasks of several rounds are not answered; choose a task of one round")
