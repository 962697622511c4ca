"""Occlusion: how much less likely a word becomes when a part of the image is covered (Zeiler and Fergus 2014)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Side of the covered square, as a share of the image's; smaller ones hardly change an encoder's output.
WINDOW = 0.25


def occluded(pixel_values: Tensor, grid: int) -> Tensor:
    """Copies of an image, each with a square covered in the mean colour of the image.

    The squares are centred on the cells of a grid, in raster order. They overlap where a cell is smaller than `WINDOW`.

    Args:
        pixel_values: float[1, 3, H, W].

    Returns:
        float[grid², 3, H, W].

    Example:
        >>> image = torch.tensor([0.0, 4.0]).repeat(1, 3, 2, 1)
        >>> occluded(image, grid=2)[0, 0].tolist()
        [[2.0, 4.0], [0.0, 4.0]]
    """
    height, width = pixel_values.shape[-2:]
    copies = pixel_values.repeat(grid * grid, 1, 1, 1)
    mean = pixel_values.mean(dim=(2, 3))[0, :, None, None]
    for number in range(grid * grid):
        top, bottom = _side(number // grid, grid, height)
        left, right = _side(number % grid, grid, width)
        copies[number, :, top:bottom, left:right] = mean
    return copies


def _side(cell: int, grid: int, length: int) -> tuple[int, int]:
    """First and last pixel of the square on a cell."""
    half = max(length / grid, length * WINDOW) / 2
    centre = (cell + 0.5) * length / grid
    return max(0, round(centre - half)), min(length, round(centre + half))


def rank_correlation(one: Tensor, two: Tensor) -> float:
    """Spearman's rank correlation of two maps of the same shape, -1 to 1; ties share their mean rank, 0 for a flat map.

    As `scipy.stats.spearmanr`.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 15.0]))
        0.5
    """
    ranks = [_ranks(values.flatten().double()) for values in (one, two)]
    first, second = (rank - rank.mean() for rank in ranks)
    size = float(first.norm() * second.norm())
    return round(float(first @ second) / size, 6) if size else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2)[group]


def cells(values: Tensor, grid: int) -> Tensor:
    """A map float[W, s, s] averaged to float[W, grid, grid], where it is finer.

    Example:
        >>> cells(torch.ones(1, 14, 14), 7).shape, cells(torch.ones(1, 4, 4), 4).shape
        (torch.Size([1, 7, 7]), torch.Size([1, 4, 4]))
    """
    return torch.nn.functional.adaptive_avg_pool2d(values[:, None], grid)[:, 0]
