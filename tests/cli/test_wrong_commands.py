"""More than a hundred mistakes of users: each is an exit code and a message, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from tests.helpers.drawings import draw_shape, write_shapes
from tests.helpers.recipes import tiny_recipe_dict


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_checkpoint, tiny_lm):
    """A working directory with a checkpoint, data, and everything that can be wrong about them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_checkpoint, folder / "ckpt")
    write_shapes(folder / "data")
    draw_shape("red", "circle").save(folder / "a.png")
    (folder / "empty").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("notes")
    (folder / "link.jsonl").symlink_to("captions.jsonl")
    for name in ("best", "last"):
        (folder / "photos" / name).mkdir(parents=True)
        draw_shape("red", "circle").save(folder / "photos" / name / "1.png")
    (folder / "onlylast").mkdir()
    shutil.copytree(folder / "ckpt", folder / "onlylast" / "last")
    (folder / "captions.jsonl").write_text('{"image": "a.png", "captions": ["a dog"]}\n')
    (folder / "list.json").write_text("[]")
    (folder / "half.json").write_text('{"task": "caption"')
    (folder / "other.json").write_text('{"a": 1}')
    lost = {"task": "caption", "metrics": {}, "predictions": "gone.jsonl", "predictions_sha256": ""}
    (folder / "lost.json").write_text(json.dumps(lost))
    (folder / "number.json").write_text(json.dumps({**lost, "predictions": 5}))
    (folder / "metrics.json").write_text(json.dumps({**lost, "metrics": "high"}))
    (folder / "runs" / "dogs" / "best").mkdir(parents=True)
    for name, remove in (
        ("no_weights", "model.safetensors"),
        ("no_tokenizer", "tokenizer.json"),
        ("no_config", "config.json"),
    ):
        shutil.copytree(folder / "ckpt", folder / name)
        (folder / name / remove).unlink()
    for name, file, text in (
        ("bad_config", "config.json", "{"),
        ("bad_weights", "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("bad_processor", "processor_config.json", "[]"),
        ("foreign", "config.json", '{"model_type": "bert"}'),
        ("bad_recipe", "recipe.yaml", "a: [1"),
    ):
        shutil.copytree(folder / "ckpt", folder / name)
        (folder / name / file).write_text(text)
    for name, rows in (
        ("not_json", "{image: a}"),
        ("no_field", '{"image": "x.png", "caption": "a"}'),
        ("no_images", '{"image": "x.png", "captions": ["a"]}'),
        ("not_utf8", None),
        ("carriage_returns", '{"image": "a.png", "captions": ["a"]}\r{"image": "a.png", "captions": ["a"]}'),
        ("null_label", '{"image": "../a.png", "label": null}'),
        ("twice", '{"image": "a.png", "image": "b.png", "captions": ["a"]}'),
        ("cut_short", '{"image": "../a.png", "captions": ["a"]}\n{"image": "../a.png", "cap'),
        ("nan", '{"image": "../a.png", "captions": NaN}'),
        ("blank", '{"image": "../a.png", "captions": [" "]}'),
    ):
        (folder / name).mkdir()
        (folder / name / "captions.jsonl").write_bytes(b"\xff\xfe" if rows is None else rows.encode())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    lms = {
        "lm_pointer": ("model.safetensors", pointer),
        "lm_tokenizer_pointer": ("tokenizer.json", pointer),
        "lm_cut": ("model.safetensors", ""),
        "lm_vision": ("config.json", '{"model_type": "vit"}'),
        "lm_unknown": ("config.json", '{"model_type": "llama9"}'),
        "lm_types": ("config.json", '{"model_type": "llama", "hidden_size": "many"}'),
        "lm_tokenizer": ("tokenizer.json", "{"),
    }
    for name, (file, text) in lms.items():
        shutil.copytree(tiny_lm("llama"), folder / name)
        (folder / name / file).write_text(text)
    (folder / "tables").mkdir()
    draw_shape("red", "circle").save(folder / "tables" / "a.png")
    (folder / "tables" / "labels.csv").write_text("file,text\na.png,a dog\n")
    (folder / "00000.tar").write_text("no tar")
    (folder / "tars").mkdir()
    (folder / "tars" / "00000.tar").write_text("no tar")
    recipe = tiny_recipe_dict(tiny_lm("llama"), folder / "data", folder / "run")
    (folder / "good.yaml").write_text(json.dumps(recipe))
    (folder / "tabs.yaml").write_text("model:\n\tmapper: 1\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "typo.yaml").write_text(json.dumps({**recipe, "trainig": {}}))
    (folder / "binary.yaml").write_bytes(b"\x00\xff")
    return folder


EVALUATE = ["evaluate", "ckpt", "--data", "data", "--split", "val"]
WRONG = [
    # checkpoints
    ["caption", "ckp", "a.png"],
    ["ask", "ckp", "a.png", "what?"],
    ["chat", "ckp"],
    ["evaluate", "ckp", "--task", "caption", "--data", "data"],
    ["search", "ckp", "data", "a dog"],
    ["video", "ckp", "notes.txt"],
    ["caption", "runs/dogs/best", "a.png"],
    ["caption", "notes.txt", "a.png"],
    ["caption", "no_weights", "a.png"],
    ["caption", "no_tokenizer", "a.png"],
    ["ask", "no_config", "a.png", "what?"],
    ["caption", "bad_config", "a.png"],
    ["ask", "bad_weights", "a.png", "what?"],
    ["caption", "bad_processor", "a.png"],
    ["evaluate", "foreign", "--task", "caption", "--data", "data"],
    ["evaluate", "bad_recipe", "--task", "caption", "--data", "data"],
    ["search", "ckpt", "data", "a dog"],
    ["caption", "", "a.png"],
    ["caption", "CKPT", "a.png"],
    ["caption", "onlylast", "a.png"],
    ["caption", "ckpt/config.json", "a.png"],
    ["caption", "owner/name", "a.png"],
    ["caption", "c" * 300, "a.png"],
    ["caption", "ckpt", "a.png", "--language-model", "lm_pointer"],
    ["caption", "ckpt", "a.png", "--language-model", "nowhere"],
    ["ask", "ckpt", "a.png", "what?", "--language-model", ""],
    # images and prompts
    ["caption", "ckpt", "a" * 300 + ".png"],
    ["caption", "ckpt", "https://example.invalid/a.png"],
    ["caption", "ckpt", "a.png", "--max-new-tokens", "0"],
    ["caption", "ckpt", "a.png", "--max-new-tokens", "-1"],
    ["chat", "ckpt", "--temperature", "-1"],
    ["chat", "ckpt", "--temperature", "nan"],
    ["caption", "ckpt", "none.png"],
    ["caption", "ckpt", "empty"],
    ["caption", "ckpt", "empty.png"],
    ["caption", "ckpt", "text.png", "notes.txt"],
    ["ask", "ckpt", "text.png", "what?"],
    ["ask", "ckpt", "data", "what?"],
    ["caption", "ckpt", "a.png", "--prompt", "<image> and <image>"],
    ["caption", "ckpt", "a.png", "--beams", "0"],
    ["caption", "ckpt", "a.png", "--max-new-tokens", "many"],
    ["chat", "ckpt", "none.png"],
    ["chat", "ckpt", "text.png"],
    ["video", "ckpt", "none.mp4"],
    ["video", "ckpt", "notes.txt"],
    ["video", "ckpt", "a.png", "--summary", "--follow"],
    ["search", "ckpt", "empty", "a dog"],
    ["search", "ckpt", "a.png", "a dog"],
    # outputs
    ["caption", "ckpt", "a.png", "--out", "captions.jsonl"],
    ["caption", "ckpt", "a.png", "--out", "empty"],
    ["caption", "ckpt", "a.png", "--out", "notes.txt/captions.jsonl"],
    [*EVALUATE, "--task", "caption", "--out", "notes.txt"],
    [*EVALUATE, "--task", "caption", "--predictions", "captions.jsonl"],
    [*EVALUATE, "--task", "caption", "--out", "new.json", "--predictions", "new.json"],
    ["caption", "ckpt", "a.png", "--out", "link.jsonl"],
    ["caption", "ckpt", "a.png", "--out", "a.png"],
    ["caption", "ckpt", "a.png", "--out", "/proc/none/captions.jsonl"],
    ["plan", "good.yaml", "--json", "good.yaml"],
    ["train", "good.yaml", "output_dir=photos"],
    ["train", "good.yaml", "output_dir=a.png"],
    ["train", "good.yaml", "output_dir=/proc/none"],
    ["data", "check", "data", "--out", "other.json"],
    ["video", "ckpt", "a.png", "--json", "notes.txt"],
    # evaluation
    [*EVALUATE, "--task", "captions"],
    [*EVALUATE, "--task", "retrieval"],
    [*EVALUATE, "--task", "video", "--option", "fps=3"],
    [*EVALUATE, "--task", "classification"],
    [*EVALUATE, "--task", "caption", "--option", "metrics"],
    [*EVALUATE, "--task", "caption", "--option", "metrics=[bleu]"],
    [*EVALUATE, "--task", "vqa", "--option", "answering=guess"],
    [*EVALUATE, "--task", "vqa", "--option", "candidates=[1"],
    [*EVALUATE, "--task", "fewshot", "--beams", "3"],
    ["evaluate", "ckpt", "--task", "caption"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "nowhere"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "data", "--split", "vall"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "not_json"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "no_field"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "no_images"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "not_utf8"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "blank"],
    ["compare", "none.json", "lost.json"],
    ["compare", "list.json", "lost.json"],
    ["compare", "half.json", "lost.json"],
    ["compare", "other.json", "lost.json"],
    ["compare", "lost.json", "lost.json"],
    ["compare", "data", "lost.json"],
    ["compare", "number.json", "lost.json"],
    ["compare", "metrics.json", "lost.json"],
    # recipes and data
    ["train", "none.yaml"],
    ["train", "data"],
    ["train", "tabs.yaml"],
    ["train", "list.yaml"],
    ["train", "typo.yaml"],
    ["train", "binary.yaml"],
    ["train", "good.yaml", "training.max_steps=some"],
    ["train", "good.yaml", "training.max_steps"],
    ["train", "good.yaml", "model.language_model.path=nowhere"],
    ["train", "good.yaml", "model.language_model.path=data"],
    ["train", "good.yaml", "data.train=[{type: captions, path: nowhere}]"],
    ["train", "good.yaml", "--resume", "nowhere"],
    ["train", "good.yaml", "--resume", "ckpt"],
    ["train", "good.yaml", "training.init_from=nowhere"],
    ["train", "good.yaml", "training.init_from=a.png"],
    ["train", "good.yaml", "training.gradient_accumulation_steps=3"],
    ["train", "good.yaml", "model.language_model.path=lm_pointer"],
    ["train", "good.yaml", "model.language_model.path=lm_tokenizer_pointer"],
    ["train", "good.yaml", "model.language_model.path=lm_cut"],
    ["train", "good.yaml", "model.language_model.path=lm_vision"],
    ["train", "good.yaml", "model.language_model.path=lm_unknown"],
    ["train", "good.yaml", "model.language_model.path=lm_types"],
    ["train", "good.yaml", "model.language_model.path=lm_tokenizer"],
    ["train", "good.yaml", "model.language_model.path=empty"],
    ["train", "good.yaml", "model.language_model.path=none.gguf"],
    ["train", "good.yaml", "model.language_model.path=owner/name"],
    ["train", "good.yaml", "data.validation=[{type: captions, path: data, split: val, limit: 1}]"],
    ["plan", "good.yaml", "model.language_model.path=lm_cut"],
    ["plan", "good.yaml", "training.gradient_accumulation_steps=3"],
    ["cache", "good.yaml", "data.feature_cache=off"],
    ["plan", "good.yaml", "--hardware", "h1000"],
    ["plan", "good.yaml", "--json", "empty"],
    ["data", "check", "nowhere"],
    ["data", "check", "not_json"],
    ["data", "check", "a.png"],
    ["data", "check", "carriage_returns"],
    ["data", "check", "null_label"],
    ["data", "check", "twice"],
    ["data", "check", "cut_short"],
    ["data", "check", "nan"],
    ["data", "check", "tars"],
    ["evaluate", "ckpt", "--task", "caption", "--data", "tables"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_command_lines_end_with_a_message(place, monkeypatch, arguments):
    monkeypatch.chdir(place)
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert result.stderr.strip()
    assert "Traceback" not in result.output
    assert before == {path: path.read_bytes() for path in before}, "a file of the user was changed"


def test_there_are_a_hundred():
    assert len({tuple(arguments) for arguments in WRONG}) >= 100


# ── names that are not UTF-8 ──


@pytest.fixture
def odd(tmp_path):
    """A folder with an image whose name is Latin-1."""
    folder = tmp_path / "images"
    folder.mkdir()
    name = os.fsencode(folder) + b"/caf\xe9.png"
    try:
        draw_shape("red", "circle").save(folder / "a.png")
        os.rename(folder / "a.png", name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return Path(os.fsdecode(name))


def test_names_that_are_not_utf8(odd, tiny_checkpoint, tmp_path):
    out = tmp_path / "captions.jsonl"
    result = CliRunner().invoke(
        app, ["caption", str(tiny_checkpoint), str(odd.parent), "--out", str(out), "--beams", "1"]
    )
    assert result.exit_code == 0, result.output
    (row,) = (json.loads(line) for line in out.read_bytes().decode("utf-8").splitlines())
    assert row["image"] == str(odd)
    screen = CliRunner().invoke(app, ["caption", str(tiny_checkpoint), str(odd.parent), "--beams", "1"])
    assert screen.exit_code == 0
    assert "caf" in screen.output
    report = tmp_path / "report.json"
    checked = CliRunner().invoke(app, ["data", "check", str(odd.parent), "--out", str(report)])
    assert checked.exit_code == 0, checked.output
    json.loads(report.read_bytes().decode("utf-8"))


def test_names_with_control_characters_stay_on_their_line(tiny_checkpoint, tmp_path):
    names = ("new\nline.png", "tab\there.png", "esc\x1b[31m.png", "[red]x[].png", "%s{x}.png")
    for name in names:
        draw_shape("red", "circle").save(tmp_path / name)
    (tmp_path / "bad\n.png").touch()
    result = CliRunner().invoke(app, ["caption", str(tiny_checkpoint), str(tmp_path), "--beams", "1"], color=True)
    assert result.exit_code == 1, result.output
    shown = [line.partition("\t")[0].removeprefix(f"{tmp_path}/") for line in result.stdout.splitlines()]
    assert sorted(shown) == sorted(
        ["new\\nline.png", "tab\\there.png", "esc\\x1b[31m.png", "[red]x[].png", "%s{x}.png"]
    )
    assert f"left out, empty: {tmp_path}/bad\\n.png: the file has no bytes" in result.stderr


def test_captions_of_several_lines_stay_on_their_line(monkeypatch, tiny_checkpoint, tmp_path):
    from frozenprefix.inference import Caption, Captioner

    draw_shape("red", "circle").save(tmp_path / "a.png")
    texts = ("two\nlines", "a\ttab", "\x1b[31mred", "carriage\rreturn", "line\u2028separator", "[/b] %s")

    def caption(self, paths, **_):
        return (Caption(path, text) for path in paths for text in texts)

    monkeypatch.setattr(Captioner, "caption", caption)
    result = CliRunner().invoke(app, ["caption", str(tiny_checkpoint), str(tmp_path / "a.png")], color=True)
    assert result.exit_code == 0, result.output
    shown = [line.partition("\t")[2] for line in result.stdout.split("\n") if line]
    assert shown == ["two lines", "a tab", "[31mred", "carriage return", "line separator", "[/b] %s"]


def test_the_home_folder_behind_an_equals_sign(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    draw_shape("red", "circle").save(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["caption", str(tiny_checkpoint), "~/a.png", "--out=~/out.jsonl", "--beams=1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.jsonl").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate"),
        RuntimeError("CUDA out of memory"),
        RuntimeError("can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_is_one_line(monkeypatch, tiny_checkpoint, tmp_path, error):
    from frozenprefix.inference import Captioner

    def caption(*_, **__):
        raise error

    draw_shape("red", "circle").save(tmp_path / "a.png")
    monkeypatch.setattr(Captioner, "caption", caption)
    result = CliRunner().invoke(app, ["caption", str(tiny_checkpoint), str(tmp_path / "a.png")])
    assert result.exit_code == 2
    assert f"Error: out of memory ({error})" in result.stderr


def test_a_full_disk_is_one_line(monkeypatch, tiny_checkpoint, tmp_path):
    draw_shape("red", "circle").save(tmp_path / "a.png")

    def full(*_):
        raise OSError(28, "No space left on device", "out.jsonl")

    monkeypatch.setattr("frozenprefix.utils.caption_files.append_jsonl", full)
    out = str(tmp_path / "out.jsonl")
    result = CliRunner().invoke(app, ["caption", str(tiny_checkpoint), str(tmp_path / "a.png"), "--out", out])
    assert result.exit_code == 2
    assert "Error: 'out.jsonl': No space left on device" in result.stderr


def test_predictions_and_indexes_of_such_names(odd, captioner, colour_embedder, tmp_path):
    from frozenprefix.data.samples import Sample
    from frozenprefix.evaluation import evaluate_samples
    from frozenprefix.inference import open_index

    other = odd.with_name("b.png")
    draw_shape("blue", "square").save(other)
    samples = [Sample(str(path.name), (path,), ("a dog",)) for path in (odd, other)]
    result = evaluate_samples(captioner, samples, predictions=tmp_path / "p.jsonl", num_beams=1, max_new_tokens=2)
    assert result["n"] == 2
    assert json.loads((tmp_path / "p.jsonl").read_bytes().split(b"\n")[0])["images"] == [str(odd)]
    for _ in range(2):
        index = open_index(colour_embedder, [odd, other], tmp_path / "index")
        assert set(index.paths) == {odd, other}
    assert colour_embedder.model.seen == 2, "the index is read again"
