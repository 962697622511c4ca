"""The page in headless Chromium: `make test-demo` installs what it needs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers import ROOT

NEEDS = "needs the extra demo, playwright and axe-playwright-python: make test-demo"
pytest.importorskip("gradio", reason=NEEDS)
sync_api = pytest.importorskip("playwright.sync_api", reason=NEEDS)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=NEEDS)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

SECONDS = int(os.environ.get("FROZENPREFIX_PAGE_SECONDS", "90")) * 1000  # a machine may do other things too
WINDOWS = {"wide": (1400, 900, "light"), "dark": (1400, 900, "dark"), "narrow": (390, 844, "light")}
# of Gradio's own components: the icon for more files holds its input, a message holds the button that closes it, and a
# gallery repeats captions as texts of images
GRADIOS = {
    ("nested-interactive", "icon-button"),
    ("nested-interactive", "toast-header"),
    ("image-redundant-alt", "<img"),
}


@contextmanager
def running(*arguments: str, folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a page, and its process."""
    command = [sys.executable, "-m", "frozenprefix.cli.main", "demo", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        )  # fmt: skip
    try:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            found = re.search(r"http://\S+", line)
            if found:
                break
        assert found, (folder / "log.txt").read_text()
        yield found[0], process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(run_checkpoint, tmp_path_factory):
    """A page with two checkpoints."""
    folder = tmp_path_factory.mktemp("page")
    places = [str(run_checkpoint), str(run_checkpoint.parent / "last")]
    options = ["--corrections", str(folder / "corrections"), "--precision", "fp32"]
    with running(*places, *options, folder=folder) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=WINDOWS)
def page(request, address, browser):
    width, height, scheme = WINDOWS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    asked: list[str] = []
    opened.on("request", lambda call: asked.append(call.url))
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(address)
    opened.get_by_role("tab", name="Photos and clips").wait_for()
    yield opened
    other = {url for url in asked if not url.startswith((address, "data:", "blob:"))}
    assert not other, "the page asks other addresses"
    assert not errors
    context.close()


def check_accessible(page) -> None:
    found = []
    for violation in axe.Axe().run(page).response["violations"]:
        for node in violation["nodes"]:
            if not any(violation["id"] == rule and part in node["html"] for rule, part in GRADIOS):
                found.append((violation["id"], node["html"][:200]))
    assert not found


def drop(page, *files: Path) -> None:
    page.locator("input[type=file]:not([webkitdirectory])").first.set_input_files([str(file) for file in files])


def caption_of(page, number: int = 0):
    return page.get_by_label("Caption by").nth(number)


def wait_for_text(page, box) -> str:
    sync_api.expect(box).not_to_have_value("", timeout=SECONDS)
    return box.input_value()


