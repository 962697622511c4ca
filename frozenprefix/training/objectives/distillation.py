"""Distillation: keeps an adapted language model near the bare one on text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from frozenprefix.config.objectives import Weight
from frozenprefix.data.samplers import ImageStream
from frozenprefix.errors import DataError
from frozenprefix.evaluation.text_ability import read_text, text_windows
from frozenprefix.models.language_model import FrozenLM
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.objectives.base import Batch, Objective

CHUNK = 256  # rows of logits at a time
PIECE = 64  # tokens of a piece of the text file


class Distillation(Objective):
    """KL(bare || adapted) between next-token distributions, averaged over the tokens of texts without images.

    The bare LM is the same model with its adapters disabled.

    Args:
        pieces: token ids of a text file, in pieces; None takes the targets of the batch.
        images: images per micro-batch; as many pieces are taken.

    Example:
        >>> Distillation(model, weight=0.5, pieces=[[5, 6, 7]], images=2).weight
        0.5
    """

    name = "distillation"

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        *,
        weight: Weight = 1.0,
        pieces: list[list[int]] | None = None,
        images: int = 1,
        seed: int = 0,
    ):
        super().__init__(weight)
        self.model, self.pieces = model, pieces
        self.stream = None if pieces is None else ImageStream(len(pieces), images, seed)

    def prepare(self, batch: Batch, number: int) -> None:
        if self.pieces is None or self.stream is None:
            batch["plain_text"] = batch["texts"]
            return
        texts = [torch.tensor(self.pieces[piece]) for _, piece in self.stream.step(number)]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(piece) for piece in texts], batch_first=True)
        batch["plain_text"] = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def count(self, batch: Batch) -> int:
        return int(batch["plain_text"]["attention_mask"][:, 1:].sum())

    def loss(self, batch: Batch, prefix_embeds: Tensor | None) -> Tensor:
        lm = self.model.lm
        # hidden states that predict a token: [B, T, D_lm] -> [K, D_lm]
        predicts = batch["plain_text"]["attention_mask"][:, 1:].bool()
        with torch.no_grad(), self.model.bare_language_model():
            bare = lm.text_states(**batch["plain_text"])[:, :-1][predicts]
        adapted = lm.text_states(**batch["plain_text"])[:, :-1][predicts]
        chunks = zip(bare.split(CHUNK), adapted.split(CHUNK), strict=True)
        # one chunk of logits exists at a time; the backward pass computes it again
        parts = [checkpoint(_divergence, lm, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(parts).sum() / len(bare)


def _divergence(lm: FrozenLM, bare: Tensor, adapted: Tensor) -> Tensor:
    """Sum over rows of KL(bare || adapted), from hidden states float[K, D_lm]."""
    target, predicted = (lm.logits(hidden, torch.float32).log_softmax(dim=-1) for hidden in (bare, adapted))
    return F.kl_div(predicted, target, reduction="sum", log_target=True)


def distillation_pieces(processor: FrozenPrefixProcessor, texts: str) -> list[list[int]] | None:
    """Token ids of a text file in pieces, or None for 'targets'.

    Example:
        >>> file = tmp_path / "text.txt"
        >>> _ = file.write_text("the dog runs in the grass")
        >>> len(distillation_pieces(processor, str(file)))
        1
    """
    if texts == "targets":
        return None
    key = "objectives.distillation.texts"
    try:
        return text_windows(processor.tokenizer, read_text(texts, key), PIECE)
    except DataError as error:
        raise DataError(f"{key}: '{texts}': {error}") from error
