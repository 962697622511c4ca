# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own photos, in an hour
#
# You have photos, and a spreadsheet that says what is on them, in your own words. This notebook goes from there to a
# model that writes such words for new photos: with the commands that you would type, and with a look at what they
# print. Nothing of it needs a GPU.
#
# So that everybody can run it, the "photos" are 600 drawings of one coloured shape (easy-VQA, MIT licence), and the
# spreadsheet says what a collector might want to know: colour, shape, and *where* the shape is. The last is in no
# caption of the data set; it is ours. To use your own, leave out the next two cells and give your folder's name.

# %%
import csv
import html
import json
import os
import re
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from PIL import Image
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

from frozenprefix import Captioner
from frozenprefix.cli.main import app
from frozenprefix.data import load_image, load_source
from frozenprefix.training import read_log

# %%
data_path, count, overrides = "pypi://easy-vqa==1.0/easy_vqa/data", 600, "training.max_steps=160"

if smoke := os.environ.get("FROZENPREFIX_SMOKE"):  # set by the tests: a folder with a tiny model and 60 drawings
    data_path, count = f"{smoke}/easy_vqa", 30
    overrides = (
        f"training.max_steps=2 training.warmup_steps=0 model.language_model.path={smoke}/lm training.precision=fp32 "
        "model.vision_encoder.name=test_efficientnet model.vision_encoder.weights=random"
    )


def frozenprefix(line):
    """Run a command, and show what it prints."""
    print(f"$ frozenprefix {line}")
    result = CliRunner().invoke(app, shlex.split(line))
    if result.exit_code:
        raise RuntimeError(result.output)
    print(result.stdout)


# %% [markdown]
# ## Photos and a spreadsheet
#
# Names as a camera gives them, and a table as a spreadsheet program exports it in half of the world: with semicolons.


