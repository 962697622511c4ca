"""The image index on disk, searching it by text, and labels by similarity."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from frozenprefix.data.images import BadImages
from frozenprefix.errors import BadImageError, CacheError, ConfigError, DataError
from frozenprefix.inference.embedding import Embedder
from frozenprefix.inference.image_index import ImageIndex, open_index
from frozenprefix.inference.zero_shot import ZeroShotClassifier
from tests.helpers.drawings import COLOURS, draw_shape
from tests.helpers.retrieval import EYE, ColourModel, ColourProcessor

# ── the index ──


def test_search_finds_the_named_colour(colour_embedder, colour_images):
    index = ImageIndex.build(colour_embedder, sorted(colour_images.iterdir()))
    for colour in COLOURS:
        hits = index.search(colour_embedder.embed_texts([f"something {colour}"]), k=3)[0]
        assert hits[0].path.stem == colour
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(index.search(EYE[:1, :3], k=99)[0]) == 3
    with pytest.raises(ConfigError, match="got k=5 and queries of 4 numbers"):
        index.search(EYE)


def test_numpy_search_sorts_as_a_full_sort_does():
    rng = np.random.default_rng(1)
    embeds = rng.normal(size=(50, 6)).astype(np.float32)
    index = ImageIndex([Path(f"{i}") for i in range(50)], embeds, [""] * 50, "x")
    queries = rng.normal(size=(4, 6)).astype(np.float32)
    for hits, scores in zip(index.search(queries, k=7), queries @ embeds.T, strict=True):
        assert [int(hit.path.name) for hit in hits] == np.argsort(-scores)[:7].tolist()


def test_an_index_is_read_back_whole(colour_embedder, colour_images, tmp_path):
    index = ImageIndex.build(colour_embedder, sorted(colour_images.iterdir()))
    index.save(tmp_path / "index")
    again = ImageIndex.load(tmp_path / "index", colour_embedder.fingerprint())
    assert (again.paths, again.keys) == (index.paths, index.keys)
    assert np.array_equal(again.embeds, index.embeds)
    index.save(tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 2, "older vectors are removed"


def test_an_index_of_another_model_is_refused(colour_embedder, colour_images, tmp_path):
    ImageIndex.build(colour_embedder, sorted(colour_images.iterdir())).save(tmp_path / "index")
    other = Embedder(ColourModel("two"), ColourProcessor())
    with pytest.raises(CacheError, match="was built with model"):
        open_index(other, sorted(colour_images.iterdir()), tmp_path / "index")


@pytest.mark.parametrize("broken", ["", "[]", '{"images": []}'])
def test_a_damaged_index_says_so(broken, tmp_path):
    (tmp_path / "index.json").write_text(broken)
    with pytest.raises(CacheError, match="the index cannot be read"):
        ImageIndex.load(tmp_path)


def test_only_what_changed_is_embedded_again(colour_embedder, colour_images, tmp_path):
    folder = tmp_path / "index"
    files = lambda: sorted(colour_images.iterdir())  # noqa: E731
    open_index(colour_embedder, files(), folder)
    assert colour_embedder.model.seen == 3
    open_index(colour_embedder, files(), folder)
    assert colour_embedder.model.seen == 3
    draw_shape("blue", "cross").save(colour_images / "red.png")  # no longer red
    (colour_images / "green.png").rename(colour_images / "new.png")
    index = open_index(colour_embedder, files(), folder)
    assert colour_embedder.model.seen == 4, "the green image has another name, and the vector that it had"
    assert [path.name for path in index.paths] == ["blue.png", "new.png", "red.png"]
    assert index.search(colour_embedder.embed_texts(["green"]), k=1)[0][0].path.name == "new.png"
    assert ImageIndex.load(folder).paths == index.paths


def test_the_content_decides_and_not_the_time(colour_embedder, colour_images, tmp_path):
    files = sorted(colour_images.iterdir())
    open_index(colour_embedder, files, tmp_path / "index")
    os.utime(files[0], ns=(1, 1))
    open_index(colour_embedder, files, tmp_path / "index")
    assert colour_embedder.model.seen == 3
    size = files[0].stat().st_size
    draw_shape("blue", "cross").save(files[0])
    data = files[0].read_bytes()
    files[0].write_bytes(data + bytes(max(0, size - len(data))))
    os.utime(files[0], ns=(1, 1))
    open_index(colour_embedder, files, tmp_path / "index")
    assert colour_embedder.model.seen == 4


def test_images_that_cannot_be_read(colour_embedder, colour_images):
    (colour_images / "broken.png").write_bytes(b"no image")
    files = sorted(colour_images.iterdir())
    with pytest.raises(BadImageError):
        ImageIndex.build(colour_embedder, files)
    bad = BadImages()
    assert len(ImageIndex.build(colour_embedder, files, bad=bad)) == 3
    assert bad.counts == {"not_an_image": 1}


def test_without_faiss_the_error_says_so(colour_embedder, colour_images):
    index = ImageIndex.build(colour_embedder, sorted(colour_images.iterdir()))
    try:
        import faiss  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install faiss-cpu"):
            index.search(EYE[:1, :3], faiss=True)
    else:
        query = EYE[:1, :3]
        assert index.search(query, faiss=True)[0][0].path == index.search(query)[0][0].path


# ── zero-shot classification ──


def test_labels_are_the_mean_of_their_templates(colour_embedder, colour_images):
    classifier = ZeroShotClassifier(colour_embedder, COLOURS, ["{}", "some {} paint"])
    named = classifier.classify(sorted(colour_images.iterdir()))
    assert [item.label for item in named] == ["blue", "green", "red"]
    assert sum(named[0].probabilities.values()) == pytest.approx(1)
    assert classifier.label_embeds == pytest.approx(EYE[:3, :3])


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["red"], ["{}"], "at least two"),
        (["red", "red"], ["{}"], "all different"),
        (["red", "blue"], ["a colour"], "with a place"),
    ],
)
def test_wrong_labels_and_templates(colour_embedder, labels, templates, message):
    with pytest.raises(ConfigError, match=message):
        ZeroShotClassifier(colour_embedder, labels, templates)


# ── the command ──


def test_search_command(colour_embedder, colour_images, tmp_path, monkeypatch, tiny_checkpoint):
    from frozenprefix.cli.search import command

    monkeypatch.setattr(Embedder, "from_pretrained", classmethod(lambda cls, checkpoint: colour_embedder))
    import typer

    app = typer.Typer()
    app.command()(command)
    arguments = [str(tiny_checkpoint), str(colour_images), "the blue one", "-k", "2", "--index", str(tmp_path / "kept")]
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        lines = result.stdout.strip().splitlines()
        assert len(lines) == 2
        score, path = lines[0].split("\t")
        assert (float(score), Path(path).name) == (pytest.approx(1.0), "blue.png")
    assert colour_embedder.model.seen == 3
    missing = CliRunner().invoke(app, [str(tiny_checkpoint), str(tmp_path / "nowhere"), "x"])
    assert isinstance(missing.exception, DataError)
