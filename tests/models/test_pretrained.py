"""Folders of models that are not whole: each is one line that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.contrastive.configuration import TextTowerConfig
from frozenprefix.models.contrastive.text_tower import build_text_tower
from frozenprefix.models.language_model import load_language_model, load_tokenizer, wrap_language_model
from frozenprefix.models.language_model.loading import resolve_language_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 535000000\n"
LM = "model.language_model.path"


@pytest.fixture
def folder(tiny_lm, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_lm("llama"), tmp_path / "lm"))


def load(folder: Path | str):
    """What a run does first, in this order."""
    config = LanguageModelConfig(path=str(folder))
    return load_tokenizer(config), load_language_model(config)[0]


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split_weights(folder: Path) -> tuple[str, str]:
    """Two shards and their index in place of one file; the names of the shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    places = {key: names[number % 2] for number, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key] for key in tensors if places[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


# ── files that are missing, damaged or pointers ──


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
)
def test_git_lfs_pointers(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(AssetError, match=rf"^{LM}: '.*{name}' is a Git LFS pointer .*run `git lfs pull` in '.*lm'"):
        load(folder)


def test_pointers_in_place_of_shards_and_of_pickles(folder):
    first, _ = split_weights(folder)
    (folder / first).write_text(POINTER)
    with pytest.raises(AssetError, match=f"{first}' is a Git LFS pointer"):
        load(folder)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(AssetError, match=r"pytorch_model\.bin' is a Git LFS pointer"):
        load(folder)


def test_a_pointer_beside_the_weights_that_are_read_does_not_matter(folder):
    (folder / "pytorch_model.bin").write_text(POINTER)
    load(folder)


def test_shards_that_the_index_names(folder):
    first, second = split_weights(folder)
    load(folder)
    (folder / second).unlink()
    with pytest.raises(AssetError, match=rf"index\.json' names 1 of 2 files that are not there \({second}\)"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(AssetError, match=r"index\.json' is damaged"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(AssetError, match="holds 1 parts of weights without"):
        load(folder)
    (folder / first).unlink()
    with pytest.raises(AssetError, match="holds no weights"):
        load(folder)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_weights_cut_short(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(AssetError, match=r"model\.safetensors' \(\d+ bytes\) is damaged or cut short"):
        load(folder)


def without(*parts: str) -> Callable[[dict], object]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if any(part in key for part in parts)]


def renamed(tensors: dict) -> None:
    for key in list(tensors):
        tensors[f"module.{key}"] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.mlp"), r"lacks 3 weights of its model \(model\.layers\.1\.mlp\.down_proj\.weight, .*\)"),
        (without("model.norm"), r"lacks 1 weights of its model \(model\.norm\.weight\)"),
        (without("embed_tokens"), "lacks 2 weights of its model"),
        (renamed, r"lacks 21 weights of its model .*…\); fetch it again, or check config\.json"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}),
            r"has other shapes than its config for 1 weights of its model \(model\.norm\.weight\)",
        ),
    ],
)
def test_weights_are_never_filled_with_random_numbers(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(AssetError, match=message):
        load(folder)


def test_a_config_with_more_layers_than_the_weights(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(AssetError, match="lacks 9 weights"):
        load(folder)


def test_weights_without_a_place_are_counted(folder, caplog):
    edit_config(folder, num_hidden_layers=1)
    load(folder)
    assert "lm: 9 of 20 weights are left out: not in the model 9 (model.layers.1.input_layer" in caplog.text


def test_weights_that_are_not_numbers(folder):
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ConfigError, match="its logits are not finite; its weights are damaged"):
        wrap_language_model(load(folder)[1])


def test_weights_in_the_format_of_torch_are_part_of_the_identity(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    hashes = []
    for factor in (1, 2):
        torch.save({key: factor * value for key, value in tensors.items()}, folder / "pytorch_model.bin")
        hashes.append(load_language_model(LanguageModelConfig(path=str(folder)))[1]["sha256"])
    assert hashes[0] != hashes[1]


# ── folders of something else ──


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json' is not JSON"),
        ("[]", r"config\.json' names no model_type"),
        ('{"model_type": 5}', r"config\.json' names no model_type"),
        ('{"model_type": "vit"}', "holds a model of type 'vit', expected a causal or encoder-decoder language model"),
        ('{"model_type": "clip"}', "holds a model of type 'clip', expected a causal"),
        ('{"model_type": "megallama9"}', "cannot be read as a model of transformers .*megallama9.*; give another"),
        ('{"model_type": "llama", "hidden_size": "many"}', "cannot be read .*'hidden_size': TypeError: .*got str"),
        ('{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}', "32.* is not a multiple of .*5"),
    ],
)
def test_configs_of_something_else(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(AssetError, match=f"^{LM}: .*{message}"):
        load(folder)


def test_code_in_the_folder_is_neither_run_nor_asked_about(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked"))
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    (folder / "mine.py").write_text("raise SystemExit('the code is run')")
    with pytest.raises(AssetError, match="contains custom code"):
        load(folder)


def test_folders_without_a_config(tmp_path, folder):
    def message_of(path: Path) -> str:
        with pytest.raises(AssetError) as caught:
            load(path)
        return str(caught.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "'" + str(empty) + "' is an empty folder; expected config.json" in message_of(empty)
    assert f"holds no config.json (did you mean '{folder}'?)" in message_of(tmp_path)
    (empty / "adapter_config.json").write_text("{}")
    assert "holds an adapter of peft and no config.json; give the folder of its base model" in message_of(empty)
    (empty / "model-q4.gguf").write_text("GGUF")
    assert f"give the GGUF file itself, '{empty / 'model-q4.gguf'}'" in message_of(empty)


def test_files_and_paths_that_are_no_folders(folder, tmp_path):
    with pytest.raises(ConfigError, match=rf"{LM}: got the file '.*\.safetensors', expected a folder.*give the folder"):
        load(folder / "model.safetensors")
    with pytest.raises(AssetError, match=rf"{LM}: '.*l' does not exist \(did you mean 'lm'\?\)"):
        load(tmp_path / "l")
    with pytest.raises(AssetError, match=f"{LM}: '../nowhere/lm' does not exist"):
        load("../nowhere/lm")
    with pytest.raises(AssetError, match=f"^{LM}: .*none.gguf"):
        load(tmp_path / "none.gguf")


def test_the_hub_is_off():
    with pytest.raises(AssetError, match=rf"^{LM}: 'owner/some-lm' is no local folder, and the Hub, which is off"):
        load("owner/some-lm")


def test_the_hub_does_not_have_it(monkeypatch):
    monkeypatch.setattr("frozenprefix.models.pretrained.HF_HUB_OFFLINE", False)
    with pytest.raises(AssetError, match=f"^{LM}: 'owner/some-lm' is neither a local folder nor .* that the Hub gives"):
        load("owner/some-lm")


# ── tokenizers ──


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(AssetError, match=r"lm' holds no tokenizer; expected tokenizer\.json"):
        load(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(AssetError, match="lm' holds no tokenizer"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]")]
)
def test_a_damaged_tokenizer(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(AssetError, match=f"^{LM}: '.*lm' cannot be read as a tokenizer"):
        load(folder)


def test_a_tokenizer_larger_than_the_embeddings(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<w{number}>" for number in range(7)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        AssetError, match=r"has a tokenizer with 7 tokens beyond the 300 embeddings .*first 300, '<w0>'"
    ):
        load(folder)


def test_special_tokens_beyond_the_embeddings_that_a_template_writes(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    load(folder)  # no text yields it
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(AssetError, match=r"1 tokens beyond the 300 embeddings .*'<\|im_start\|>'"):
        load(folder)


def test_an_end_token_beyond_the_embeddings(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(AssetError, match=r"1 tokens beyond the 300 embeddings"):
        load(folder)


# ── the other models of transformers ──


def test_a_text_tower_that_is_not_whole(tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "bert"))
    config = TextTowerConfig(path=str(folder), max_tokens=16)
    edit_weights(folder, without("layer.1.output.dense"))
    with pytest.raises(AssetError, match=r"^text_tower\.path: '.*bert' lacks 2 weights of its model"):
        build_text_tower(config)
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(AssetError, match=r"^text_tower\.path: .* is a Git LFS pointer"):
        build_text_tower(config)


def test_a_moved_language_model_is_checked_as_well(folder, tiny_checkpoint):
    from frozenprefix.inference import Captioner

    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(AssetError, match="is a Git LFS pointer"):
        Captioner.from_pretrained(tiny_checkpoint, language_model=folder)


def test_a_whole_folder_is_read(folder):
    assert resolve_language_model(LanguageModelConfig(path=str(folder))).identity["path"] == "lm"