# %%
def place(image):
    """Where the shape of a drawing is, by its pixels."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1) > 60)
    middle = len(pixels) / 2
    return f"{'top' if rows.mean() < middle else 'bottom'} {'left' if columns.mean() < middle else 'right'}"


def write_photos(folder, split, count):
    """Save drawings as photos, and their captions as a table; returns the captions by file name."""
    Path(folder).mkdir(exist_ok=True)
    source = {"type": "easy_vqa", "path": data_path, "split": split, "captions": True, "questions": False}
    texts = {}
    for number, sample in enumerate(load_source({**source, "limit": count})):
        image = load_image(sample.images[0])
        image.save(f"{folder}/IMG_{number:04}.png")
        texts[f"IMG_{number:04}.png"] = f"{sample.targets[0]}, {place(image)}"
    return texts


texts = write_photos("photos", "train", count)
with open("photos/my photos.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file, delimiter=";")
    table.writerow(["Photo", "What you see"])
    table.writerows((Path(name).stem, text) for name, text in texts.items())

figure, axes = plt.subplots(1, 5, figsize=(11, 2.4))
for axis, (name, text) in zip(axes, texts.items(), strict=False):
    axis.imshow(load_image(f"photos/{name}"), interpolation="nearest")
    axis.set_title(f"{name}\n{text}", fontsize=8)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A recipe
#
# `new` looks at the folder, finds the table and its columns, keeps some photos for validation, and writes a recipe.
# (Without `--no-plan` it also measures how long training will take on this machine.)

# %%
frozenprefix("new photos --no-plan --force")
print(
    re.sub(r"path: \"[^\"]*photos\"", 'path: "photos"', Path("photos.yaml").read_text(encoding="utf-8")).split(
        "\n\n", 1
    )[1]
)

# %% [markdown]
# ## Training
#
# The recipe asks for more steps; a few minutes are enough here. Change what you like on the command line, key by key.

# %%
frozenprefix(f"train photos.yaml {overrides}")

# %% [markdown]
# ## Does it see?
#
# A loss that falls says that the model learns how your captions sound. Whether it looks at the photos is another
# question: the log has the loss with the photos of *other* captions beside it. The gap between the two is what the
# photos are worth.


# %%
def losses(run):
    """Steps, validation losses, and validation losses with other photos."""
    lines = [line for line in read_log(run) if "validation/loss" in line]
    return tuple([line[key] for line in lines] for key in ("step", "validation/loss", "validation/shuffled_loss"))


steps, own, other = losses("runs/photos")
plt.figure(figsize=(6, 3))
plt.plot(steps, own, "o-", label="its own photo")
plt.plot(steps, other, "o--", label="another photo")
plt.xlabel("step")
plt.ylabel("validation loss per token")
plt.legend()
plt.show()

# %% [markdown]
# ## New photos
#
# Drawings that were not trained on, in another folder. The captions go into a table.

# %%
truth = write_photos("new_photos", "test", 20 if smoke else 60)
frozenprefix("caption runs/photos/best new_photos --beams 1 --max-new-tokens 16 --out captions.jsonl")


def read_captions(path):
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {Path(line["image"]).name: line["caption"].strip() for line in lines}


captions = read_captions("captions.jsonl")
figure, axes = plt.subplots(2, 4, figsize=(10, 5))
for axis, (name, text) in zip(axes.flat, captions.items(), strict=False):
    axis.imshow(load_image(f"new_photos/{name}"), interpolation="nearest")
    axis.set_title(text[:40], fontsize=9, color="tab:blue" if text == truth[name] else "tab:red")
    axis.axis("off")
plt.show()

# %% [markdown]
# Read captions, not only scores, and read them **by part**. Chance would be right in about an eighth of the colours,
# a third of the shapes, a quarter of the places.


# %%
def parts(text):
    """'a blue circle, top left' -> colour, shape and place."""
    words = [*re.findall(r"\w+", text), "", "", "", "", ""]
    return words[1], words[2], f"{words[3]} {words[4]}"


def right_by_part(captions):
    pairs = [(parts(captions[name]), parts(text)) for name, text in truth.items()]
    return {
        part: round(sum(said[n] == meant[n] for said, meant in pairs) / len(pairs), 2)
        for n, part in enumerate(("colour", "shape", "place"))
    }


pooled = right_by_part(captions)
print(pooled)

# %% [markdown]
# ## Mend it
#
# The recipe of `new` pools the encoder's features: one vector for the whole photo, the mean over all places. That is
# fast, and right for *what*; it is nearly blind for *where*. So keep the features of all places (`output: patch`) and
# let the mapper read them one after the other (`tokens: flatten`). Two keys change; the rest of the run is the same.

# %%
changes = "model.vision_encoder.output=patch model.mapper.tokens=flatten model.vision_encoder.image_size=128"
frozenprefix(f"train photos.yaml {overrides} {changes} output_dir=runs/places")
frozenprefix("caption runs/places/best new_photos --beams 1 --max-new-tokens 16 --out captions_places.jsonl")
patches = right_by_part(read_captions("captions_places.jsonl"))

figure, axis = plt.subplots(figsize=(6, 3))
for shift, (label, scores) in ((-0.2, ("pooled", pooled)), (0.2, ("patches", patches))):
    axis.bar([number + shift for number in range(3)], list(scores.values()), 0.4, label=label)
axis.set_xticks(range(3), list(pooled))
axis.set_ylabel("right, of new drawings")
axis.set_ylim(0, 1)
axis.legend()
plt.show()

# %% [markdown]
# The places are found now, and the colours are worse: the mapper reads sixteen vectors in place of their mean, has
# sixteen times as many weights in its first layer, and 540 drawings and 160 steps have to teach it all. Nothing is
# free; what to give up follows from what your captions are for.
#
# ## And a photo?
#
# The model has seen drawings only, and a model recognizes what it was trained on. What it writes about a real photo
# has nothing to do with it, and need not even sound like your captions. (The photo is scikit-learn's sample image of
# a flower, by vultilion on Flickr, CC BY 2.0.)

# %%
flower = Image.fromarray(load_sample_image("flower.jpg"))
captioner = Captioner.from_pretrained("runs/places/best")
flower.save("flower.png")
said = next(captioner.caption(["flower.png"], num_beams=1, max_new_tokens=16)).text
plt.figure(figsize=(4, 3))
plt.imshow(flower)
plt.title(said[:60], fontsize=9)
plt.axis("off")
plt.show()

# %% [markdown]
# ## What next
#
# - More photos help more than more steps: a few hundred give your words, some thousand give good captions.
# - `frozenprefix evaluate runs/photos/best --task caption` gives scores with their baselines, `frozenprefix report` a
#   page.
# - Where the Hugging Face Hub can be reached, take a larger encoder first: the comments of `photos.yaml` name some.

# %%
rows = "".join(
    f"<tr><td>{html.escape(name)}</td><td>{html.escape(truth[name])}</td><td>{html.escape(captions[name])}</td></tr>"
    for name in list(truth)[:6]
)
display(HTML(f"<table><tr><th>photo</th><th>your words</th><th>the first model's</th></tr>{rows}</table>"))

# %%
right_by_part(read_captions("captions_places.jsonl"))
