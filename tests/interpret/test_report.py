"""The HTML report: self-contained, escaped, valid, and right about what is right."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from frozenprefix.errors import DataError
from frozenprefix.interpret import write_report
from frozenprefix.interpret.loss_curve import describe_loss, draw_loss, loss_points

VOID = {"meta", "link", "img", "br"}
VQA = {
    "task": "vqa",
    "metrics": {"accuracy": 0.75, "exact_match": 0.5},
    "baselines": {"blind": {"accuracy": 0.25, "exact_match": 0.125}, "shuffled": {"accuracy": 0.3, "exact_match": 0.0}},
    "groups": {
        "model": {"accuracy": {"color": 0.875, "yes-no": 0.625}},
        "blind": {"accuracy": {"color": 0.0, "yes-no": 0.5}},
        "shuffled": {"accuracy": {"color": 0.1, "yes-no": 0.4}},
    },
    "n": 8,
}
CAPTION = {"metrics": {"bleu_1": 0.5, "distinct_captions": 3.0}, "baselines": {"blind": {"bleu_1": 0.1}}, "n": 4}
LOG = [
    {"step": 0, "validation/loss": 4.0, "validation/shuffled_loss": 4.1},
    {"step": 10, "loss": 3.5, "gradient_norm": 9.0},
    {"step": 20, "loss": "nan"},
    {"step": 30, "loss": 2.0},
    {"step": 30, "validation/loss": 1.5, "validation/shuffled_loss": 3.0},
]


class Page(HTMLParser):
    """Reads a page, and complains about tags that do not fit into each other."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.words.append(" ")
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {self.get_starttag_text()}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> inside {self.open}"
        self.words.append(" ")
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def drawing(path: Path, color: str, size: int = 64) -> str:
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).rectangle((size // 4, size // 4, size // 2, size // 2), fill=color)
    image.save(path)
    return str(path)


def photo(path: Path) -> str:
    Image.effect_noise((640, 480), 80).convert("RGB").save(path)
    return str(path)


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    red, blue = drawing(tmp_path / "red.png", "red"), photo(tmp_path / "blue.png")
    text = {"blind": "a dog", "shuffled": "a green circle"}
    return [
        {"id": "1", "images": [red], "question": None, "references": ["a red box"], "model": "A red box.", **text},
        {"id": "2", "images": [red], "question": "what color?", "references": ["red"], "model": "Red", **text},
        {"id": "3", "images": [red], "question": "a box?", "references": ["yes"], "model": "no", **text},
        {"id": "4", "images": [blue], "question": None, "references": ["a sea", "waves"], "model": "snow", **text},
        {"id": "5", "images": [blue], "question": "wet?", "references": ["yes"], "model": "", **text},
    ]


def write(tmp_path, rows, **changes) -> tuple[str, Page]:
    given = {
        "title": "A run",
        "results": {"vqa": VQA, "caption": CAPTION},
        "predictions": rows,
        "log": LOG,
        "recipe_yaml": "name: run\n",
    }
    path = write_report(tmp_path / "deep" / "report.html", **{**given, **changes})
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_needs_nothing_from_outside(tmp_path, rows):
    text, page = write(tmp_path, rows)
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href", "formaction")
    ]
    assert len(addresses) == 4, "two images, the loss and the icon"
    assert all(value.startswith("data:") for value in addresses)
    assert not page.named("script")
    assert not re.search(r"https?:|@import|url\(", text)
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")


def test_everything_is_escaped(tmp_path, rows):
    evil = "<script>alert('1')</script> & \"more\" \x00\ud800"
    for row in rows:
        row |= {"question": row["question"] and evil, "references": [evil], "model": evil, "blind": evil}
    rows[0]["images"] = rows[1]["images"] = [drawing(tmp_path / 'a"><i>.png', "red")]
    results = {evil: {**VQA, "metrics": {evil: 0.5}, "groups": {"model": {evil: {evil: 1.0}}}}}
    text, page = write(tmp_path, rows, title=evil, results=results, recipe_yaml=evil)
    assert not page.named("script")
    assert not page.named("i")
    assert "<script" not in text
    assert "\x00" not in text
    assert page.text.count("<script>alert('1')</script> & \"more\" \ufffd\ufffd") > 12
    assert any(image["alt"].startswith('Image a"><i>.png: <script>') for image in page.named("img"))


def test_answers_are_marked_right_and_wrong_in_words(tmp_path, rows):
    _, page = write(tmp_path, rows)
    assert "what color? Red ✓ right truth: red blind: a dog shuffled: a green circle" in page.text
    assert "a box? no ✗ wrong truth: yes" in page.text
    assert "Caption A red box. ✓ same words truth: a red box" in page.text
    assert "Caption snow ≠ other words truth: a sea / waves" in page.text
    assert "wet? (nothing) ✗ wrong" in page.text


def test_scores_stand_beside_their_baselines(tmp_path, rows):
    _, page = write(tmp_path, rows)
    assert "Answers to questions (n = 8) metric model blind shuffled accuracy 0.750 0.250 0.300" in page.text
    assert "accuracy by question type color 0.875 0.000 0.100 yes-no 0.625 0.500 0.400" in page.text
    assert "Captions (n = 4) metric model blind bleu_1 0.500 0.100 distinct_captions 3 –" in page.text


def test_result_of_one_task_is_taken_too(tmp_path, rows):
    _, page = write(tmp_path, rows, results=VQA)
    assert "Answers to questions (n = 8)" in page.text


def test_page_is_accessible(tmp_path, rows):
    text, page = write(tmp_path, rows)
    assert page.named("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    loss = "Loss over 30 steps. At the end: training 2.000, validation 1.500, validation, shuffled images 3.000."
    alts = [image["alt"] for image in page.named("img")]
    assert alts == [loss, "Image red.png: a red box", "Image blue.png: a sea"]
    assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in page.named("th"))
    assert [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)][:3] == [1, 2, 2]
    assert "prefers-color-scheme: dark" in text