def test_captions_answers_reasons_and_a_correction(page, shapes, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    drop(page, shapes / "images/red_circle.png", shapes / "images/blue_cross.png", tmp_path / "notes.txt")
    page.get_by_text("notes.txt: neither an image nor a clip").wait_for()
    wait_for_text(page, caption_of(page))
    wait_for_text(page, caption_of(page, 1))
    assert page.locator("#fp-viewer img").get_attribute("alt") == "red_circle.png"
    page.locator(".fp-gallery button.thumbnail-item").nth(1).click()
    page.locator("#fp-viewer img[alt='blue_cross.png']").wait_for()
    wait_for_text(page, caption_of(page))

    page.get_by_label("Question about the chosen photo").fill("what color is it?")
    page.get_by_role("button", name="Ask").click()
    wait_for_text(page, page.get_by_label("Answer by").first)

    page.get_by_role("button", name="Why these words?").first.click()
    word = page.locator(".fp-words button").first
    word.wait_for()
    heat_map = word.locator(".fp-map")
    assert not heat_map.is_visible()
    word.hover()
    sync_api.expect(heat_map).to_be_visible()
    assert "probability" in word.locator(".fp-tip").inner_text()

    page.get_by_role("button", name="This is wrong").first.click()
    page.get_by_label("What should").first.fill("a blue cross on white")
    check_accessible(page)
    page.get_by_role("button", name="Keep the correction").first.click()
    page.get_by_text("Kept; 1 correction in").wait_for()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"], "nothing has to be scrolled sideways"


@pytest.mark.parametrize("page", ["wide"], indirect=True)
def test_a_folder_with_a_clip(page, shapes, tmp_path):
    video = pytest.importorskip("tests.helpers.video")
    folder = tmp_path / "holiday"
    (folder / "day 1").mkdir(parents=True)
    shutil.copy(shapes / "images/red_circle.png", folder / "day 1" / "red_circle.png")
    video.three_colours(folder)
    (folder / "notes.txt").write_text("no image")
    page.locator("input[webkitdirectory]").set_input_files(str(folder))
    page.get_by_text("notes.txt: neither an image nor a clip").wait_for()
    sync_api.expect(page.locator(".fp-gallery button.thumbnail-item")).to_have_count(2)
    chosen = page.locator("#fp-viewer img")
    for number in range(2):
        page.locator(".fp-gallery button.thumbnail-item").nth(number).click()
        sync_api.expect(chosen).to_have_attribute("alt", re.compile("red_circle|a clip"))
        wait_for_text(page, caption_of(page, 1))
        if "a clip" in (chosen.get_attribute("alt") or ""):
            page.get_by_role("button", name="Why these words?").first.click()
            page.get_by_text("heat maps are for photos").wait_for()


def test_an_error_is_a_message(page):
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Drop a photo or a clip first.").wait_for()
    check_accessible(page)


def test_chat(page, shapes):
    drop(page, shapes / "images/red_circle.png")
    wait_for_text(page, caption_of(page, 1))
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Message", exact=True).fill("what is it?")
    page.get_by_role("button", name="Send").click()
    page.locator("[data-testid=user]").wait_for()
    page.locator("[data-testid=bot]").wait_for()
    check_accessible(page)
    page.get_by_role("button", name="Start again").click()
    sync_api.expect(page.locator("[data-testid=bot]")).to_have_count(0)


@pytest.mark.parametrize("page", ["wide"], indirect=True)
def test_training_on_corrections(page, shapes):
    drop(page, shapes / "images/green_square.png")
    wait_for_text(page, caption_of(page, 1))
    page.get_by_role("button", name="This is wrong").first.click()
    page.get_by_label("What should").first.fill("a green square")
    page.get_by_role("button", name="Keep the correction").first.click()
    page.get_by_text("Kept;").wait_for()
    page.get_by_role("tab", name="Corrections").click()
    page.get_by_role("cell", name="a green square").first.wait_for()
    page.get_by_label("Steps").first.fill("5")
    page.get_by_role("button", name="Train the mapper on the corrections").click()
    page.get_by_text("Before and after").wait_for()
    check_accessible(page)
    page.get_by_role("button", name="Go back to the old one").click()
    page.get_by_text("The mapper is as it was.").wait_for()


def test_two_browsers_at_once(address, browser, shapes):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page, name in zip(pages, ("red_circle.png", "blue_cross.png"), strict=True):
        page.set_default_timeout(SECONDS)
        page.goto(address)
        page.get_by_role("tab", name="Photos and clips").wait_for()
        drop(page, shapes / "images" / name)
    for page, name in zip(pages, ("red_circle.png", "blue_cross.png"), strict=True):
        wait_for_text(page, caption_of(page, 1))
        assert page.locator("#fp-viewer img").get_attribute("alt") == name
        page.context.close()


def test_ctrl_c_ends_it_at_once_and_leaves_nothing(run_checkpoint, browser, shapes, tmp_path):
    with running(str(run_checkpoint), "--precision", "fp32", folder=tmp_path) as (url, process):
        page = browser.new_page()
        page.goto(url)
        page.get_by_role("tab", name="Photos and clips").wait_for(timeout=SECONDS)
        drop(page, shapes / "images/red_circle.png")
        wait_for_text(page, caption_of(page))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        page.close()
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob("frozenprefix-demo-*")), "dropped files are removed"
