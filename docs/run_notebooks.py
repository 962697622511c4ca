"""Run notebooks in full and keep their outputs.

    python docs/run_notebooks.py 05_which_method [--folder FOLDER]

A notebook is made from its .py file (jupytext), and runs in `FOLDER`, where it leaves its runs. Progress bars and logs
are not kept, and no path of this machine is. In the tests the same notebooks run with tiny models.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
HOURS = 3600


def run(script: Path, folder: Path) -> Path:
    """Execute a notebook and write it, with outputs, beside its script."""
    notebook = jupytext.read(script)
    NotebookClient(notebook, timeout=2 * HOURS, resources={"metadata": {"path": str(folder)}}).execute()
    target = script.with_suffix(".ipynb")
    earlier = nbformat.read(target, as_version=4).cells if target.exists() else []
    for number, cell in enumerate(notebook.cells):
        cell.id = earlier[number].id if number < len(earlier) else f"cell-{number}"  # a change shows only what changed
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [clean(output, folder) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    }
    nbformat.write(notebook, target)
    return target


def clean(output: Any, folder: Path) -> Any:
    """An output without the paths of this machine."""
    places = {str(folder): ".", str(NOTEBOOKS.parent): ".", str(Path.home()): "~"}  # the last may hold the others

    def cleaned(text: str) -> str:
        for place, short in places.items():
            text = text.replace(place, short)
        return re.sub(r" at 0x[0-9a-f]+", "", text)

    if "text" in output:
        output.text = cleaned(output.text)
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and kind != "image/png":
            output.data[kind] = cleaned(value)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run notebooks in full and keep their outputs.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="such as 05_which_method")
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS, help="where they run, and leave their runs")
    options = parser.parse_args()
    # notebooks/drawings.py is found as in Jupyter, which runs a notebook in its own folder
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NOTEBOOKS), os.environ.get("PYTHONPATH")]))
    for name in options.names:
        print(run(NOTEBOOKS / f"{Path(name).stem}.py", options.folder.resolve()))
