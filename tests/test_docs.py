"""What the documents say exists: commands and their options, recipes, links and images."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator

import pytest
import typer

from frozenprefix.cli.main import app
from frozenprefix.config import load_recipe
from tests.helpers import ROOT

NAMES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/quality.md")
DOCUMENTS = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]
IMAGES = sorted(path for path in (ROOT / "docs" / "images").glob("*") if path.is_file())
LARGEST, LARGEST_OF_ALL = 60_000, 400_000  # bytes
COMMAND = typer.main.get_command(app)
USAGE_ERROR = typer.BadParameter.__base__  # Click's, which newer versions of typer carry within them


def commands(text: str) -> Iterator[str]:
    """Lines that call `frozenprefix`, in code blocks and in `code`, continued lines joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    without = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n?)+", without, flags=re.MULTILINE)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if re.match(r"\s*(\$ )?frozenprefix ", line):
            yield line.strip().removeprefix("$ ")
    # in running text a name may stand for itself: `frozenprefix plan RECIPE`
    yield from (" ".join(found.split()) for found in re.findall(r"`(frozenprefix [^`]+)`", without))


def check(line: str) -> None:
    """Parse a command line as the program does, without running it. A command's name alone may stand in a sentence.

    Raises:
        USAGE_ERROR: for a command, an option or a number of arguments that there is not.
    """
    command, context, rest = COMMAND, None, shlex.split(line, comments=True)[1:]
    if rest == ["--help"]:
        return
    while hasattr(command, "resolve_command"):
        context = command.make_context("frozenprefix", list(rest), parent=context, resilient_parsing=True)
        context.resilient_parsing = False  # from here on what is wrong is an error
        name, command, rest = command.resolve_command(context, rest)
        if not rest:
            return
    command.make_context(name, rest, parent=context)


def links(text: str) -> list[str]:
    """Targets of links and images that lie in the repository."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [target.partition("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]


DOCUMENT = pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])


@DOCUMENT
def test_commands_and_their_options_exist(path):
    problems = []
    for line in commands(path.read_text(encoding="utf-8")):
        try:
            check(line)
        except USAGE_ERROR as error:
            problems.append(f"{line}: {error.format_message()}")
    assert problems == []


@DOCUMENT
def test_links_and_images_exist(path):
    missing = [link for link in links(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()]
    assert missing == []


@DOCUMENT
def test_files_exist(path):
    """Recipes, scripts, tests and modules that a document names."""
    text = path.read_text(encoding="utf-8")
    named = set(
        re.findall(r"(?:recipes|benchmarks|docs|tests|notebooks|frozenprefix)/[\w/]*\.(?:yaml|py|md|ipynb)", text)
    )
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


@DOCUMENT
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named - targets == set()


@DOCUMENT
def test_python_imports_work_and_recipes_are_valid(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        tree = ast.parse(code)
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), str(path), "exec"), {})
    for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        recipe = tmp_path / "example.yaml"
        recipe.write_text(re.sub(r"^base: ", f"base: {ROOT}/", block, flags=re.MULTILINE))
        load_recipe(recipe)


@pytest.mark.parametrize("path", IMAGES, ids=[path.name for path in IMAGES])
def test_images_are_small_and_shown(path):
    assert path.stat().st_size < LARGEST
    assert any(f"images/{path.name}" in document.read_text(encoding="utf-8") for document in DOCUMENTS)


def test_all_images_together_are_small():
    assert 0 < sum(path.stat().st_size for path in IMAGES) < LARGEST_OF_ALL


# ── the checks themselves ──


def test_commands_are_found_where_they_stand():
    text = (
        "Say `frozenprefix plan\nRECIPE`.\n\n    frozenprefix train a.yaml \\\n        x=1   # why\n    make test\n\n"
        "```bash\n$ frozenprefix ask c p q\n```\n"
    )
    found = [" ".join(line.split()) for line in commands(text)]
    assert found == ["frozenprefix ask c p q", "frozenprefix train a.yaml x=1 # why", "frozenprefix plan RECIPE"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frozenprefix trian a.yaml", "No such command"),
        ("frozenprefix search c d q --tpo 3", "No such option"),
        ("frozenprefix data chekc d", "No such command"),
        ("frozenprefix video c v --pooling max", "max"),
        ("frozenprefix ask c p", "Missing .*question"),
        ("frozenprefix ask c p q r", "unexpected extra argument"),
    ],
)
def test_a_wrong_command_is_noticed(line, message):
    with pytest.raises(USAGE_ERROR, match="(?i)" + message):
        check(line)


@pytest.mark.parametrize("line", ["frozenprefix data check d --out o.json", "frozenprefix search c d 'a dog' -k 3"])
def test_a_right_command_passes(line):
    check(line)


def test_links_are_found():
    text = 'See [a](x.md#part), ![b](images/b.svg), [c](https://example.org), [d](#here), <img src="e.png">.\n'
    assert links(text) == ["x.md", "images/b.svg", "e.png"]
