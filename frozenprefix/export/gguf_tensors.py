"""Writing the tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor

FileType = Literal["f32", "f16"]


def write_tensors(writer: Any, tensors: Mapping[str, Tensor], file_type: FileType) -> None:
    """Add tensors to a `GGUFWriter`, and write its file. Vectors and positions are float32 in every file.

    Example:
        >>> import gguf
        >>> write_tensors(gguf.GGUFWriter(tmp_path / "a.gguf", "clip"), {"v.class_embd": torch.zeros(4)}, "f16")
    """
    for name, tensor in tensors.items():
        is_matrix = tensor.ndim > 1 and "position_embd" not in name and "_norm" not in name
        kind = np.float16 if file_type == "f16" and is_matrix else np.float32
        writer.add_tensor(name, tensor.detach().cpu().float().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
