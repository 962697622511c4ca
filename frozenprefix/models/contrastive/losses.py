"""Contrastive losses between images and texts, where an image may have several texts.

`positive: bool[P, T]` marks which texts describe which images. The other positives of a row are neither its target
nor its negatives, so two captions of one image never push each other away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size, is_available, is_initialized
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from frozenprefix.errors import DataError
from frozenprefix.models.contrastive.configuration import Objective

MAX_SCALE = 100.0  # CLIP, section 2.5: keeps the temperature from running away
_START = {"infonce": (math.log(1 / 0.07), None), "sigmoid": (math.log(10.0), -10.0)}


class LogitScale(nn.Module):
    """Learnable scale (stored as its logarithm) and, for the sigmoid loss, bias of the cosine similarities.

    They start as in CLIP (scale 1 / 0.07, no bias) and SigLIP (scale 10, bias -10).

    Example:
        >>> round(LogitScale("sigmoid").scale.item(), 3)
        10.0
    """

    def __init__(self, objective: Objective):
        super().__init__()
        scale, bias = _START[objective]
        self.log_scale = nn.Parameter(torch.tensor(scale))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Unit vectors float[P, D], float[T, D] -> logits: float[P, T]."""
        logits = self.scale * image_embeds @ text_embeds.t()
        return logits if self.bias is None else logits + self.bias


def infonce_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Symmetric InfoNCE (CLIP, Radford et al. 2021, figure 3) with several positives.

    Each pair is a softmax over itself and the negatives of its row. Pairs are averaged within a row, then over rows,
    and both directions weigh the same. With one text per image this is CLIP's loss.

    Args:
        logits: float[P, T]; positive: bool[P, T], at least one True in every row and column.

    Raises:
        DataError: when a row or a column has no positive, or no negative.

    Example:
        >>> round(float(infonce_loss(torch.zeros(2, 2), torch.eye(2).bool())), 4)  # log 2: nothing is told apart
        0.6931
    """
    check_pairs(positive)
    return (_rows_loss(logits, positive) + _rows_loss(logits.t(), positive.t())) / 2


def _rows_loss(logits: Tensor, positive: Tensor) -> Tensor:
    negatives = logits.masked_fill(positive, -torch.inf).logsumexp(dim=1, keepdim=True)
    # -log(e^s / (e^s + sum of negatives)) = log(1 + e^(negatives - s))
    losses = F.softplus(negatives - logits) * positive
    return (losses.sum(dim=1) / positive.sum(dim=1)).mean()


def sigmoid_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Sigmoid loss (SigLIP, Zhai et al. 2023, section 3.2): every pair by itself, summed, divided by the texts.

    Args:
        logits: float[P, T]; positive: bool[P, T].

    Example:
        >>> round(float(sigmoid_loss(torch.zeros(2, 2), torch.eye(2).bool())), 4)  # 2 log 2
        1.3863
    """
    signs = positive.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / logits.shape[1]


LOSSES = {"infonce": infonce_loss, "sigmoid": sigmoid_loss}


def contrastive_loss(
    objective: Objective,
    logit_scale: LogitScale,
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
) -> Tensor:
    """Loss over the embeddings of all processes, the same on each.

    Gradients pass through the gathering. Averaged over processes, as DDP does, they equal those of one process that
    holds the whole batch.

    Args:
        image_embeds: unit float[P, D]; text_embeds: unit float[T, D]; of this process.
        image_ids: int64[P], one id per image; text_ids: int64[T], the id of the image that a text describes.

    Returns:
        float32 scalar.
    """
    images, texts = gather_rows(image_embeds.float()), gather_rows(text_embeds.float())
    positive = gather_rows(image_ids)[:, None] == gather_rows(text_ids)[None, :]
    return LOSSES[objective](logit_scale(images, texts), positive)


def check_pairs(positive: Tensor) -> None:
    """Refuse images without a text, texts without an image, and batches without negatives."""
    for name, counts, others in (
        ("image", positive.sum(1), positive.shape[1]),
        ("text", positive.sum(0), len(positive)),
    ):
        if bool((counts == 0).any()):
            raise DataError(f"contrastive loss: one {name} of the batch has no partner; compare image_ids and text_ids")
        if bool((counts == others).any()):
            raise DataError(
                f"contrastive loss: a {name} of the batch has no negative; give at least two different images a step"
            )


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in order of rank, with gradient; processes may hold different numbers of rows."""
    if not (is_available() and is_initialized()) or get_world_size() == 1:
        return rows
    counts = [int(n) for n in _gather_equal(torch.tensor([len(rows)], device=rows.device))]
    # gathering needs equal shapes; the padding is cut off afterwards
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = list(all_gather(padded)) if padded.requires_grad else _gather_equal(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _gather_equal(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return parts
