"""The commands and the Python of README and docs/ run, on tiny models. What cannot run is listed with its reason."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frozenprefix.registry import undoing_registrations
from tests.helpers import ROOT
from tests.helpers.workplace import EASY_VQA, call, in_small, make_workplace
from tests.test_docs import DOCUMENTS, commands

PAGES = [path for path in DOCUMENTS if path.name == "README.md" or path.parent.name == "docs"]
PYTHON_PAGE = "docs/python.md"  # run by tests/test_python_page.py

#: commands of this package that are only parsed (tests/test_docs.py): the beginning of the line, and why
NOT_RUN = {
    "frozenprefix evaluate runs/grounding/best": "not trained here; tests/evaluation/test_grounding.py runs the task",
    "frozenprefix demo": "does not end; tests/demo/test_page.py opens the page",
    "frozenprefix data check photos/": "ends with exit code 1: it says that the table of this folder is not read",
    "frozenprefix import clipcap": "downloads CLIP; tests/export/test_clipcap.py runs it on a table of features",
}
#: other commands: the beginning of the line, and why it is not run here, or what runs it
OTHERS = {
    "make ": "is this test run, or starts it; tests/test_docs.py looks for the targets",
    "python benchmarks/": "tests/test_benchmarks.py runs each with --quick",
    "python -m benchmarks.families": "builds 150 language models",
    "python recipes/drawings.py": "is run for the data of this test",
    "python recipes/emoji.py": "downloads from npm; tests/test_recipe_emoji.py runs it with a stand-in",
    "accelerate launch": "tests/training/test_processes.py and tests/test_recipes.py run it",
    "torchrun ": "tests/training/test_processes.py runs it",
    "srun ": "needs Slurm",
    "export MASTER_ADDR": "needs Slurm",
    "pip install": "downloads",
    "python -m venv": "downloads",
    "lmms-eval ": "is not among the requirements; tests/interop/test_lmms_eval.py runs it where it is installed",
    "python mine.py": "needs VLMEvalKit, which is not on PyPI",
    "transformers serve": "tests/models/standalone/test_serving.py runs it",
    "vllm serve": "needs a GPU",
    "head -1 embeds/requests.jsonl": "needs vLLM's server",
    "llama-mtmd-cli": "needs a build of llama.cpp; the library is run by tests/export/test_export.py",
    "hf upload": "needs an account",
    "mkdocs serve": "does not end; tests/test_site.py builds the site",
    "py-spy dump": "needs the rights of a debugger",
}
#: words of a command that stand for something, and what they are here
WORDS = {
    "RECIPE": "recipes/flickr8k.yaml",
    "RECIPE.yaml": "recipes/flickr8k.yaml",
    "CHECKPOINT": "runs/flickr8k/best",
    "RUN": "runs/flickr8k",
    EASY_VQA: "data/easy_vqa",
    "training.max_steps=28": "training.max_steps=2",
    "training.warmup_steps=2": "training.warmup_steps=0",
}
#: commands that need another checkpoint than the one that a page trains: an exportable one, with llama.cpp's file
EXPORTABLE = re.compile(r"^frozenprefix (?:export |caption .*--engine llama\.cpp)")
QUESTIONS = "what is this?\n"


def lines_of(text: str) -> Iterator[str]:
    """Command lines of this package that have arguments: a name alone may stand in a sentence."""
    for line in commands(text):
        words = shlex.split(line, comments=True)
        if len(words) > 2 and words[1] != "--help" and (words[1] not in ("export", "import", "data") or len(words) > 3):
            yield " ".join(line.split())


def other_lines(text: str) -> Iterator[str]:
    """Command lines of other programs, in code blocks and in running text."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    without = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n?)+", without, flags=re.MULTILINE)
    names = ("python", "make", "pip", "torchrun", "accelerate", "lmms-eval", "vllm", "hf", "transformers", "mkdocs")
    programs = "(?:" + "|".join([*names, r"llama-\S+", "py-spy", "srun", "head", "export"]) + ")"
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if re.match(rf"\s*{programs} (?!=)", line):
            yield line.strip()
    yield from (" ".join(found.split()) for found in re.findall(rf"`({programs} [^`]+)`", without))