def test_drawings_stay_sharp_and_photos_become_small(tmp_path, rows):
    _, page = write(tmp_path, rows)
    sharp, small = page.named("img")[1:]
    assert (sharp["width"], sharp["height"], sharp["class"]) == ("192", "192", "crisp")
    drawn = opened(sharp, "png")
    assert (drawn.size, drawn.convert("RGB").getpixel((20, 20))) == ((64, 64), (255, 0, 0))
    assert (small["width"], small["height"]) == ("224", "168")
    assert "class" not in small
    assert opened(small, "jpeg").size == (224, 168)


def opened(tag: dict, kind: str) -> Image.Image:
    head, _, data = tag["src"].partition(",")
    assert head == f"data:image/{kind};base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_same_arguments_give_the_same_bytes(tmp_path, rows):
    assert write(tmp_path, rows)[0] == write(tmp_path, rows)[0]


def test_images_are_evenly_spaced(tmp_path):
    made = [drawing(tmp_path / f"{n}.png", "red", 8) for n in range(10)]
    rows = [{"images": [p], "question": None, "references": ["x"], "model": "x"} for p in made]
    _, page = write(tmp_path, rows, max_images=4)
    assert [image["alt"] for image in page.named("img")][1:] == [f"Image {n}.png: x" for n in (0, 2, 5, 7)]
    assert "4 of 10 evaluated images, evenly spaced." in page.text
    assert "10 of 10 evaluated images." in write(tmp_path, rows)[1].text


def test_many_questions_are_cut_and_counted(tmp_path, rows):
    _, page = write(tmp_path, [rows[0], *([rows[1]] * 15)])
    assert page.text.count("what color?") == 12
    assert "and 3 more" in page.text


def test_image_that_is_gone_is_named(tmp_path, rows):
    Path(rows[0]["images"][0]).unlink()
    _, page = write(tmp_path, rows)
    assert len(page.named("img")) == 2, "the loss and the other image"
    assert "red.png This image cannot be shown: missing." in page.text


def test_nothing_predicted_and_nothing_logged(tmp_path):
    _, page = write(tmp_path, [], log=[], results={})
    assert "0 of 0 evaluated images." in page.text
    assert "The log holds no loss." in page.text
    assert not page.named("img")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": {"vqa": {"n": 3}}}, r"results\['vqa'\] has no 'metrics'"),
        ({"predictions": [{"images": ["a"], "references": []}]}, r"predictions\[0\] has no 'model'"),
        ({"max_images": 0}, "max_images must be ≥ 1, got 0"),
    ],
)
def test_errors_name_what_is_missing(tmp_path, rows, changes, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path, rows, **changes)


# ── the loss curve ──


def test_the_chart_shows_all_three_losses():
    text = draw_loss(LOG).decode()
    for words in ("step", "loss per token", "training", "validation, shuffled images"):
        assert f">{words}</text>" in text, words
    assert draw_loss(LOG).decode() == text, "the same bytes every time"


def test_the_page_has_the_chart_and_its_table(tmp_path, rows):
    _, page = write(tmp_path, rows)
    chart = page.named("img")[0]
    head, _, data = chart["src"].partition(",")
    assert head == "data:image/svg+xml;base64"
    assert base64.b64decode(data) == draw_loss(LOG)
    assert "step validation validation, shuffled images 0 4 4.100 30 1.500 3" in page.text


def test_values_that_are_no_numbers_are_left_out_of_the_curve():
    log = [{"step": 1, "loss": "inf"}, {"step": 2, "loss": 3}, {"step": 3, "loss": None}, {"step": 4, "other": 1.0}]
    assert loss_points(log, "loss") == [(2.0, 3.0)]
    assert describe_loss(log) == "Loss over 2 steps. At the end: training 3.000."
    assert describe_loss([{"step": 4, "other": 1.0}]) == ""


def test_many_points_are_averaged():
    points = loss_points([{"step": n, "loss": float(n % 2)} for n in range(480)], "loss")
    assert len(points) == 240
    assert points[:2] == [(0.5, 0.5), (2.5, 0.5)]


def test_numbers_of_every_kind(tmp_path):
    metrics = {"a": 0.25, "b": 84.0, "c": 7, "d": 1.0, "e": None, "f": "nan"}
    _, page = write(tmp_path, [], results={"task": "x", "metrics": metrics})
    assert "a 0.250 b 84 c 7 d 1.000 e – f nan" in page.text
