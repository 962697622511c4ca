"""Processors of the locked-image text model: from images and texts to model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

import frozenprefix.models.vision.image_processing  # noqa: F401 - registers the image processor that checkpoints name
from frozenprefix.errors import ConfigError
from frozenprefix.models.contrastive.configuration import LockedImageTextConfig
from frozenprefix.utils import replace_surrogates
from frozenprefix.utils.images import to_images


class _ImageTextProcessor(ProcessorMixin):
    if TYPE_CHECKING:  # each kind has its own

        def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]: ...

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a checkpoint's processor, as transformers does; code that the checkpoint names is never run."""
        options["trust_remote_code"] = False
        return super().from_pretrained(pretrained_model_name_or_path, *args, **options)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, texts or both: `pixel_values` float[P, 3, H, W], `input_ids`, `attention_mask`."""
        data: dict[str, Any] = {}
        if text is not None:
            data |= self.prepare_texts([text] if isinstance(text, str) else text)
        if images is not None:
            data |= self.image_processor(to_images(images), return_tensors=return_tensors)
        return BatchFeature(data)


class LockedImageTextProcessor(_ImageTextProcessor):
    """Image processor, and the tokenizer of a transformers text tower, which cuts texts at its `model_max_length`.

    Example:
        >>> own = LockedImageTextProcessor(processor.image_processor, processor.tokenizer)
        >>> own(images=[image]).keys()
        KeysView({'pixel_values': ...
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        if tokenizer is None:
            raise ConfigError("LockedImageTextProcessor: got no tokenizer; give the text tower's")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts -> `input_ids` and `attention_mask`, int64[T, L]; a longer text is cut before its end token."""
        plain = [replace_surrogates(text) for text in texts]
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        batch = self.tokenizer(plain, split_special_tokens=True, **options)  # `[SEP]` in a caption is text
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Numbers of tokens of texts that are not cut."""
        plain = [replace_surrogates(text) for text in texts]
        return [len(ids) for ids in self.tokenizer(plain, split_special_tokens=True, verbose=False)["input_ids"]]


class OpenClipProcessor(_ImageTextProcessor):
    """Image processor, and the tokenizer that open_clip has for one of its models.

    Args:
        open_clip_name: the model's name, as `open_clip.get_tokenizer` takes it.

    Example:
        >>> own = OpenClipProcessor(processor.image_processor, "ViT-B-32")
        >>> own(text="a dog")["input_ids"].shape
        torch.Size([1, 77])
    """

    def __init__(
        self, image_processor: Any = None, open_clip_name: str = "", chat_template: str | None = None, **kwargs: Any
    ):
        self.open_clip_name = open_clip_name
        self._tokenize: Any = None
        super().__init__(image_processor, chat_template=chat_template)

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As `LockedImageTextProcessor.prepare_texts`."""
        if self._tokenize is None:
            import open_clip

            self._tokenize = open_clip.get_tokenizer(self.open_clip_name)
        plain = [replace_surrogates(text) for text in texts]
        for token in ("<start_of_text>", "<end_of_text>"):
            plain = [text.replace(token, f"< {token[1:]}") for text in plain]  # in a caption they are text
        ids = self._tokenize(plain)  # padded to the tower's full length, which its causal mask has
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict(*args, **kwargs).items() if name != "_tokenize"}


def load_processor(
    checkpoint: str, config: LockedImageTextConfig, **hub: Any
) -> LockedImageTextProcessor | OpenClipProcessor:
    """The processor that a checkpoint of `config` was saved with.

    Example:
        >>> own = LockedImageTextProcessor(processor.image_processor, processor.tokenizer)
        >>> _ = own.save_pretrained(tmp_path)
        >>> type(load_processor(str(tmp_path), LockedImageTextConfig())).__name__
        'LockedImageTextProcessor'
    """
    from_open_clip = config.text_tower is not None and config.text_tower.source == "open_clip"
    return (OpenClipProcessor if from_open_clip else LockedImageTextProcessor).from_pretrained(checkpoint, **hub)