def as_here(line: str, number: int) -> list[str]:
    """The words of a command, with the names of this folder for those that stand for something."""
    words = [WORDS.get(word, word) for word in shlex.split(line, comments=True)]
    words = [f"out-{number}" if word == "DIR" else word for word in words]
    if line.startswith("frozenprefix new"):
        words.append("--no-plan")  # the recipe names real weights, which `prepare` replaces
    if EXPORTABLE.match(line):
        words = [re.sub(r"^runs/\w+/best$", "runs/exportable/best", word) for word in words]
        if "--engine" in words and "--language-model" not in words:
            words += ["--language-model", "exported/lm/language_model.gguf"]
    return words[1:]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    pytest.importorskip("av", reason="PyAV is not installed: no clips")
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def here(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def test_commands_run(here):
    """All of them in one test: what one writes, the next one reads. Each line runs once, wherever it stands."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    before_export = "frozenprefix export gguf runs/mine/best --out exported/lm --only-language-model"
    lines = [
        before_export,
        *dict.fromkeys(line for page in PAGES for line in lines_of(page.read_text(encoding="utf-8"))),
    ]
    write_own_recipes(here)
    failures, seen = {}, set()
    for number, line in enumerate(lines):
        words = as_here(line, number)
        if line.startswith(tuple(NOT_RUN)) or tuple(words) in seen:
            continue
        seen.add(tuple(words))
        prepare(here, line)
        for out in (here / words[at + 1] for at, word in enumerate(words) if word == "--out"):
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)  # two pages may name the same
        try:
            call(words, typed=QUESTIONS)
        except (Exception, AssertionError) as error:
            failures[line] = f"{type(error).__name__}: {error}"
    assert not failures, "\n".join(f"{line}\n    {why}" for line, why in failures.items())


def write_own_recipes(here: Path) -> None:
    """The recipes that a reader writes: that of the tutorial, and the recipe.yaml of the page about data."""
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(# mine\.yaml.*?)^```", tutorial, flags=re.DOTALL | re.MULTILINE)
    small = in_small(block).replace("training: {", "training: {precision: fp32, images_per_step: 4, ")
    (here / "mine.yaml").write_text(small)
    (here / "recipe.yaml").write_text("base: recipes/flickr8k.yaml\ntraining: {precision: fp32}\n")


def prepare(here: Path, line: str) -> None:
    """What a command finds that another machine, or an earlier page, has made."""
    if line.startswith("frozenprefix compare"):
        call(["evaluate", "runs/flickr8k/best", "--task", "caption", "--out", "A.json"])
        (here / "other").mkdir(exist_ok=True)
        for name in ("B.json", "scores.json", "other/scores.json"):
            shutil.copy(here / "A.json", here / name)
    if line.startswith("frozenprefix train photos.yaml"):
        recipe = here / "photos.yaml"
        recipe.write_text(in_small(recipe.read_text(encoding="utf-8")), encoding="utf-8")
    for run, names in (("mine", ("mine.yaml", "runs/mine")), ("retrieval", ("runs/retrieval",))):
        if line.startswith("frozenprefix train") and any(name in line for name in names):
            shutil.rmtree(here / "runs" / run, ignore_errors=True)  # of another recipe


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_other_commands_are_run_elsewhere_or_cannot_be(path):
    unknown = [line for line in other_lines(path.read_text(encoding="utf-8")) if not line.startswith(tuple(OTHERS))]
    assert unknown == [], "run it in a test, or list it in OTHERS with the reason"


def test_the_lists_hold_nothing_that_no_page_says():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    said = [" ".join(line.split()) for line in [*lines_of(text), *other_lines(text)]]
    listed = [*NOT_RUN, *OTHERS]
    assert [entry for entry in listed if not any(line.startswith(entry) or entry in text for line in said)] == []


PYTHON = [
    path
    for path in PAGES
    if "```python" in path.read_text(encoding="utf-8") and str(path.relative_to(ROOT)) != PYTHON_PAGE
]


def test_python_runs(here):
    """The blocks of each page, from top to bottom. One test: the folder is made once for each process that needs it."""
    retrieval = [
        "output_dir=runs/retrieval",
        "data.retrieval={captions: 3}",
        "data.workers=0",
        "training.precision=fp32",
    ]
    call(["train", "recipes/quickstart.yaml", "--resume", "never", *retrieval])  # the page trains it by a command
    failures = {}
    for path in PYTHON:
        names: dict[str, Any] = {"__name__": "page"}
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        try:
            with undoing_registrations():
                for number, block in enumerate(blocks):
                    exec(compile(block, f"{path.name}, block {number + 1}", "exec"), names)
                    if "def main(" in block:
                        names["main"]()
        except Exception as error:
            failures[path.name] = f"{type(error).__name__}: {error}"
    assert not failures, "\n".join(f"{name}: {why}" for name, why in failures.items())
