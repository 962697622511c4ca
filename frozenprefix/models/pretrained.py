"""Folders and Hub ids of transformers' models: errors are one line that names the problem."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils import logging as transformers_logging

from frozenprefix.assets import is_hub_id
from frozenprefix.errors import AssetError, FrozenPrefixError, did_you_mean
from frozenprefix.utils import parse_json, report
from frozenprefix.utils.damage import refusing_damage

_LFS_POINTER = b"version https://git-lfs.github.com/"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_POINTER = 1024  # bytes
_READ_BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt")  # configs and tokenizers


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the placeholder that git leaves where Git LFS has not fetched the content.

    Example:
        >>> _ = (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        >>> is_lfs_pointer(tmp_path / "a.safetensors")
        True
    """
    return file.stat().st_size <= _LONGEST_POINTER and file.read_bytes().startswith(_LFS_POINTER)


def check_folder(folder: Path, field: str) -> None:
    """Check that a folder holds a model of transformers: config and whole weights, and no Git LFS pointers.

    Args:
        field: the recipe key that names the folder, for messages.

    Raises:
        AssetError: naming the file that is missing, damaged or a pointer.

    Example:
        >>> check_folder(tmp_path, "model.language_model.path")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: model.language_model.path: '...' is an empty folder; expected ...
    """
    _check_config(folder, field)
    weights = _weight_files(folder, field)
    for file in [*weights, *(file for pattern in _READ_BESIDE_WEIGHTS for file in sorted(folder.glob(pattern)))]:
        if is_lfs_pointer(file):
            raise AssetError(
                f"{field}: '{file}' is a Git LFS pointer in place of the file itself; run `git lfs pull` in '{folder}'"
            )
    for file in weights:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                size = file.stat().st_size
                raise AssetError(
                    f"{field}: '{file}' ({size} bytes) is damaged or cut short ({error}); fetch it again"
                ) from error


def _check_config(folder: Path, field: str) -> None:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise AssetError(f"{field}: '{folder}' {_without_config(folder)}")
    if is_lfs_pointer(file):
        return  # reported with the other files
    with refusing_damage(AssetError, f"{field}: '{file}' is not JSON ({{reason}}); fetch it again"):
        values = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise AssetError(f"{field}: '{file}' names no model_type; expected the config of a model of transformers")


def _without_config(folder: Path) -> str:
    """Content of a folder without config.json, and the folder or file to give instead."""
    if not any(folder.iterdir()):
        return f"is an empty folder; expected {CONFIG_NAME}, weights and tokenizer of a model of transformers"
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"holds no {CONFIG_NAME}; give the GGUF file itself, '{ggufs[0]}'"
    if (folder / "adapter_config.json").is_file():
        return f"holds an adapter of peft and no {CONFIG_NAME}; give the folder of its base model"
    inside = sorted(file.parent for file in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f" (did you mean '{inside[0]}'?)" if inside else ""
    return f"holds no {CONFIG_NAME}{hint}; expected the folder of a model of transformers"


def _weight_files(folder: Path, field: str) -> list[Path]:
    """The files that transformers reads the weights from."""
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _shards(folder / index, field)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    found = f"{len(shards)} parts of weights without {SAFE_WEIGHTS_INDEX_NAME}" if shards else "no weights"
    raise AssetError(f"{field}: '{folder}' holds {found}; expected {SAFE_WEIGHTS_NAME} there")


def _shards(index: Path, field: str) -> list[Path]:
    if is_lfs_pointer(index):
        return [index]
    with refusing_damage(AssetError, f"{field}: '{index}' is damaged ({{reason}}); fetch it again"):
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.with_name(name) for name in names]
    lost = [file.name for file in files if not file.is_file()]
    if lost or not files:
        raise AssetError(
            f"{field}: '{index}' names {len(lost)} of {len(files)} files that are not there "
            f"({', '.join(lost[:3]) or 'none'}); fetch them"
        )
    return files


