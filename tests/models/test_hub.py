"""The Hub, by a stand-in of its API on this machine: publishing, loading, and what a checkpoint may have fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from frozenprefix.errors import CheckpointError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.hub import local_checkpoint, pin_parts
from tests.helpers.hub import standing_in

# Client and endpoint are chosen when huggingface_hub is imported, so that each side of the test is a process.
PUSH = """
import sys, frozenprefix
from frozenprefix import FrozenPrefixForConditionalGeneration as Model, FrozenPrefixProcessor as Processor
checkpoint, lm = sys.argv[1:]
from huggingface_hub import HfApi
model = Model.from_pretrained(checkpoint)
print(model.push_to_hub("me/trained"))
Processor.from_pretrained(checkpoint).push_to_hub("me/trained")
model.language_model.push_to_hub("me/lm")
model.save_pretrained("whole", self_contained=True)
Processor.from_pretrained(checkpoint).save_pretrained("whole")
HfApi().create_repo("me/whole")
HfApi().upload_folder(repo_id="me/whole", folder_path="whole")
"""
LOAD = """
import sys, frozenprefix, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from frozenprefix.errors import FrozenPrefixError
for name in sys.argv[1:]:
    try:
        model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
        inputs = {"input_ids": torch.tensor([[300, 300, 5]]), "pixel_values": torch.ones(1, 3, 32, 32)}
        print(name, model.generate(**inputs, max_new_tokens=5).tolist(), type(processor).__name__)
    except FrozenPrefixError as error:
        print(name, type(error).__name__, error)
