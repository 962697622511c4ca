"""Files made to harm: none of them hangs, runs code, downloads, or is read whole."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from frozenprefix import Captioner
from frozenprefix.config import read_yaml
from frozenprefix.data.images import BadImages, load_image
from frozenprefix.data.sources import load_source
from frozenprefix.errors import AssetError, BadImageError, CheckpointError, ConfigError, FrozenPrefixError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.language_model import load_language_model, load_tokenizer
from frozenprefix.training.setup import find_unreadable


@pytest.fixture
def nobody_asks(monkeypatch):
    """Fail where a library would ask the user, or start a program."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started a program"))


@pytest.mark.parametrize("kind", ["device", "link to a device", "pipe", "sparse"])
def test_an_image_that_never_ends_is_one_error(tmp_path, kind):
    path = tmp_path / "image.png"
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(20 << 30)
    with pytest.raises(BadImageError) as caught:
        load_image(path)
    assert caught.value.reason == ("too_large" if kind == "sparse" else "unreadable")
    bad = BadImages()
    find_unreadable([path], bad)
    assert len(bad) == 1


HOSTILE_CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_the_code_of_a_language_model_is_never_run(tiny_lm, tmp_path, model_type):
    folder = Path(shutil.copytree(tiny_lm("llama"), tmp_path / "lm"))
    marker = tmp_path / "code was run"
    (folder / "hostile.py").write_text(HOSTILE_CODE.format(marker=str(marker)))
    for name, entries in (
        ("config.json", {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["hostile.Config", None]}),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = entries
        if name == "config.json":
            content["model_type"] = model_type
        (folder / name).write_text(json.dumps(content))
    for load in (load_language_model, load_tokenizer):
        refused = pytest.raises(AssetError) if model_type == "unheard_of" else nullcontext()
        with refused:
            load(LanguageModelConfig(path=str(folder)))
    assert not marker.exists()


@pytest.fixture
def copied(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("part", ["language_model", "vision_encoder"])
def test_a_checkpoint_does_not_make_pip_download(copied, part):
    config = json.loads((copied / "config.json").read_text())
    reference = f"pypi://evil==1.0/weights.safetensors#sha256={'0' * 64}"
    config[part]["path" if part == "language_model" else "weights"] = reference
    config.pop("language_model_location", None)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{part} is 'pypi://evil.*does not make this package download"):
        Captioner.from_pretrained(copied)


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_the_code_of_a_checkpoint_is_never_run(copied, tmp_path, name):
    marker = tmp_path / "code was run"
    (copied / "hostile.py").write_text(HOSTILE_CODE.format(marker=str(marker)))
    content = json.loads((copied / name).read_text())
    auto = {"AutoConfig": "Config", "AutoProcessor": "Model", "AutoTokenizer": "Model", "AutoImageProcessor": "Model"}
    content["auto_map"] = {key: f"hostile.{value}" for key, value in auto.items()}
    if name == "tokenizer_config.json":
        content["tokenizer_class"] = "UnheardOfTokenizer"
    (copied / name).write_text(json.dumps(content))
    with suppress(FrozenPrefixError):
        Captioner.from_pretrained(copied)
    assert not marker.exists()


def test_yaml_aliases_that_multiply_are_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="aliases repeat more than"):
        read_yaml("\n".join(lines), "bomb.yaml")


def test_yaml_makes_no_objects(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']", "recipe.yaml")
    assert not (tmp_path / "made").exists()


def test_an_image_list_cannot_name_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"image": "pipe.png", "captions": ["a"], "split": "train"}) + "\n"
    )
    samples = load_source({"type": "captions", "path": str(tmp_path)})
    with pytest.raises(BadImageError, match="a device or a pipe, expected a file"):
        load_image(samples[0].images[0])
