"""Pytest plugin: deprecations that transformers only logs are errors."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest


class DeprecatedCalls(logging.Handler):
    """Raises when transformers logs that a call from this package uses a deprecated name."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        frame = sys._getframe()
        while frame is not None and "deprecated" in message:
            library = Path(frame.f_code.co_filename)
            if "peft" in library.parts:
                return  # peft's own calls are not ours to change
            if "frozenprefix" in library.parts[-5:-1]:
                raise FutureWarning(message)
            frame = frame.f_back


@pytest.fixture(autouse=True, scope="session")
def deprecated_calls():
    """Deprecations that transformers logs fail the test that causes them."""
    handler = DeprecatedCalls()
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