"""


def run(code: str, address: str, folder: Path, *arguments: str, home: str = "home") -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / home),
        "HF_TOKEN": "hf_" + "x" * 20,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def edit_config(hub, repo: str, change) -> None:
    config = json.loads(hub.repositories[repo]["config.json"])
    change(config)
    hub.repositories[repo]["config.json"] = json.dumps(config).encode()


@pytest.mark.slow
def test_publishing_and_loading(tiny_checkpoint, sharp_lm, tmp_path):
    with standing_in() as (address, hub):
        run(PUSH, address, tmp_path, str(tiny_checkpoint), str(sharp_lm))
        assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= set(
            hub.repositories["me/trained"]
        )
        assert {
            "vision_encoder/model.safetensors",
            "language_model/model.safetensors",
            "modeling_frozenprefix.py",
        } <= set(hub.repositories["me/whole"])
        # a checkpoint whose language model is on the Hub, at the commit that it was trained with
        hub.repositories["me/from_hub"] = dict(hub.repositories["me/trained"])
        commit = hub.commit_of("me/lm")

        def from_hub(config, **identity):
            config["language_model"] |= {"path": "me/lm", "revision": None}
            config.pop("language_model_location", None)
            architecture = config["identity"]["language_model"]["architecture"]
            config["identity"]["language_model"] = {"path": "me/lm", "architecture": architecture, **identity}

        edit_config(hub, "me/from_hub", lambda config: from_hub(config, revision=commit))
        for repo in ("me/unpinned", "me/gone", "me/vanished"):
            hub.repositories[repo] = dict(hub.repositories["me/from_hub"])
        edit_config(hub, "me/unpinned", from_hub)

        def elsewhere(config):
            from_hub(config, revision=commit)
            config["language_model"]["path"] = config["identity"]["language_model"]["path"] = "me/deleted-lm"

        edit_config(hub, "me/gone", elsewhere)
        del hub.repositories["me/vanished"]["model.safetensors"]
        hub.requests.clear()
        names = ["trained", "whole", "from_hub", "unpinned", "gone", "vanished", "nowhere"]
        said = run(LOAD, address, tmp_path, *(f"me/{name}" for name in names if name != "nowhere"), home="other")

    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("me/")}
    words = lines["me/trained"].split(" ", 1)[1]
    assert words.endswith("FrozenPrefixProcessor")
    assert lines["me/whole"].split(" ", 1)[1] == words
    assert lines["me/from_hub"].split(" ", 1)[1] == words
    # what is fetched is said, and nothing without a pin is
    assert f"language_model: 'me/lm' comes from the Hub at revision {commit}" in said
    assert (
        "CheckpointError me/unpinned: language_model: 'me/lm' would be fetched from the Hub, but"
        in lines["me/unpinned"]
    )
    assert "AssetError model.language_model.path: 'me/deleted-lm' is neither a local folder nor" in lines["me/gone"]
    assert "CheckpointError" in lines["me/vanished"]
    assert "holds no model.safetensors" in lines["me/vanished"]
    fetched = {request.split(" ", 1)[1] for request in hub.requests if "/resolve/" in request}
    assert not any(path.endswith(".py") for path in fetched)
    assert [path for path in fetched if path.startswith("/me/lm/") and f"/resolve/{commit}/" not in path] == []


# ── what a config may name ──

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIMM = {"source": "timm", "name": "resnet18", "weights": "pretrained"}
CLIP = {"source": "open_clip", "name": "ViT-B-32", "weights": "openai"}
VIT = {"source": "transformers", "name": "google/vit-base-patch16-224"}


def config_of(encoder=None, encoder_identity=None, lm_identity=None, path="me/lm"):
    return FrozenPrefixConfig(
        vision_encoder=encoder or {**TIMM, "weights": "random"},
        mapper={"type": "mlp"},
        language_model={"path": path},
        identity={"vision_encoder": encoder_identity or {}, "language_model": lm_identity or {}},
    )


def test_parts_get_the_commit_of_their_identity_and_are_named(caplog):
    config = config_of(VIT, {"revision": COMMIT}, {"revision": COMMIT})
    pin_parts(config, "me/checkpoint", given=())
    assert config.language_model.revision == config.vision_encoder.revision == COMMIT
    assert f"language_model: 'me/lm' comes from the Hub at revision {COMMIT}" in caplog.text
    assert f"vision_encoder: '{VIT['name']}' comes from the Hub at revision {COMMIT}" in caplog.text


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (config_of(), "language_model: 'me/lm'"),
        (config_of(lm_identity={"revision": "main"}), "language_model: 'me/lm'"),
        (config_of(lm_identity={"revision": "None"}), "language_model: 'me/lm'"),
        (config_of(TIMM, path="lm.gguf"), "vision_encoder: 'resnet18, pretrained'"),
        (config_of(CLIP, {"weights": "openai"}, path="lm.gguf"), "vision_encoder: 'ViT-B-32, openai'"),
        (
            config_of(
                {"source": "fused", "encoders": [TIMM, VIT], "image_size": 64},
                {"0.sha256": "a" * 64, "1.name": VIT["name"]},
                path="lm.gguf",
            ),
            f"vision_encoder: '{VIT['name']}'",
        ),
    ],
)
def test_parts_without_a_pin_are_refused(config, part):
    with pytest.raises(CheckpointError, match=f"^me/checkpoint: {part} would be fetched from the Hub, but config.json"):
        pin_parts(config, "me/checkpoint", given=())
    pin_parts(config, "me/checkpoint", given=("language_model", "vision_encoder"))


def test_parts_on_this_machine_and_those_with_a_hash_need_no_commit(tmp_path, caplog):
    pin_parts(config_of(TIMM, {"sha256": "a" * 64}, path=str(tmp_path)), "me/checkpoint", given=())
    assert "vision_encoder: 'resnet18, pretrained' comes from the Hub" in caplog.text
    assert "language_model" not in caplog.text


def test_a_checkpoint_that_the_hub_does_not_give():
    with pytest.raises(CheckpointError, match=r"^checkpoint: 'me/nothing' cannot be fetched from the Hub \("):
        local_checkpoint("me/nothing")
    with pytest.raises(CheckpointError, match=r"got '\.\./nothing', expected a checkpoint folder or a Hub id"):
        local_checkpoint("../nothing")
