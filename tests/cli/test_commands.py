"""The command line: help, errors and exit codes, and what each command hands to the functions behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import frozenprefix
from frozenprefix.cli.main import app
from frozenprefix.errors import CheckpointError, ConfigError, TrainingError
from frozenprefix.training import registry
from tests.config.test_recipe import SHORT
from tests.helpers import ROOT
from tests.test_import import best_of

COMMAND = str(Path(sys.executable).with_name("frozenprefix"))


def call(*arguments, code: int = 0, **env):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "short.yaml"
    path.write_text(SHORT)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with b.png, a.jpg, deep/c.png and a text file."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.jpg", "deep/c.png"]):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


# ── help, version, errors ──


def test_help_is_quick():
    """At most 0.7 s: 0.4 s on an idle machine, hardly more than the library that draws it; torch alone takes 2 s."""
    drawing = best_of(3, [sys.executable, "-c", "import typer.rich_utils"])
    assert best_of(3, [COMMAND, "--help"]) < max(0.7, 2.5 * drawing)


@pytest.mark.parametrize("command", ["train", "caption", "ask", "evaluate", "data", "data check"])
def test_every_command_has_help(command):
    assert "Usage:" in call(*command.split(), "--help").output


def test_help_lists_the_commands():
    output = call("-h").output
    assert all(command in output for command in ["train", "caption", "ask", "evaluate", "data"])


def test_version():
    assert call("--version").output == f"frozenprefix {frozenprefix.__version__}\n"


def test_an_unknown_command_is_an_error():
    assert "No such command" in call("trian", code=2).stderr


def test_an_own_error_is_one_message(recipe):
    missing = recipe.with_name("shrt.yaml")
    result = call("train", missing, code=2)
    assert result.stderr == (
        f"Error: recipe: got '{missing}', expected a YAML file that exists (did you mean 'short.yaml'?)\n"
    )
    assert result.stdout == ""


def test_several_problems_are_listed(recipe):
    result = call("train", recipe, "training.epochs=0", "seed=-1", code=2)
    assert result.stderr == (
        "Error: 2 problems\n"
        "  seed: got -1, expected at least 0\n"
        "  training.epochs: got 0, expected at least 1\n"
    )  # fmt: skip


def test_debug_shows_the_traceback(recipe):
    with pytest.raises(ConfigError):
        call("train", recipe.with_name("no.yaml"), FROZENPREFIX_DEBUG="1")


def test_other_errors_keep_their_traceback(recipe, monkeypatch):
    monkeypatch.setattr(registry, "train_recipe", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("train", recipe)


def test_errors_in_a_real_process_have_no_traceback_and_no_colour_codes(tmp_path, ckpt):
    command = [COMMAND, "ask", ckpt, "no.jpg", "why?"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "Error: IMAGE: got 'no.jpg', expected an image file that exists\n"


# ── train ──


@pytest.fixture
def trained(monkeypatch):
    """Calls of `train`, which is not run."""
    from frozenprefix.training.trainer import TrainingResult

    calls = []

    def train(recipe, *, resume="auto"):
        calls.append((recipe, resume))
        return TrainingResult(recipe.output_dir, recipe.output_dir / "best", 30, 360, 61.4, 2.5)

    monkeypatch.setattr(registry, "train_recipe", train)
    return calls


def test_train(recipe, trained):
    output = call("train", recipe, "training.learning_rate=1e-4", "name=b", "--resume", "never").stdout
    ((seen, resume),) = trained
    assert (seen.training.learning_rate, seen.name, resume) == (1e-4, "b", "never")
    assert "\n30 steps, 360 targets in 61 s\nbest checkpoint: runs/b/best, validation loss 2.5000\n" in output
    assert "next:\n  frozenprefix caption runs/b/best IMAGE...\n" in output
    assert output.endswith("  frozenprefix demo runs/b/best\n  frozenprefix report runs/b\n")


def test_train_resumes_unless_told_otherwise(recipe, trained):
    call("train", recipe)
    assert trained[0][1] == "auto"


def test_other_processes_say_nothing(recipe, trained):
    assert call("train", recipe, RANK="1").stdout == ""


def test_training_errors(recipe, monkeypatch):
    def fail(*_, **__):
        raise TrainingError("loss: got nan at step 3")

    monkeypatch.setattr(registry, "train_recipe", fail)
    assert call("train", recipe, code=2).stderr == "Error: loss: got nan at step 3\n"


def test_script_for_accelerate_is_the_same_command():
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Train the mapper of a recipe." in done.stdout
    assert "--resume" in done.stdout


# ── caption, ask ──


@pytest.fixture
def ckpt(tmp_path):
    """A folder that is a checkpoint by its config."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "frozenprefix"}')
    return folder


