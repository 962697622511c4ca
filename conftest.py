"""What tests and the examples in docstrings share: an own cache, warnings as errors, the names of the examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# what imports libraries that are not among the requirements of the tests
collect_ignore = [] if find_spec("lmms_eval") else ["frozenprefix/interop/lmms_eval.py"]
collect_ignore += [] if find_spec("gradio") else ["frozenprefix/demo/page.py"]
pytest_plugins = ["tests.helpers.deprecations", "tests.helpers.doctest"]


@pytest.fixture(scope="session", autouse=True)
def tiny_models_compute_in_fp32() -> Iterator[None]:
    """What is faster for a tiny model changes from run to run; `precision: auto` is fp32 for them."""
    from frozenprefix.kernels.precision import ProductRates, measure_products

    def measured(hidden: int, inner: int) -> ProductRates:
        return ProductRates(1.0, 1.0) if hidden < 256 else measure_products(hidden, inner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frozenprefix.config.precision.measure_products", measured)
        yield


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    """Mappers, encoders and the like that a test or an example registers are gone after it."""
    from frozenprefix.registry import undoing_registrations

    with undoing_registrations():
        yield
