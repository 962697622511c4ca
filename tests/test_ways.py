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


def section(heading: str) -> str:
    """What ARCHITECTURE.md says about one way."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    return text.split(f"### {heading}\n")[1].split("\n#")[0]


def listed(heading: str) -> list[str]:
    """The files of one way, in order."""
    return re.findall(r"^\d+\. `([\w/]+\.py)`", section(heading), flags=re.MULTILINE)


def named(heading: str) -> set[str]:
    """The files of one way, and the others that a trace of it visits; "NAME/" for all files of a package."""
    return set(re.findall(r"`(\w[\w/]*(?:\.py|/))`", section(heading)))


def unnamed(files: set[str], heading: str) -> set[str]:
    """The files that ARCHITECTURE.md neither lists nor names."""
    return {file for file in files if not {file, f"{file.split('/')[0]}/"} & named(heading)}


def files_run(function: Callable[[], Any], passes: Callable[[Any], bool] | None = None) -> set[str]:
    """The files of the package in which a function is called; with `passes`, with an argument that fulfils it."""
    files: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or frame.f_code.co_name == "<module>" or not path.is_relative_to(PACKAGE):
            return
        if passes is None or any(map(passes, list(frame.f_locals.values()))):
            files.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("heading", LIMITS)
def test_a_way_is_short_and_its_files_exist(heading):
    assert 0 < len(listed(heading)) <= LIMITS[heading]
    assert [name for name in named(heading) if not (PACKAGE / name).exists()] == []


def test_a_sample_comes_to_the_loss_by_the_listed_files(tiny_recipe, tmp_path):
    from frozenprefix.training import Trainer

    trainer = Trainer(tiny_recipe(tmp_path))
    trainer.setup()
    batches = trainer.batches()
    files = files_run(lambda: trainer.step(batches))
    assert set(listed("From a sample to the loss")) - files == set()
    assert unnamed(files, "From a sample to the loss") == set()


def test_a_caption_is_written_by_the_listed_files(tiny_checkpoint, shapes):
    from frozenprefix.cli.main import app

    image = shapes / "images" / "red_circle.png"
    files = files_run(lambda: CliRunner().invoke(app, ["caption", str(tiny_checkpoint), str(image)]))
    assert set(listed("`frozenprefix caption`")) - files == set()
    assert unnamed(files, "`frozenprefix caption`") == set()


def test_the_width_of_a_mapper_passes_the_listed_files(tiny_recipe, tmp_path):
    """Files in which the value is an argument, alone or among the mapper's options."""
    from frozenprefix.config import load_recipe
    from frozenprefix.models.configuration import MapperConfig
    from frozenprefix.training import build_model

    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe(tmp_path).to_yaml().replace("hidden_dim: 32", "hidden_dim: 137"))

    def passes(value: Any) -> bool:
        in_block = isinstance(value, MapperConfig) or (isinstance(value, dict) and "hidden_dim" in value)
        return in_block or (isinstance(value, int) and value == 137)

    files = files_run(lambda: build_model(load_recipe(path)), passes)
    assert "models/mappers/mlp.py" in files
    assert unnamed(files, "`model.mapper.hidden_dim` of a recipe") == set()
