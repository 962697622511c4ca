"""Captions without what the image does not support: the rules on hand-written evidence, and the command."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from frozenprefix.cli.caption import Engine, supported_captioner
from frozenprefix.cli.main import app
from frozenprefix.errors import ConfigError
from frozenprefix.inference import Captioner, Generation, SupportedCaptioner, WordEvidence
from frozenprefix.inference.supported import lowest_evidence, supported


def told(text: str, **evidence: float) -> list[WordEvidence]:
    """Every word has an evidence of 1, but those that are named."""
    return [WordEvidence(word, -1.0, evidence.get(word.lower(), 1.0)) for word in text.split()]


CASES = [
    ("A dog runs on the beach .", {}, "A dog runs on the beach .", ()),
    ("A dog runs on the beach .", {"beach": -1}, "A dog runs.", ("on the beach",)),
    ("A dog runs on the beach .", {"dog": -1}, "", ("A dog runs on the beach .",)),
    ("A man in a blue shirt .", {"blue": -1}, "A man in a shirt.", ("blue",)),
    ("A man in a orange coat .", {"orange": -1}, "A man in a coat.", ("orange",)),
    ("An old house by a river", {"old": -1}, "A house by a river", ("old",)),
    ("A black and white dog", {"white": -1}, "A black dog", ("white",)),
    ("A black and white dog", {"white": -1, "black": -1}, "A dog", ("black", "white")),
    ("A man and a woman sit in a park .", {"woman": -1}, "A man.", ("and a woman sit in a park",)),
    ("A dog in the grass on a red mat", {"grass": -1, "red": -1}, "A dog", ("in the grass on a red mat",)),
    ("A group of children are playing .", {"playing": -1}, "A group of children.", ("are playing",)),
    ("two dogs", {"two": -1}, "dogs", ("two",)),
    ("it is", {"it": -9}, "it is", ()),
    ("", {}, "", ()),
]


@pytest.mark.parametrize(("text", "evidence", "kept", "dropped"), CASES, ids=[case[0] or "empty" for case in CASES])
def test_what_is_dropped(text, evidence, kept, dropped):
    assert supported(text, told(text, **evidence), floor=0.0) == (kept, dropped)


def test_function_words_need_no_support():
    words = told("A dog is on a mat", a=-9, on=-9)
    words[2] = WordEvidence("is", -1.0, -9.0)
    assert lowest_evidence(words) == 1.0
    assert supported("A dog is on a mat", words, floor=0.0)[1] == ()


@pytest.fixture
def writes(monkeypatch):
    """The model writes the same caption of every image; its evidence is the model's own."""
    monkeypatch.setattr(
        Captioner,
        "generate",
        lambda self, prompts, images, **options: [Generation("a red circle", -0.5)] * len(prompts),
    )


def test_a_low_floor_keeps_captions_and_a_high_one_keeps_none(captioner, shapes, writes):
    files = sorted((shapes / "images").iterdir())
    low, high = (list(SupportedCaptioner(captioner, files[4:7], floor).caption(files[:4])) for floor in (-1e3, 1e3))
    assert [caption.text for caption in low] == ["a red circle"] * 4 == [caption.whole for caption in high]
    assert [(caption.text, caption.dropped) for caption in high] == [("", ("a red circle",))] * 4
    assert [caption.evidence for caption in low] == pytest.approx([caption.evidence for caption in high])
    assert len({caption.evidence for caption in low}) > 1


def test_the_command_writes_what_was_dropped(tiny_checkpoint, shapes, tmp_path, writes):
    files, out = sorted((shapes / "images").iterdir()), tmp_path / "captions.jsonl"
    base = ["caption", str(tiny_checkpoint), *map(str, files[:2])]
    more = ["--evidence", "1000", "--out", str(out)]
    result = CliRunner().invoke(app, [*base, *more, "--others", str(shapes / "images"), "--num-others", "2"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["", ""]
    assert result.output.count("not supported: a red circle") == 2
    # one image, and no data of a recipe: there is nothing to compare with
    result = CliRunner().invoke(app, [*base[:3], "--evidence", "0"])
    assert result.exit_code != 0
    assert "--others DIR" in result.output


def test_llama_cpp_tells_no_likelihoods(tiny_checkpoint, shapes):
    with pytest.raises(ConfigError, match="does not tell how likely"):
        supported_captioner(None, Engine.llama_cpp, 0.0, str(tiny_checkpoint), [], None, 2)