@pytest.fixture
def captioner(monkeypatch):
    """Calls of the captioner, which writes the image's name."""
    import frozenprefix.inference as inference

    calls = []

    class Fake:
        def __init__(self, checkpoint, language_model, precision, ensemble=()):
            if language_model is not None:
                calls.append({"language_model": language_model, "precision": precision})
            if Path(checkpoint).name == "broken":
                raise CheckpointError("broken: no model.safetensors")

        def caption(self, paths, *, bad, **options):
            calls.append(options)
            for path in paths:
                yield inference.Caption(path, f"a {path.stem}", -0.5)

        def answer(self, image, question):
            return f"{question} {image.stem}"

    monkeypatch.setattr(inference.Captioner, "from_pretrained", staticmethod(Fake))
    return calls


def test_caption_files_and_folders(images, captioner, ckpt):
    output = call("caption", ckpt, images / "deep", images, "--beams", 2, "--prompt", "A photo of").stdout
    names = [images / "deep" / "c.png", images / "a.jpg", images / "b.png"]
    assert output == "".join(f"{name}\ta {name.stem}\n" for name in names)
    assert captioner == [{"prompt": "A photo of", "num_beams": 2, "max_new_tokens": 30}]


def test_caption_with_a_language_model_that_moved(images, captioner, ckpt):
    call("caption", ckpt, images / "a.jpg", "--language-model", "elsewhere", "--precision", "bf16")
    assert captioner[0] == {"language_model": "elsewhere", "precision": "bf16"}


def test_caption_to_a_file(images, captioner, ckpt, tmp_path):
    out = tmp_path / "new" / "captions.jsonl"
    result = call("caption", ckpt, images / "a.jpg", "--out", out)
    assert json.loads(out.read_text()) == {"image": str(images / "a.jpg"), "caption": "a a", "score": -0.5}
    assert (result.stdout, result.stderr) == ("", f"1 captions in {out}\n")


@pytest.mark.parametrize("arguments", [["--format", "csv"], []])
def test_caption_to_a_table(images, captioner, ckpt, tmp_path, arguments):
    out = tmp_path / "captions.csv"
    call("caption", ckpt, images / "a.jpg", "--out", out, *arguments)
    assert out.read_text("utf-8-sig") == f"image,caption,score\n{images / 'a.jpg'},a a,-0.5\n"


def test_caption_to_text_files_and_metadata(images, captioner, ckpt, tmp_path):
    result = call("caption", ckpt, images / "a.jpg", "--format", "txt", "--write-metadata", tmp_path / "copies")
    assert (images / "a.txt").read_text() == "a a\n"
    assert (tmp_path / "copies" / "a.jpg").is_file()
    assert result.stdout == ""
    assert "1 captions in .txt files beside the images\n1 descriptions in " in result.stderr
    call("caption", ckpt, images / "a.jpg", "--format", "txt", code=2)
    assert "--format csv: needs a file" in call("caption", ckpt, images / "a.jpg", "--format", "csv", code=2).stderr
    assert "\ta a\n" in call("caption", ckpt, images / "a.jpg", "--write-metadata", "sidecar").stdout


