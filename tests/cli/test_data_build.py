"""`frozenprefix data build` and `data show`."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.config import recipe_from_dict
from frozenprefix.data.images import load_image, read_image
from frozenprefix.data.samples import group_by_images
from frozenprefix.data.sources import load_source, load_sources, open_source
from frozenprefix.data.streaming import build as build_module
from frozenprefix.errors import DataError, FrozenPrefixError
from frozenprefix.training import Trainer
from tests.helpers.recipes import tiny_recipe_dict
from tests.helpers.shards import tiny_png


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))


def run(*arguments: object):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


SOURCES = ("captions", "qa")


def test_what_was_built_is_what_was_read(shapes, tmp_path):
    result = run("build", shapes, tmp_path / "out", "--images-per-shard", 5, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "shards: 3, 3 written now; images: 12" in result.output
    listed = group_by_images(load_sources([{"type": kind, "path": str(shapes), "name": kind} for kind in SOURCES]))
    streamed = open_source({"type": "webdataset", "path": str(tmp_path / "out"), "stream": True})
    assert streamed.sizes.tolist() == [5, 5, 2]
    fields = ("id", "targets", "prompt", "question", "history", "split", "task")
    for ours, theirs in zip(streamed, listed, strict=True):
        assert [tuple(getattr(s, f) for f in fields) for s in ours.samples] == [
            tuple(getattr(s, f) for f in fields) for s in theirs.samples
        ]
        assert read_image(ours.images[0]) == read_image(theirs.images[0])
    assert len(load_source({"type": "webdataset", "path": str(tmp_path / "out")})) == 36
    captions = load_source({"type": "webdataset", "path": str(tmp_path / "out"), "captions": "txt"})
    assert captions[0].targets == ("a red circle",)
    assert not (tmp_path / "home" / "tar-indexes").exists(), "the indexes lie beside the tars"


def test_a_build_goes_on_and_refuses_another(shapes, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write, written = build_module.write_shard, []

    def stop(tar, keys):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(tar.name)
        write(tar, keys)

    monkeypatch.setattr(build_module, "write_shard", stop)
    run("build", shapes, out, "--images-per-shard", 3, "--workers", 0)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    monkeypatch.setattr(build_module, "write_shard", write)
    result = run("build", shapes, out, "--images-per-shard", 3, "--workers", 0)
    assert "shards: 4, 2 written now; images: 12" in result.output
    whole = tmp_path / "whole"
    run("build", shapes, whole, "--images-per-shard", 3, "--workers", 2)
    for tar in whole.glob("*.tar*"):
        assert tar.read_bytes() == (out / tar.name).read_bytes()
    other = run("build", shapes, out, "--images-per-shard", 4)
    assert other.exit_code == 2
    assert "images_per_shard" in other.output
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "0.tar").write_bytes(b"")
    assert "did not write" in run("build", shapes, tmp_path / "foreign").output


def test_bad_images_are_left_out(tmp_path):
    for number in range(4):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{number}.png").write_bytes(tiny_png(number) if number else b"x")
    rows = [{"image": f"{number}.png", "captions": ["a dog"]} for number in range(4)]
    (tmp_path / "data" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("build", tmp_path / "data", tmp_path / "out")
    assert "1 of 4 images are left out: not_an_image 1" in result.output
    assert json.loads((tmp_path / "out" / "00000_stats.json").read_text())["status_dict"]["success"] == 3
    strict = run("build", tmp_path / "data", tmp_path / "strict", "--max-bad-share", 0)
    assert strict.exit_code == 2


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_features_in_shards_train_as_the_cache_does(tiny_lm, shapes, tmp_path, dtype):
    raw = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "cached")
    raw["data"] |= {"feature_dtype": dtype, "train": raw["data"]["train"][:1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    result = run("build", shapes, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--split", "train")
    assert result.exit_code == 0, result.output
    shards = {"type": "webdataset", "path": str(tmp_path / "out")}
    with pytest.raises(DataError, match="only streamed"):
        load_source(shards)
    cached = Trainer(recipe_from_dict(raw))
    cached.setup()
    raw["data"]["train"] = [{**shards, "stream": True}]
    trainer = Trainer(recipe_from_dict({**raw, "output_dir": str(tmp_path / "streamed")}))
    trainer.setup()
    (group,) = [g for g in trainer.train_groups if g.samples[0].id.endswith("red_circle.png")]
    (same,) = [g for g in cached.train_groups if g.samples[0].id.endswith("red_circle.png")]
    ours = trainer.train_collator.image_inputs(group.images)["image_features"]
    assert ours.equal(cached.train_collator.image_inputs(same.images)["image_features"])
    assert trainer.step(trainer.batches())["loss"] > 0
    raw["model"]["vision_encoder"]["image_size"] = 48
    with pytest.raises(FrozenPrefixError, match=r"fingerprint|differs"):
        Trainer(recipe_from_dict({**raw, "output_dir": str(tmp_path / "other")})).setup()


def test_a_page_of_samples(shapes, tmp_path):
    run("build", shapes, tmp_path / "shards")
    for source in (shapes, tmp_path / "shards"):
        page = tmp_path / "page.html"
        result = run("show", source, "--out", page, "--samples", 3, "--force")
        assert result.exit_code == 0, result.output
        text = page.read_text()
        assert text.count("<article>") == text.count("data:image/png") == 3
    assert run("show", shapes, "--out", tmp_path / "page.html").exit_code == 2


def test_names_and_texts_are_escaped(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(tiny_png(1))
    row = {"image": "a.png", "id": "<img src=x>", "captions": ["<script>alert(1)</script>"]}
    (tmp_path / "data" / "captions.jsonl").write_text(json.dumps(row) + "\n")
    run("show", tmp_path / "data", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "<img src=x" not in text
    assert load_image(tmp_path / "data" / "a.png").size == (8, 8)
