"""The processes that `torchrun` or `accelerate launch` started together."""

from __future__ import annotations

import torch
from accelerate import PartialState


def current_processes() -> PartialState:
    """State of all processes: rank, number, barrier. A process that was started without them is the only one.

    Example:
        >>> current_processes().num_processes
        1
    """
    # without `cpu`, processes without a GPU do not form a group
    return PartialState(cpu=not torch.accelerator.is_available())
