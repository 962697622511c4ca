"""MkDocs hooks: the pages of the site that lie outside docs/ or are made from code.

Documents of the repository link to each other by their paths there, so that the links work on any view of it. Here a
link to a file becomes one to the page that shows it; a file without a page stays as text.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

# file of the repository -> page
OUTSIDE = {
    "README.md": "project/readme.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "benchmarks/quality.md": "project/quality.md",
}
RECIPES, COMMANDS = "reference/recipes.md", "reference/commands.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


# ── MkDocs calls these ──


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replaces the folders in the nav by the pages that are made for them."""
    made = {"notebooks/": notebook_pages(), "api/": api_pages()}

    def filled(entry: Any) -> Any:
        if isinstance(entry, list):
            return [filled(each) for each in entry]
        if isinstance(entry, dict):
            return {title: filled(value) for title, value in entry.items()}
        return [{title: page} for title, page in made[entry].items()] if entry in made else entry

    config.nav = filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in OUTSIDE.items()}
    pages[RECIPES], pages[COMMANDS] = recipes_page(), commands_page()
    pages.update({page: api_page(package) for package, page in api_pages().items()})
    pages.update({page: notebook_page(ROOT / notebook_of(page)) for page in notebook_pages().values()})
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at pages of the site."""
    source = source_of(page.file.src_uri)
    if source is None:
        return markdown
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda match: link(match, source, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


# ── links ──


def source_of(page: str) -> str | None:
    """The file of the repository whose relative links a page has; None for pages made here."""
    if page in OUTSIDE.values():
        return next(source for source, at in OUTSIDE.items() if at == page)
    if page.startswith("notebooks/"):
        return notebook_of(page)
    return None if page.startswith(("api/", "reference/")) else f"docs/{page}"


def page_of(path: str) -> str | None:
    """The page that shows a file or folder of the repository, with its anchor, or None."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path == "docs":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/") and path.endswith((".ipynb", ".py")):
        return f"notebooks/{Path(path).stem}.md"
    if path == "notebooks":
        return next(iter(notebook_pages().values()))
    if path == "recipes" or path.startswith("recipes/"):
        name = path.removeprefix("recipes").strip("/")
        return f"{RECIPES}#{anchor(name)}" if name.endswith(".yaml") else RECIPES
    return None


def link(match: re.Match[str], source: str, page: str) -> str:
    """A link as the site has it: to a page, unchanged if it leaves the repository, else its text alone."""
    mark, text, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path, _, part = target.partition("#")
    to = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
    if to is None:
        return text
    to, _, own = to.partition("#")
    to = posixpath.relpath(to, posixpath.dirname(page) or ".")
    return f"{mark}[{text}]({to}{'#' if part or own else ''}{part or own})"


def anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


# ── recipes and commands ──


def recipes_page() -> str:
    """Every recipe, with its first comment as the text above it."""
    parts = ["# Recipes", "One YAML file for each published method and each task, as they lie in `recipes/`."]
    paths = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "recipes").glob("*/*.yaml"))]
    for path in paths:
        name = path.relative_to(ROOT / "recipes").as_posix()
        text = path.read_text(encoding="utf-8").rstrip()
        parts += [f"## {name} {{ #{anchor(name)} }}", f"```yaml\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Arguments and options of every command, from the program itself."""
    import typer

    from frozenprefix.cli.main import app

    parts = ["# Commands", "What `frozenprefix COMMAND --help` says."]

    def describe(command: Any, name: str) -> None:
        for sub, each in getattr(command, "commands", {}).items():
            describe(each, f"{name} {sub}")
        if hasattr(command, "commands"):
            return
        shown = [p for p in command.params if p.name != "help"]
        arguments = "".join(f"{usage_of(p)} " for p in shown if p.param_type_name == "argument")
        parts.append(f"## {name.removeprefix('frozenprefix ')}")
        parts.append(f"```text\n{name} {arguments}[OPTIONS]\n```\n\n{clean(command.help)}")
        rows = [
            f"| {names_of(p)} | {cell(p.help)} | {default_of(p)} |"
            for p in sorted(shown, key=lambda p: p.param_type_name)
        ]
        parts.append("\n".join(["| | | default |", "|---|---|---|", *rows]))

    describe(typer.main.get_command(app), "frozenprefix")
    return "\n\n".join(parts) + "\n"


def usage_of(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()) + ("..." if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def names_of(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def default_of(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    return "" if default is None or default is False or default in ((), []) or callable(default) else f"`{default}`"


def clean(text: str | None) -> str:
    """A help text as Markdown: no marks of the terminal, no placeholders taken for HTML."""
    return (text or "").replace("\b", "").replace("<", "&lt;").strip()


def cell(text: str | None) -> str:
    return " ".join(clean(text).split()).replace("|", "\\|")


# ── API ──


def api_pages() -> dict[str, str]:
    """Public packages, and the page of each."""
    packages = sorted(path.parent for path in (ROOT / "frozenprefix").rglob("__init__.py"))
    names = [".".join(path.relative_to(ROOT).parts) for path in packages]
    return {name: f"api/{name}.md" for name in names if public_names(name)}


def public_names(package: str) -> list[str]:
    """`__all__` of a package, read without importing it."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    return []


def api_page(package: str) -> str:
    """The docstrings of a package's public names. The first page links to those that a package below describes."""
    names, links = public_names(package), ""
    if package == "frozenprefix":
        below = {name: other for other in api_pages() if other != package for name in public_names(other)}
        links = "".join(f"- [`{name}`][{below[name]}.{name}]\n" for name in names if name in below)
        names = [name for name in names if name not in below]
    # a function may have the name of its module, which is then what the path `package.name` names
    folder = ROOT / package.replace(".", "/")
    hidden = [name for name in names if (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()]
    members = "".join(f"        - {name}\n" for name in names if name not in hidden)
    parts = [f"# {package}", f"::: {package}\n    options:\n      members:\n{members}", links]
    options = "    options:\n      show_root_heading: true\n      show_root_toc_entry: true\n"
    parts += [f"::: {package}.{name}.{name}\n{options}" for name in hidden]
    return "\n\n".join(parts) + "\n"


# ── notebooks ──


def notebook_pages() -> dict[str, str]:
    """Titles of the notebooks, and the page of each."""
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return {title_of(path): f"notebooks/{path.stem}.md" for path in paths}


def notebook_of(page: str) -> str:
    return f"notebooks/{Path(page).stem}.ipynb"


def title_of(path: Path) -> str:
    cells = read_notebook(path)["cells"]
    return next(line[2:] for cell in cells for line in "".join(cell["source"]).splitlines() if line.startswith("# "))


def read_notebook(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.read_text(encoding="utf-8"))


def notebook_page(path: Path) -> str:
    """A notebook with the outputs that are kept in it."""
    parts = []
    for each in read_notebook(path)["cells"]:
        source = "".join(each["source"])
        parts.append(source if each["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown for output in each.get("outputs", []) if (shown := output_of(output))]
    return "\n\n".join(parts) + "\n"


def output_of(output: dict[str, Any]) -> str:
    """One output of a cell: an image or a table as it is, anything else as text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="output of the cell above" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        return f'<div class="notebook-table">{"".join(data["text/html"])}</div>'
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f'<div class="output" markdown>\n\n```text\n{text}\n```\n\n</div>' if text else ""
