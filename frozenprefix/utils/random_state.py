"""Random states of a process: PyTorch on CPU and GPU, Python, NumPy."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """State of all random number generators of this process, as tensors that safetensors can store.

    Example:
        >>> state = random_state()
        >>> first = torch.rand(2)
        >>> set_random_state(state)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    version, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    # 32-bit words fit into float64 exactly
    state = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor([version, *words, math.inf if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys, *rest], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned. A GPU's state is ignored on a machine without one."""
    torch.set_rng_state(state["cpu"])
    version, *words, gauss = state["python"].tolist()
    random.setstate((int(version), tuple(map(int, words)), None if math.isinf(gauss) else gauss))
    *keys, position, has_gauss, cached = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(*labels: object) -> None:
    """Seed PyTorch on all devices with a number that depends on the labels only.

    Example:
        >>> seed_all(0, "step", 7)
        >>> first = torch.rand(2)
        >>> seed_all(0, "step", 7)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(labels).encode()).digest()[:8], "big", signed=True))
