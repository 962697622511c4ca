"""Projectors of LLaVA and nanoVLM: the prefix of the imported checkpoint is what their own code computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from frozenprefix import FrozenPrefixForConditionalGeneration
from frozenprefix.cli.main import app
from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.export import import_llava, import_nanovlm
from tests.helpers.towers import SIZE, TOKENS, save_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return save_tower(tmp_path_factory.mktemp("tower"), "clip", "quick_gelu")


def features_of(tower, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and LLaVA's features: one hidden state without the class token."""
    from transformers import CLIPVisionModel

    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        states = CLIPVisionModel.from_pretrained(tower).eval()(pixels, output_hidden_states=True).hidden_states
    return pixels, states[layer][:, 1:]


@pytest.mark.parametrize("layers", [1, 2])
def test_llava(layers, tower, tiny_lm, tmp_path):
    torch.manual_seed(0)
    projector = nn.Linear(32, 32) if layers == 1 else nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    state = {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    section = {"source": "transformers", "name": str(tower), "layer": -2}
    lm = str(tiny_lm("llama"))
    import_llava(tmp_path / "mm_projector.bin", tmp_path / "out", vision_encoder=section, language_model=lm)
    model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "out")
    pixels, features = features_of(tower, -2)
    with torch.no_grad():
        assert (model.prefix(pixels) - projector(features)).abs().max() < 1e-5
    assert model.config.prefix_length == TOKENS


def pixel_shuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """nanoVLM's: float[B, N, D] -> float[B, N / factor², D * factor²]."""
    batch, tokens, width = features.shape
    side = int(tokens**0.5)
    grid = features.view(batch, side, side, width)
    grid = grid.reshape(batch, side // factor, factor, side // factor, factor, width).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, (side // factor) ** 2, width * factor**2)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_nanovlm(factor, tower, tiny_lm, tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(32, 32 * factor**2)
    torch.save({"MP.proj.weight": weight, "decoder.norm.weight": torch.ones(4)}, tmp_path / "nano.pt")
    section = {"source": "transformers", "name": str(tower), "layer": 2}
    lm = str(tiny_lm("llama"))
    import_nanovlm(tmp_path / "nano.pt", tmp_path / "out", vision_encoder=section, language_model=lm)
    model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "out")
    pixels, features = features_of(tower, 2)
    with torch.no_grad():
        expected = pixel_shuffle(features, factor) @ weight.T
        assert (model.prefix(pixels) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model.config.prefix_length == TOKENS // factor**2


def test_what_does_not_fit_is_named(tower, tiny_lm, tmp_path):
    section, lm = {"source": "transformers", "name": str(tower), "layer": -2}, str(tiny_lm("llama"))

    def refused(state, error, message, convert=import_llava):
        torch.save(state, tmp_path / "mm_projector.bin")
        with pytest.raises(error, match=message):
            convert(tmp_path / "mm_projector.bin", tmp_path / "out", vision_encoder=section, language_model=lm)
        assert not (tmp_path / "out").exists()

    def layer(number, rows, columns):
        name = f"model.mm_projector.{number}"
        return {f"{name}.weight": torch.ones(rows, columns), f"{name}.bias": torch.ones(rows)}

    refused({**layer(0, 32, 20), **layer(2, 32, 32)}, ConfigError, "reads 20 numbers, but the encoder gives 32")
    refused(
        {**layer(0, 32, 32), **layer(2, 48, 32)}, ConfigError, "makes 48 numbers, but the language model has width 32"
    )
    refused(
        {**layer(0, 32, 32), **layer(2, 32, 40)}, AssetError, "layer 2 of its projector reads 40 numbers, expected 32"
    )
    refused({**layer(0, 32, 32), **layer(1, 32, 32)}, AssetError, "layers of another kind than linear and GELU")
    refused({"model.mm_projector.0.weight": torch.ones(32, 32), **layer(2, 32, 32)}, AssetError, "layer 0 .* lacks")
    refused({"MP.proj.weight": torch.ones(32, 100)}, ConfigError, "reads 100 numbers, but the encoder", import_nanovlm)


def test_commands(tower, tiny_lm, tmp_path):
    torch.save({"MP.proj.weight": torch.ones(32, 128)}, tmp_path / "nano.pt")
    parts = ["--language-model", str(tiny_lm("llama")), "--out", str(tmp_path / "out")]
    section = f"{{source: transformers, name: '{tower}'}}"
    arguments = ["import", "nanovlm", str(tmp_path / "nano.pt"), *parts, "--vision-encoder", section]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "mapper 'pixel_shuffle' with prefix length 4" in result.output
    result = CliRunner().invoke(
        app, ["import", "llava", str(tmp_path / "nano.pt"), *parts[:-1], "x", "--vision-encoder", "a"]
    )
    assert result.exit_code == 2
    assert "--vision-encoder: got 'a', expected fields" in result.output
