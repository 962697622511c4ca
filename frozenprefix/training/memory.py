"""What to lower when memory runs out in a step, and by how much."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from frozenprefix.errors import TrainingError
from frozenprefix.utils import is_out_of_memory


@contextmanager
def explaining_memory(settings: Any, step: int) -> Iterator[None]:
    """Name the keys to change when memory runs out inside the block.

    Args:
        settings: the recipe's section `training`; step: the one that is taken.

    Raises:
        TrainingError: in place of torch's error.

    Example:
        >>> with explaining_memory(recipe.training, step=3):
        ...     raise MemoryError
        Traceback (most recent call last):
        frozenprefix.errors.TrainingError: step 3: memory ran out; raise training.gradient_accumulation_steps ...
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"step {step}: memory ran out; {'; or '.join(smaller_steps(settings))}; `frozenprefix plan` says how "
            "much a recipe needs. Checkpoints saved before are not affected."
        ) from error


def peak_memory(device: torch.device) -> float | None:
    """The most memory that this process has used so far, in GB: of the GPU, or of the machine. None if nobody knows.

    Example:
        >>> peak_memory(torch.device("cpu")) > 0.01
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # which Windows does not have
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def smaller_steps(settings: Any) -> list[str]:
    """Changes of the section `training` that save memory, the ones without effect on the result first.

    Example:
        >>> smaller_steps(recipe.training)[1]
        'lower training.targets_per_image from 2 to 1'
    """
    images, changes = settings.images_per_step, []
    if hasattr(settings, "texts_per_chunk"):  # contrastive
        if not settings.gradient_cache:
            changes.append("set training.gradient_cache=true, which keeps one chunk of texts at a time")
        elif settings.texts_per_chunk > 1:
            changes.append(_halved("texts_per_chunk", settings.texts_per_chunk))
    else:
        parts = settings.gradient_accumulation_steps
        more = next((number for number in range(2 * parts, images + 1) if images % number == 0), None)
        if more is not None:
            changes.append(
                f"raise training.gradient_accumulation_steps from {parts} to {more}, for {images // more} in place of "
                f"{images // parts} images at a time, with the same result"
            )
    if (settings.targets_per_image or 2) > 1:
        targets = settings.targets_per_image
        changes.append(
            "set training.targets_per_image to a number, such as 5"
            if targets is None
            else _halved("targets_per_image", targets)
        )
    if images > 2 or not changes:
        changes.append(_halved("images_per_step", images))
    return changes


def _halved(key: str, value: int) -> str:
    return f"lower training.{key} from {value} to {max(1, value // 2)}"
