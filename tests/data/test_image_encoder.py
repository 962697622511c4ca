"""From images to features: one way in, and every image decoded once."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.data import image_encoder
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.images import BadImages, to_image
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.models.encoder_configuration import vision_encoder_config


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    config = vision_encoder_config(source="timm", name="test_vit", weights="random", image_size=32)
    return ImageEncoder.from_config(config)


@pytest.fixture
def paths(shapes):
    return sorted((shapes / "images").iterdir())


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, in order."""
    files = []

    def load(image):
        if not isinstance(image, Image.Image):
            files.append(str(image))
        return to_image(image)

    monkeypatch.setattr(image_encoder, "to_image", load)
    return files


def test_files_images_and_features_are_the_same(encoder, paths):
    from_files = encoder(paths[:3])
    assert from_files.dtype == torch.float32
    assert torch.equal(encoder([to_image(path) for path in paths[:3]]), from_files)
    assert torch.equal(encoder([paths[0], to_image(paths[1]), str(paths[2])]), from_files)
    assert encoder(from_files) is from_files


def test_batches_leave_bad_images_out_and_stay_full(encoder, paths, tmp_path, decoded):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    given = [paths[0], broken, paths[1], tmp_path / "missing.png", paths[2]]
    bad = BadImages()
    batches = list(encoder.batches(given, 2, bad))
    assert [files for files, _ in batches] == [[paths[0], paths[1]], [paths[2]]]
    for files, features in batches:  # to the bit: on some processors an image alone is added up in another order
        assert torch.equal(features, encoder(files))
    assert bad.counts == {"not_an_image": 1, "missing": 1}
    assert decoded[:5] == [str(path) for path in given], "each file is decoded once"
    with pytest.raises(BadImageError, match="broken"):
        list(encoder.batches(given, 2))


def test_precomputed_features_are_found_by_file(tmp_path, paths):
    save_file({path.stem: torch.randn(4, 6) for path in paths}, tmp_path / "regions.safetensors")
    table = ImageEncoder.from_config(
        vision_encoder_config(source="features", path=str(tmp_path / "regions.safetensors"))
    )
    features = table(paths[:3])
    assert features.shape == (3, 4, 6)
    batches = list(table.batches(["/elsewhere/red_circle.png"], 2))
    assert batches[0][1].shape == (1, 4, 6), "the image itself is not read"
    with pytest.raises(DataError, match=r"got a PIL image.*give image files or image features"):
        table([to_image(paths[0])])


def test_the_caption_command_decodes_every_image_once(tiny_checkpoint, paths, decoded):
    outcome = CliRunner().invoke(app, ["caption", str(tiny_checkpoint), *map(str, paths[:5]), "--beams", "1"])
    assert outcome.exit_code == 0, outcome.output
    assert decoded == [str(path) for path in paths[:5]]
