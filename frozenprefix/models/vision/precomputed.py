"""Image features that were computed elsewhere (regions of a detector, say), read from a file by the image's name."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from frozenprefix.assets import resolve
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.models.encoder_configuration import PrecomputedFeaturesConfig
from frozenprefix.models.vision.base import FINAL, BuiltEncoder, VisionEncoder
from frozenprefix.models.vision.image_processing import FrozenPrefixImageProcessor
from frozenprefix.utils import parse_json

_FIELD = "model.vision_encoder.path"
_NAMES_IN_ERRORS = 3


class FeatureTable:
    """Image features by key, with the methods of a feature cache.

    A .safetensors file holds one tensor float[N, D] per image, by key. An .npy file holds float[images, N, D], and a
    JSON list beside it names the rows. All images have the same N: pad or pool them when the file is written.

    The key of an image is the end of its path, with or without its last suffix: `img/cat.png` is looked up as
    "img/cat.png", "img/cat", "cat.png" and "cat", and the longest of these in the file is used.

    Args:
        path: a .safetensors or .npy file.
        keys: JSON file with the keys of an .npy file; by default `path` with the suffix .json.

    Raises:
        ConfigError: for a file that cannot be read, or whose arrays are not all of one shape [N, D].

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"cat": torch.ones(4, 8)}, tmp_path / "features.safetensors")
        >>> FeatureTable(tmp_path / "features.safetensors").features(["images/cat.png"]).shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, path: Path, keys: Path | None = None):
        self.path = path
        self._rows: dict[str, int] = {}
        try:
            if path.suffix == ".safetensors":
                self._file = safe_open(path, framework="pt")
                shapes = {tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
                self._rows = {key: row for row, key in enumerate(self._file.keys())}
            elif path.suffix == ".npy":
                self._array = np.load(path, mmap_mode="r", allow_pickle=False)
                shapes = {self._array.shape[1:]}
                self._rows = _read_keys(keys or path.with_suffix(".json"), len(self._array))
            else:
                raise ConfigError(f"{_FIELD}: got '{path.name}', expected a .safetensors or .npy file")
        except ConfigError:
            raise
        except Exception as error:  # NumPy and safetensors raise errors of many classes for damaged files
            raise ConfigError(f"{_FIELD}: '{path}' cannot be read ({error})") from error
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            listed = ", ".join(map(str, sorted(shapes)[:_NAMES_IN_ERRORS])) or "none"
            raise ConfigError(
                f"{_FIELD}: {path.name} holds arrays of shape {listed}, expected one shape (N, D) for all images; "
                "pad or pool them to the same number of vectors"
            )
        self.tokens, self.dim = next(iter(shapes))
        self._images: dict[str, Path] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def key_of(self, path: str | PathLike[str]) -> str:
        """Return the key of an image file, which itself is not read; see `keys_of`."""
        return self.keys_of([path])[0]

    def keys_of(self, paths: Sequence[str | PathLike[str]]) -> list[str]:
        """Return the keys of image files.

        Raises:
            DataError: for images without features, and for two images with the same key.
        """
        keys = [self._find(Path(path)) for path in paths]
        missing = [str(path) for path, key in zip(paths, keys, strict=True) if key is None]
        if missing:
            known = ", ".join(map(repr, list(self._rows)[:_NAMES_IN_ERRORS]))
            raise DataError(
                f"{_FIELD}: {self.path.name} has no features for {len(missing)} of {len(paths)} images "
                f"({', '.join(missing[:_NAMES_IN_ERRORS])}); expected the end of a path as its key, but the keys are "
                f"{known}, …"
            )
        known_keys = [key for key in keys if key is not None]
        for path, key in zip(paths, known_keys, strict=True):
            first = self._images.setdefault(key, Path(path).absolute())
            if first != Path(path).absolute():
                raise DataError(f"{_FIELD}: the key '{key}' stands for {first} and {path}; put folders into the keys")
        return known_keys

    def get(self, keys: Sequence[str]) -> np.ndarray:
        """Return float32[n, N, D] in the order of `keys`."""
        if self.path.suffix == ".npy":
            return np.stack([self._array[self._rows[key]] for key in keys]).astype(np.float32)
        return torch.stack([self._file.get_tensor(key).float() for key in keys]).numpy()

    def features(self, paths: Sequence[str | PathLike[str]]) -> Tensor:
        """Return image_features float32[n, N, D] of image files."""
        return torch.from_numpy(self.get(self.keys_of(paths)))

    def _find(self, path: Path) -> str | None:
        parts = path.absolute().parts[1:]
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            for key in (name, name.removesuffix(path.suffix)):
                if key in self._rows:
                    return key
        return None


def _read_keys(file: Path, rows: int) -> dict[str, int]:
    try:
        keys = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.vision_encoder.keys: '{file}' cannot be read as a JSON list ({error})") from error
    if not isinstance(keys, list) or len(keys) != rows or len(set(map(str, keys))) != rows:
        got = f"{len(keys)} entries" if isinstance(keys, list) else type(keys).__name__
        raise ConfigError(
            f"model.vision_encoder.keys: {file.name} holds {got}, expected a list of {rows} different keys, one per row"
        )
    return {str(key): row for row, key in enumerate(keys)}


class PrecomputedFeatures(VisionEncoder):
    """Takes the place of an encoder if the features come from a file; it has no network to encode images.

    Args:
        num_tokens, encoder_dim: shape of an image's features.
        table: the features by image; without it they have to be passed as `image_features`.

    Example:
        >>> PrecomputedFeatures(num_tokens=36, encoder_dim=2048).name
        'features'
    """

    def __init__(self, num_tokens: int, encoder_dim: int, table: FeatureTable | None = None):
        super().__init__(name="features" if table is None else table.path.name, layers=[FINAL], image_size=0)
        self.table = table
        self.num_tokens, self.encoder_dim = num_tokens, encoder_dim

    def forward(self, pixel_values: Tensor) -> NoReturn:
        raise ConfigError(
            "model.vision_encoder: source 'features' has no network for pixel_values; give image_features, or image "
            "paths that the file has features for"
        )

    def maps(self, pixel_values: Tensor) -> NoReturn:
        self.forward(pixel_values)

    def pool(self, pixel_values: Tensor) -> NoReturn:
        self.forward(pixel_values)


def build(config: PrecomputedFeaturesConfig) -> BuiltEncoder:
    """Open the feature table that a config names.

    The identity holds the shape of the features but not the file: new images come with another file, and whether the
    same network computed both cannot be checked. The image processor is only there because every checkpoint has one.
    """
    table = FeatureTable(resolve(config.path), None if config.keys is None else resolve(config.keys))
    identity = {"source": "features", "num_tokens": str(table.tokens), "encoder_dim": str(table.dim)}
    processor: Any = FrozenPrefixImageProcessor()
    return BuiltEncoder(PrecomputedFeatures(table.tokens, table.dim, table), processor, identity)


def feature_table(encoder: torch.nn.Module) -> FeatureTable | None:
    """The feature table if features are precomputed, else None.

    Example:
        >>> feature_table(model.vision_encoder) is None
        True
    """
    return encoder.table if isinstance(encoder, PrecomputedFeatures) else None
