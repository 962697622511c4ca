"""The ways through the package that ARCHITECTURE.md lists are those that the code takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import frozenprefix
from tests.helpers import ROOT

PACKAGE = Path(frozenprefix.__file__).parent
LIMITS = {"From a sample to the loss": 16, "`frozenprefix caption`": 14, "`model.mapper.hidden_dim` of a recipe": 7}
# base classes and building blocks, fast paths, look-ups of settings, and checks: ARCHITECTURE.md leaves them out
ASIDE = re.compile(
    r"(.*/)?base\.py|.*/base_trainer\.py|.*/blocks\.py|kernels/.*|.*/configuration\.py|config/.*|utils/.*|errors\.py"
    r"|registry\.py|.*/adapter_set\.py|.*/schedule\.py|.*/guards\.py|.*/cache_format\.py|.*/image_processing\.py"
    r"|.*/precomputed\.py|.*/images\.py"
)


def listed(heading: str) -> list[str]:
    """The files of one way, in order."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split(f"### {heading}\n")[1].split("\n#")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", section, flags=re.MULTILINE)


def files_run(function: Callable[[], Any]) -> set[str]:
    """The files of the package in which a function is called."""
    files: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name != "<module>" and path.is_relative_to(PACKAGE):
            files.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("heading", LIMITS)
def test_a_way_is_short_and_its_files_exist(heading):
    files = listed(heading)
    assert 0 < len(files) <= LIMITS[heading]
    assert [name for name in files if not (PACKAGE / name).is_file()] == []


def test_a_sample_comes_to_the_loss_by_the_listed_files(tiny_recipe, tmp_path):
    from frozenprefix.training import Trainer

    trainer = Trainer(tiny_recipe(tmp_path))
    trainer.setup()
    batches = trainer.batches()
    files = files_run(lambda: trainer.step(batches))
    way = set(listed("From a sample to the loss"))
    assert way - files == set()
    assert {name for name in files - way if not ASIDE.fullmatch(name)} == set()


def test_a_caption_is_written_by_the_listed_files(tiny_checkpoint, shapes):
    from frozenprefix.cli.main import app

    image = shapes / "images" / "red_circle.png"
    files = files_run(lambda: CliRunner().invoke(app, ["caption", str(tiny_checkpoint), str(image)]))
    assert set(listed("`frozenprefix caption`")) - files == set()
