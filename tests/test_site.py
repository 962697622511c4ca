"""The documentation site: every page is in its navigation, it builds without a warning, and it needs no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.helpers import ROOT

CONFIG = YAML(typ="safe").load(ROOT / "mkdocs.yml")


def pages(nav: Any) -> Iterator[str]:
    """The pages and folders that a nav names."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(entry)


def test_every_page_is_in_the_navigation():
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    missing = sorted(written - set(pages(CONFIG["nav"])))
    assert missing == [], f"add docs/{' and docs/'.join(missing)} to the nav of mkdocs.yml"


def test_every_page_is_on_the_first_page():
    """docs/index.md is what a reader of the repository sees: it leads to every page of docs/."""
    first = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    written = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"]
    assert [name for name in written if f"]({name})" not in first] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning, such as a link to a page that there is not, ends the build."""
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_page_loads_anything_from_the_network(site):
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|<link[^>]*\shref=[\"']?(?:https?:)?//"
    )
    assert len(list(site.rglob("*.html"))) > 30
    assert [page.name for page in site.rglob("*.html") if loads.search(page.read_text(encoding="utf-8"))] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\([\"']?(?:https?:)?//|@import", styles)


def test_links_to_files_of_the_repository_lead_to_pages(site):
    """In the sources they are paths of the repository; ../benchmarks/README.md is no page."""
    html = (site / "comparison.html").read_text(encoding="utf-8")
    assert 'href="project/benchmarks.html"' in html
    assert 'href="reference/recipes.html"' in html
    methods = (site / "project" / "benchmarks.html").read_text(encoding="utf-8")
    assert 'href="../reference/recipes.html#magma-yaml"' in methods
    assert 'id="magma-yaml"' in (site / "reference" / "recipes.html").read_text(encoding="utf-8")


def test_the_api_has_every_public_name(site):
    from tests.test_public_names import PACKAGES, exports

    shown = {
        package: (site / "api" / f"{package}.html").read_text(encoding="utf-8")
        for package in PACKAGES
        if exports(package)
    }
    wanted = [(package, name.rpartition(".")[2]) for package in shown for name in exports(package)]
    missing = [
        f"{package}.{name}"
        for package, name in wanted
        if not re.search(rf'<h2 id="[\w.]+\.{name}"|<code>{name}</code></a></li>', shown[package])
    ]
    assert missing == []
    assert "Example:" not in shown["frozenprefix.inference"]


def test_search_finds_text_of_every_kind_of_page(site):
    found = {
        each["location"].partition("#")[0]
        for each in json.loads((site / "search" / "search_index.json").read_text())["docs"]
    }
    assert {"tasks.html", "api/frozenprefix.data.html", "reference/commands.html", "project/quality.html"} <= found
