"""Fixtures of the training tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def plain_descent(monkeypatch):
    """Weights move by the gradient itself: Adam divides it by its size, and with it what rounding leaves of a zero."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
