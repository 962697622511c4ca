"""Notebooks run, are the same as their .py files, hold the outputs of a full run, and define no classes."""

from __future__ import annotations

import ast
import os
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.helpers import ROOT
from tests.helpers.lm import with_room
from tests.test_quickstart import draw_easy_vqa

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
LARGEST = 700_000  # bytes

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_every_notebook_has_its_script():
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in SCRIPTS] != []


def test_what_notebooks_share_is_shared():
    """A module beside the notebooks is used by several; set-up of many lines is in none of them twice."""
    cells = [cell.source for path in SCRIPTS for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    long = [source for source in cells if source.count("\n") > 8]
    assert len(long) == len(set(long))
    modules = [path.stem for path in set(FOLDER.glob("*.py")).difference(SCRIPTS)]
    assert all(sum(f"from {name} import" in source for source in cells) > 1 for name in modules)


@every_notebook
def test_script_says_the_same(path):
    notebook, script = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ], "run: jupytext --sync notebooks/*.ipynb"


@every_notebook
def test_outputs_are_those_of_a_whole_run(path):
    """Kept by docs/run_notebooks.py: every cell ran, in order, without an error; no path of the machine is in them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run docs/run_notebooks.py"
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert kinds.count("display_data") >= 2
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(?:work|tmp|root|home)/\w", re.sub(r'"image/png": "[^"]*"', "", text))
    assert len(text) < LARGEST


@every_notebook
def test_no_classes(path):
    tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


@every_notebook
def test_runs_from_top_to_bottom(path, tiny_lm, tmp_path, monkeypatch):
    for image_path in draw_easy_vqa(tmp_path / "easy_vqa", 60).rglob("*.png"):
        with Image.open(image_path) as image:
            image.putpixel((0, 0), (int(image_path.stem), 0, 0))  # no two drawings are the same image
            image.save(image_path)
    with_room(Path(shutil.copytree(tiny_lm(), tmp_path / "lm")))
    monkeypatch.setenv("FROZENPREFIX_SMOKE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Jupyter runs a notebook in its own folder; here its runs go elsewhere
    monkeypatch.setenv("PYTHONPATH", str(FOLDER), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output.output_type for cell in code for output in cell.outputs if output.output_type != "stream"]
    assert shown.count("display_data") >= 2
    assert code[-1].outputs[-1].output_type == "execute_result"
