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
# # What does the prefix say?
#
# A caption that is right proves little: a model may have guessed it from habit. This notebook asks a trained model
# three questions about each word that it writes. Does the word rest on *this image*, or would it have been written
# anyway (**evidence**)? *Where* in the image does it rest (**occlusion**)? And what do the prefix embeddings
# themselves look like to the language model (**nearest words**)?
#
# The images are drawings of one coloured shape (easy-VQA, MIT licence): there one knows what each word should rest
# on.

# %%
import html

import matplotlib.pyplot as plt
import numpy as np
from drawings import smoke, source, train_on_drawings
from IPython.display import HTML, Image, display

from frozenprefix import Captioner
from frozenprefix.data import load_source
from frozenprefix.interpret import Explainer

# %%
checkpoint = train_on_drawings().best  # the recipe is in drawings.py, beside the notebooks, which share this run

# %% [markdown]
# ## One drawing, word by word
#
# `Explainer` takes a model and other images of the same kind to compare with. An explanation belongs to a text: the
# model's own one, or any that you give.

# %%
captioner = Captioner.from_pretrained(checkpoint, precision="fp32")
drawings = load_source({**source, "split": "test", "limit": 12 if smoke else 40})
others = [sample.images[0] for sample in drawings[8:]]
explainer = Explainer(captioner, others=others)
first = drawings[0]
explanation = explainer(first.images[0], first.targets[0])
explanation.plot().savefig("explanation.png", bbox_inches="tight")
display(Image("explanation.png"))

# %% [markdown]
# *Evidence* is log p(word | this image) − mean of log p(word | another image), in nats: +3 says that this image makes
# the word 20 times as likely as others do, 0 that the image has no part in it. "a" stands in every caption, so that
# nothing speaks for it; the colour and the shape should.
#
# *Occlusion* covers a square of the image at a time, and shows where that makes the word less likely. A second heat
# map, of attention, is there for models whose prefix keeps places apart. This one does not, and says so:

# %%
dict(explanation.unavailable)

# %% [markdown]
# ## A wrong caption
#
# Evidence needs no right answer to compare with. Here each drawing is described wrongly in one word, and the question
# is whether the evidence finds it: it should be negative where the text contradicts the image.


# %%
def with_other_word(text, number):
    """The caption with another colour (1) or another shape (2) than the drawing has."""
    words = text.split()
    words[number] = next(
        s.targets[0].split()[number] for s in drawings if s.targets[0].split()[number] != words[number]
    )
    return " ".join(words)


shown = drawings[:6]
lines = []
for sample in shown:
    for number in (1, 2):
        wrong = with_other_word(sample.targets[0], number)
        words = explainer(sample.images[0], wrong, heat_maps=False).words
        lines.append((sample.targets[0], number, words))


def coloured(words):
    """Words on green for evidence, on red for counter-evidence."""
    spans = []
    for word in words:
        value = word.evidence or 0.0
        shade = f"rgba({'0,140,0' if value > 0 else '200,0,0'},{min(abs(value) / 6, 0.7):.2f})"
        spans.append(
            f'<span style="background:{shade};padding:2px">{html.escape(word.text)} <small>{value:+.1f}</small></span>'
        )
    return " ".join(spans)


display(
    HTML(
        "<table><tr><th>the drawing</th><th>a wrong text, and the evidence of its words</th></tr>"
        + "".join(f"<tr><td>{html.escape(right)}</td><td>{coloured(words)}</td></tr>" for right, _, words in lines)
        + "</table>"
    )
)
found = [min(range(len(words)), key=lambda n: words[n].evidence or 0.0) == number for _, number, words in lines]
print(f"the wrong word has the lowest evidence in {sum(found)} of {len(found)} texts")

# %% [markdown]
# Where it is not the lowest, look at the values: a colour may be wrong in the text and in most other drawings too,
# and then nothing speaks against it in particular.
#
# ## By kind of word
#
# Over all drawings, for their true captions: what does the image contribute to each word, and how sure is the model?

# %%
evidence = {"a": [], "colour": [], "shape": []}
for sample in drawings[:8]:
    words = explainer(sample.images[0], sample.targets[0], heat_maps=False).words
    for kind, word in zip(evidence, words, strict=False):
        evidence[kind].append(word.evidence or 0.0)

plt.figure(figsize=(6, 3))
plt.boxplot(list(evidence.values()), tick_labels=list(evidence))
plt.axhline(0, color="grey", linewidth=0.5)
plt.ylabel("evidence, nats")
plt.show()

# %% [markdown]
# ## Where?
#
# Occlusion for the shape's word, on four drawings. A bright square is one without which the word becomes less likely.
# The maps are coarse, because the squares that are covered are a quarter of the image wide, and each has its own
# scale: read the number above it before the colours. A map of hundredths of a nat says that no single square matters.

# %%
figure, axes = plt.subplots(2, 4, figsize=(10, 5))
for column, sample in zip(axes.T, drawings[:4], strict=True):
    each = explainer(sample.images[0], sample.targets[0])
    column[0].imshow(each.image, interpolation="nearest")
    column[0].set_title(sample.targets[0], fontsize=9)
    column[1].imshow(np.clip(each.occlusion[-1], 0, None), cmap="inferno", vmin=0)
    column[1].set_title(f"up to {each.occlusion[-1].max():.2f} nats", fontsize=9)
    for axis in column:
        axis.axis("off")
plt.show()

# %% [markdown]
# ## The prefix in words
#
# The prefix embeddings lie in the space of the word embeddings. *By cosine* is the word that lies nearest to each;
# *by the head* is what the language model would write after it has read the image up to there. A prefix need not be
# made of words to be understood: the cosines are small, and the words hardly differ between drawings.

# %%
rows = "".join(
    f"<tr><td>{number}</td>"
    + "".join(
        "<td>" + ", ".join(f"{html.escape(repr(word))} {value:.2f}" for word, value in near) + "</td>"
        for near in (position.by_cosine[:1], position.by_head[:3])
    )
    + "</tr>"
    for number, position in enumerate(explanation.prefix, start=1)
)
display(HTML(f"<table><tr><th>position</th><th>by cosine</th><th>by the head</th></tr>{rows}</table>"))

# %% [markdown]
# `frozenprefix explain CHECKPOINT IMAGE --out page.html` makes a page of all this.

# %%
sum(found) / len(found)
