"""What tests and the examples in docstrings share: an own cache, warnings as errors, the names of the examples."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.helpers.deprecations", "tests.helpers.doctest"]
