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
# # Which method?
#
# Between an image encoder and a language model there may be a linear layer, an MLP, a transformer, cross-attention in
# every layer, LoRA on top, … Each has its paper, and each paper its own data. `benchmarks/methods.py` trains them all
# on the same photos, with the same frozen parts, for the same short time. This notebook reads its table, and then
# trains three methods on drawings, so that you can do the same on your own images.

# %%
import html
import re
from pathlib import Path

import matplotlib.pyplot as plt
from drawings import encoder, lm_path, smoke, source
from IPython.display import HTML, display

import frozenprefix
from frozenprefix import Captioner, recipe_from_dict, train
from frozenprefix.data import load_image, load_source
from frozenprefix.training import read_log

# %%
steps = 2 if smoke else 60

# %% [markdown]
# ## The table
#
# One row per method: 3,840 captions of Flickr8k each, with a frozen EfficientNet-Lite0 and a frozen SmolLM2-135M.
# *Loss* and *CIDEr-D* are of photos that were not trained on; *shuffled* is the same model with the photo of another
# caption.

# %%
page = (Path(frozenprefix.__file__).parents[1] / "benchmarks" / "README.md").read_text(encoding="utf-8")
table = re.search(r"<!-- methods:begin -->.*?<!-- methods:end -->", page, flags=re.DOTALL)[0]
rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
methods = []
for name, trained, speed, _memory, loss, shuffled_loss, cider, shuffled, _blind, text in rows[2:]:
    methods.append(
        {
            "name": re.sub(r"\[(.*)\]\(.*\)", r"\1", name),
            "trained": float(trained.removesuffix(" M")),
            "targets/s": float(speed),
            "loss": float(loss),
            "shuffled loss": float(shuffled_loss),
            "CIDEr-D": float(cider),
            "shuffled": float(shuffled),
            "text": text,
        }
    )
len(methods)

# %% [markdown]
# The first question is not which bar is longest, but which is longer than its shadow: what a model says about
# *another* photo. A method whose bars are equal has learned how captions sound, and nothing about the photo.

# %%
ranked = sorted(methods, key=lambda each: each["CIDEr-D"] - each["shuffled"])
figure, axis = plt.subplots(figsize=(8, 5))
places = range(len(ranked))
axis.barh([place + 0.2 for place in places], [each["CIDEr-D"] for each in ranked], 0.4, label="its own photo")
axis.barh([place - 0.2 for place in places], [each["shuffled"] for each in ranked], 0.4, label="another photo")
axis.set_yticks(places, [each["name"] for each in ranked])
axis.set_xlabel("CIDEr-D after 3,840 captions")
axis.legend(loc="lower right")
figure.tight_layout()
plt.show()

# %% [markdown]
# The second question is the price: speed, trained weights, and whether the language model still is what it was.
# Colours show the last: a frozen model has the same logits on text, bit for bit; LoRA and adapters change it.

# %%
figure, axis = plt.subplots(figsize=(8, 5))
for number, each in enumerate(sorted(methods, key=lambda each: each["targets/s"])):
    colour = "tab:blue" if each["text"].startswith("0 ") else "tab:red"
    axis.scatter(each["targets/s"], each["loss"], 12 * each["trained"] + 20, c=colour, alpha=0.5)
    beside = (6, 6) if number % 2 else (6, -14)  # so that labels of neighbours do not meet
    spot = {"xytext": beside, "textcoords": "offset points", "fontsize": 8}
    axis.annotate(each["name"], (each["targets/s"], each["loss"]), **spot)
axis.set_xlabel("targets per second (2 cores)")
axis.set_ylabel("validation loss per token")
axis.set_title("size: trained weights; red: the language model has changed")
axis.set_xlim(18, 56)
figure.tight_layout()
plt.show()

# %% [markdown]
# What to take from it:
#
# - With little data and time, a **pooled feature and an MLP** with about ten prefix tokens. It is fast, and sees
#   first.
# - **LoRA** gives a lower loss for a changed language model: right if the model will only ever caption.
# - **Q-Former, MAPL and ClipCap's transformer** are slow starters. The table says nothing about their end.
# - Low loss with equal bars, as **MAGMA** has here, is the trap: without the second bar it would look like the second
#   best.

# %% [markdown]
# ## Three methods on your own images
#
# Here the images are drawings of one coloured shape (easy-VQA, MIT licence). For your own, change `data`. Each run
# logs the loss on validation images, and the loss with the images shuffled.

# %%
mappers = {
    "linear": {"type": "linear", "prefix_length": 16},
    "mlp": {"type": "mlp", "prefix_length": 4, "hidden_dim": 512, "tokens": "flatten", "input_norm": True},
    "perceiver": {"type": "perceiver", "prefix_length": 4, "num_layers": 2, "num_heads": 4},
}
runs = {}
for name, mapper in mappers.items():
    recipe = recipe_from_dict(
        {
            "name": f"which_method_{name}",
            "model": {
                "vision_encoder": encoder,
                "mapper": mapper,
                "language_model": {"path": lm_path},
            },
            "data": {
                "train": [{**source, "split": "train"}],
                "validation": [{**source, "split": "val"}],
                "prompts": {"caption": "Caption:"},
            },
            "training": {
                "max_steps": steps,
                "images_per_step": 16,
                "learning_rate": 2e-3 if name == "mlp" else 1e-3,
                "warmup_steps": steps // 10,
                "validate_every": max(1, steps // 6),
                "validation_images": 64,
            },
        }
    )
    runs[name] = train(recipe)

# %%
figure, axes = plt.subplots(1, len(runs), figsize=(10, 3), sharey=True)
for axis, (name, result) in zip(axes, runs.items(), strict=True):
    lines = [line for line in read_log(result.output_dir) if "validation/loss" in line]
    seen = [line["step"] for line in lines]
    axis.plot(seen, [line["validation/loss"] for line in lines], label="its own drawing")
    axis.plot(seen, [line["validation/shuffled_loss"] for line in lines], "--", label="another drawing")
    axis.set_title(name)
    axis.set_xlabel("step")
axes[0].set_ylabel("validation loss per token")
axes[0].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# The curves part when a model begins to look: the MLP's after 20 steps. The captions of drawings that no model has
# seen say what was learned until then.

# %%
paths = [sample.images[0] for sample in load_source({**source, "split": "test", "limit": 5})]
captions = {
    name: [
        caption.text for caption in Captioner.from_pretrained(result.best).caption(paths, num_beams=1, max_new_tokens=8)
    ]
    for name, result in runs.items()
}
figure, axes = plt.subplots(1, len(paths), figsize=(10, 2))
for axis, path in zip(axes, paths, strict=True):
    axis.imshow(load_image(path), interpolation="nearest")
    axis.axis("off")
plt.show()
body = "".join(
    f"<tr><th>{name}</th>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>"
    for name, texts in captions.items()
)
display(HTML(f"<table>{body}</table>"))

# %% [markdown]
# Sixty steps are the start of a training, and one seed. Before you choose, train the two best for ten times as long,
# and compare them with `frozenprefix compare A.json B.json`, which says whether a difference is more than chance.

# %%
{name: round(result.best_value, 3) for name, result in runs.items()}
