"""Files of tensors: one writer and one reader. The package `utils` leaves them out, as torch is slow to import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from frozenprefix.errors import DataError
from frozenprefix.utils.system_errors import system_error


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, with the permissions that every other new file gets.

    Args:
        metadata: texts by name, kept in the head of the file.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> save_tensors({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt", **(metadata or {})},
        )
    except SafetensorError as error:  # before 0.8 for a full disk, too
        number = system_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)  # the library makes files that only their owner can read


def load_tensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        DataError: the file is missing, damaged, or has a dtype that torch does not know.

    Example:
        >>> _ = (tmp_path / "a.safetensors").write_bytes(b"half a fi")
        >>> load_tensors(tmp_path / "a.safetensors")
        Traceback (most recent call last):
        frozenprefix.errors.DataError: ...a.safetensors is damaged (...
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return load_file(path)
    except Exception as error:  # the library raises errors of many classes for damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path} is damaged ({reason})") from error