@contextmanager
def reading(place: str, field: str, what: str) -> Iterator[None]:
    """Read a model, its config or its tokenizer inside the block; every error becomes one line.

    Args:
        place: folder or Hub id.
        field: the recipe key that names it.
        what: kind of model for messages, such as "a causal language model".

    Raises:
        AssetError: instead of all errors except the package's own: a damaged file can raise any error in its reader.

    Example:
        >>> with reading("gpt2", "model.language_model.path", "a language model"):
        ...     raise KeyError("bad")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: model.language_model.path: 'gpt2' ...
    """
    try:
        yield
    except FrozenPrefixError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
        if Path(place).is_dir():
            raise AssetError(f"{field}: '{place}' cannot be read as {what} ({reason}); give another folder") from error
        raise not_found(place, field, what, reason) from error


def not_found(place: str, field: str, what: str, reason: str = "") -> AssetError:
    """The error for a name that is neither a local folder nor on the Hub."""
    parent = Path(place).expanduser().parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    hint = did_you_mean(Path(place).name, siblings)
    if not is_hub_id(place):
        return AssetError(f"{field}: '{place}' does not exist{hint}; expected the folder of {what}, or a Hub id")
    if HF_HUB_OFFLINE:
        return AssetError(
            f"{field}: '{place}' is no local folder{hint}, and the Hub, which is off (HF_HUB_OFFLINE=1), has not "
            f"given it before; give the folder of {what}, or unset HF_HUB_OFFLINE"
        )
    return AssetError(
        f"{field}: '{place}' is neither a local folder{hint} nor {what} that the Hub gives ({reason}); give a local "
        "folder or a pypi:// reference"
    )


def read_config(place: str, field: str, revision: str | None = None) -> Any:
    """The config of a model of transformers.

    Raises:
        AssetError: it cannot be read, or is of a type that this version of transformers does not know.

    Example:
        >>> read_config(str(lm_folder), "model.language_model.path").model_type
        'llama'
    """
    with reading(place, field, "a model of transformers"):
        config = AutoConfig.from_pretrained(place, revision=revision or "main", trust_remote_code=False)
    return config


def hub_commit(place: str, field: str, revision: str | None = None) -> str:
    """The commit of the Hub that a model's id and revision (a branch, a tag or a commit) stand for now.

    Without the Hub it is the one that was fetched before. Newer releases of transformers keep it in no config.

    Raises:
        AssetError: the Hub does not give it.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    with reading(place, field, "a model of transformers"):
        file = Path(str(cached_file(place, CONFIG_NAME, revision=revision or "main")))
        if not _COMMIT.fullmatch(file.parent.name):  # the cache keeps each commit in a folder of its name
            raise AssetError(f"{field}: '{place}': the commit of {file} is not known; give a revision")
        return file.parent.name


def check_loaded(info: dict[str, Any], place: str, field: str) -> None:
    """Refuse a model with weights that its files do not hold: transformers fills them with random numbers.

    Args:
        info: what `from_pretrained` returns with `output_loading_info=True`.

    Raises:
        AssetError: for missing weights, and for weights of another shape.

    Example:
        >>> check_loaded({"missing_keys": {"norm.weight"}}, "gpt2", "model.language_model.path")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: model.language_model.path: 'gpt2' lacks 1 weights of its model ...
    """
    for key, problem in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes than its config for")):
        names = sorted(name if isinstance(name, str) else name[0] for name in info.get(key, ()))
        if names:
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise AssetError(
                f"{field}: '{place}' {problem} {len(names)} weights of its model ({listed}); fetch it again, or check "
                f"{CONFIG_NAME}"
            )


def report_unused(info: dict[str, Any], model: nn.Module, place: str, *, expected: bool = False) -> None:
    """Log the number of weights that the model does not have.

    Args:
        expected: heads that an encoder does not use are no reason for a warning.
    """
    unused = sorted(info.get("unexpected_keys", ()))
    level = logging.INFO if expected else logging.WARNING
    total = sum(1 for _ in model.parameters())
    report(place, total + len(unused), {"not in the model": len(unused)}, what="weights", examples=unused, level=level)


class quiet_transformers:
    """Context manager that hides transformers' loading bars and reports, which would disturb the trainer's bar."""

    def __enter__(self) -> None:
        self.was_enabled = transformers_logging.is_progress_bar_enabled()
        self.verbosity = transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity(max(self.verbosity, transformers_logging.ERROR))

    def __exit__(self, *exception: Any) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.was_enabled:
            transformers_logging.enable_progress_bar()
