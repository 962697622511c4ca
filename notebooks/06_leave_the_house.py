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
# # Leave the house
#
# A checkpoint holds the mapper, and names the frozen parts. This notebook takes one to three places where this
# package is not needed, or does half of the work: a **transformers pipeline** in a folder that holds everything,
# **llama.cpp** as the engine of the language model, and a **server** with OpenAI's interface. In each place the same
# image gets the same text, and a cell checks it.
#
# Needed: `pip install 'frozenprefix[llamacpp,serve]'`. The model is trained first, on drawings of one coloured shape
# (easy-VQA, MIT licence); this takes two minutes on two idle cores.

# %%
import base64
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import openai
from drawings import source, train_on_drawings
from transformers import AutoProcessor

from frozenprefix import Captioner, FrozenPrefixForConditionalGeneration
from frozenprefix.data import load_image, load_source
from frozenprefix.export import Source, export_gguf
from frozenprefix.inference.llama_cpp import LlamaCppCaptioner

# %%
checkpoint = train_on_drawings().best  # the recipe is in drawings.py, beside the notebooks, which share this run

# %% [markdown]
# ## At home
#
# Six drawings that the model was not trained on, and its captions here: the truth that the other places have to
# repeat. Captions are greedy and in float32, so that there is one right text.

# %%
paths = [sample.images[0] for sample in load_source({**source, "split": "test", "limit": 6})]
captioner = Captioner.from_pretrained(checkpoint, precision="fp32")
here = [caption.text.strip() for caption in captioner.caption(paths, num_beams=1, max_new_tokens=8)]

figure, axes = plt.subplots(1, len(paths), figsize=(11, 2.2))
for axis, path, text in zip(axes, paths, here, strict=True):
    axis.imshow(load_image(path), interpolation="nearest")
    axis.set_title(text[:40], fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A folder that needs nothing else
#
# `self_contained=True` also writes the image encoder and the language model, and one file of code. transformers loads
# the folder with `trust_remote_code=True` where this package is not installed. What was tens of megabytes becomes
# hundreds.

# %%
folder = Path("runs/leave/self_contained")
model = FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)
model.save_pretrained(folder, self_contained=True)
processor = AutoProcessor.from_pretrained(checkpoint)
# the prompt of the training, whatever a message says: this model knows no other
processor.chat_template = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
) + processor.prompts["caption"].replace("<image>", "")
processor.save_pretrained(folder)


def megabytes(place):
    return round(sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file()) / 1e6, 1)


{"checkpoint, MB": megabytes(checkpoint), "folder, MB": megabytes(folder)}

# %% [markdown]
# A process in which importing this package fails writes the captions:

# %%
alone = """
import json, sys
sys.modules["frozenprefix"] = None  # not installed
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
texts = []
for path in sys.argv[2:]:
    chat = [{"role": "user", "content": [{"type": "image", "path": path}]}]
    options = {"max_new_tokens": 8, "do_sample": False}
    texts += [pipe(text=chat, generate_kwargs=options, return_full_text=False)[0]["generated_text"].strip()]
print(json.dumps(texts))
"""
command = [sys.executable, "-c", alone, str(folder), *map(str, paths)]
offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
done = subprocess.run(command, capture_output=True, text=True, env=offline)
if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
there = json.loads(done.stdout.splitlines()[-1])
print("the same captions:", there == here, there)

# %% [markdown]
# ## llama.cpp
#
# llama.cpp runs language models from GGUF files on almost anything. Encoder and mapper run here, and only the prefix
# goes over; there is no torch language model in memory. `export gguf` writes the language model, in the weights that
# the mapper was trained for. (`export gguf` with the encoder, for llama.cpp alone, needs a vision transformer and a
# certain form of mapper: see the page about other engines.)

# %%
gguf = Path("runs/leave/gguf")
if not gguf.exists():
    export_gguf(Source.load(checkpoint), gguf, only_language_model=True)
llama = LlamaCppCaptioner.from_pretrained(checkpoint, language_model=gguf / "language_model.gguf")
seconds = {}
for name, engine in {"torch, fp32": captioner, "llama.cpp": llama}.items():
    start = time.perf_counter()
    texts = [caption.text.strip() for caption in engine.caption(paths, num_beams=1, max_new_tokens=8)]
    seconds[name] = round((time.perf_counter() - start) / len(paths), 2)
print("the same captions:", texts == here, "seconds per image:", seconds)

# %% [markdown]
# ## A server
#
# `transformers serve` answers with OpenAI's interface. It listens on this machine only; leave it so, because it opens
# every path and address that a request names.

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
serve = "from transformers.cli.transformers import main; main()"
options = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code"]
with open("runs/leave/serve.log", "w") as log:
    server = subprocess.Popen([sys.executable, "-c", serve, *options], stdout=log, stderr=log, env=offline)
for _ in range(600):
    if server.poll() is not None:
        raise RuntimeError(Path("runs/leave/serve.log").read_text())
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        break
    except OSError:
        time.sleep(0.5)


# %%
def ask(path):
    """What the server says about an image."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages = [{"role": "user", "content": [image]}]
    reply = client.chat.completions.create(model=str(folder), messages=messages, max_tokens=8, temperature=0)
    return reply.choices[0].message.content.strip()


client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=3)
try:
    served = [ask(path) for path in paths]
finally:
    server.terminate()
    server.wait(timeout=30)
print("the same captions:", served == here)

# %% [markdown]
# ## Where to go
#
# | you have | take |
# |---|---|
# | Python with transformers | the folder, and `pipeline` |
# | a laptop, a phone, no torch for the language model | llama.cpp |
# | programs that speak OpenAI's interface | `transformers serve` |
# | vLLM | `frozenprefix export embeds`, which writes its requests |
# | people on the Hub | `frozenprefix card`, then `hf upload` |

# %%
columns = {"here": here, "pipeline": there, "llama.cpp": texts, "server": served}
figure, axis = plt.subplots(figsize=(9, 2.6))
axis.axis("off")
cells = [[text[:24] for text in row] for row in zip(*columns.values(), strict=True)]
axis.table(cells, colLabels=list(columns), rowLabels=[f"drawing {n + 1}" for n in range(len(paths))], loc="center")
plt.show()

# %%
{name: sum(a == b for a, b in zip(column, here, strict=True)) for name, column in columns.items()}
