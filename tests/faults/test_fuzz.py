"""Damaged files: whatever is in them, only the package's own errors come out. Seeded.

`python benchmarks/survival.py` reads 100,000 of them.
"""

from __future__ import annotations

import pytest

from benchmarks.fuzzing import fuzz


@pytest.mark.filterwarnings("ignore")  # Pillow and NumPy warn of some of these files
@pytest.mark.parametrize("inputs", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_every_reader_has_one_boundary(tmp_path, inputs):
    done, foreign = fuzz(tmp_path / "fuzz", inputs, seed=inputs)
    assert sum(done.values()) >= inputs
    assert not foreign, "the log has a traceback of each"