def test_a_broken_image_is_skipped_and_said(images, tiny_checkpoint):
    (images / "b.png").write_bytes(b"no image")
    result = call("caption", tiny_checkpoint, images, code=1)
    names = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert names == [str(images / "a.jpg"), str(images / "deep/c.png")]
    assert "left out, not_an_image: " in result.stderr
    assert "b.png" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt", "no.jpg", "none"], "Error: PATH: got no.jpg, none, which do not exist"),
        (["ckpt", "empty"], "got no image, expected files ending in"),
        (["broken", "a.png"], "Error: broken: no model.safetensors"),
    ],
)
def test_caption_errors(tmp_path, monkeypatch, captioner, ckpt, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if arguments[0] == "broken":
        ckpt.rename(tmp_path / "broken")
        Image.new("RGB", (20, 20)).save("a.png")
    assert message in call("caption", *arguments, code=2).stderr


@pytest.mark.parametrize("arguments", [["--beams", 0], ["--max-new-tokens", 0], ["--beams", "x"]])
def test_caption_options_are_checked(images, captioner, ckpt, arguments):
    call("caption", ckpt, images, *arguments, code=2)
    assert captioner == []


def test_ask(images, captioner, ckpt):
    assert call("ask", ckpt, images / "a.jpg", "what is it?").stdout == "what is it? a\n"


# ── evaluate ──


def test_evaluate(monkeypatch, ckpt, tmp_path):
    import frozenprefix.evaluation as evaluation

    calls = []
    result = {
        "metrics": {"CIDEr": 0.4567, "distinct": 12},
        "baselines": {"blind": {"CIDEr": 0.01}, "shuffled": {"CIDEr": 0.05, "distinct": 12}},
        "n": 20,
    }

    def evaluate(checkpoint, *, progress, **options):
        progress(1, 2)
        calls.append((checkpoint, options))
        return result

    monkeypatch.setattr(evaluation, "evaluate_checkpoint", evaluate)
    out = tmp_path / "result.json"
    arguments = ["--task", "caption", "--data", "photos", "--split", "val", "--limit", 20, "--out", out]
    lines = call("evaluate", ckpt, *arguments).stdout.splitlines()
    wanted = {"task": "caption", "data": "photos", "split": "val", "limit": 20, "num_beams": None}
    wanted |= {"predictions": None, "restart": False, "force": False, "language_model": None, "precision": "auto"}
    assert calls == [(str(ckpt), wanted)]
    assert json.loads(out.read_text()) == result
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    assert lines[0].strip() == "n = 20"
    assert ["metric", "model", "blind", "shuffled"] in cells
    assert ["CIDEr", "0.4567", "0.0100", "0.0500"] in cells
    assert ["distinct", "12", "", "12"] in cells


def test_evaluate_knows_its_tasks(ckpt):
    assert "'vqa'" in call("evaluate", ckpt, "--task", "vqq", "--data", "x", code=2).stderr


# ── data check ──


def test_data_check_of_a_clean_folder(images, tmp_path):
    out = tmp_path / "report.json"
    output = call("data", "check", images, "--out", out).stdout
    assert "images: 3\n" in output
    assert "bad images: none\n" in output
    assert json.loads(out.read_text())["images"] == 3


def test_data_check_finds_broken_images_and_leaks(images):
    (images / "bad.png").write_bytes(b"no image")
    rows = [("a.jpg", "train"), ("a.jpg", "val"), ("b.png", "train"), ("bad.png", "val")]
    lines = [json.dumps({"image": name, "captions": ["a cat"], "split": split}) for name, split in rows]
    (images / "captions.jsonl").write_text("\n".join(lines))
    output = call("data", "check", images, code=1).stdout
    assert "samples: 4\n" in output
    assert "bad images: not_an_image 1\n" in output
    assert "images in two splits: 1\n" in output
    assert f"  in two splits: {images / 'a.jpg'} (train) and {images / 'a.jpg'} (val)\n" in output


def test_data_check_of_nothing(tmp_path):
    assert call("data", "check", tmp_path / "no", code=2).stderr.startswith("Error: ")


def test_data_check_of_questions(images):
    row = {"image": "a.jpg", "question": "what is it?", "answer": "a cat"}
    (images / "qa.jsonl").write_text(json.dumps(row))
    assert "images: 1\n" in call("data", "check", images).stdout


def test_no_command_leaves_heavy_imports_to_help():
    code = (
        "import sys; sys.argv[0] = 'frozenprefix'; import frozenprefix.cli.main\n"
        "print({'torch', 'transformers', 'pydantic', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "set()\n"
