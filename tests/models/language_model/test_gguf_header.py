"""Heads of GGUF files: read as they are written; damaged ones are one error, at once and without large allocations."""

from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest

from frozenprefix.errors import AssetError
from frozenprefix.models.language_model.gguf_header import read_gguf_header


@pytest.fixture
def file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_uint32("llama.block_count", 2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_bool("clip.use_gelu", True)
    writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
    writer.add_tensor("norm.weight", np.ones(8, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_keys_and_shapes(file):
    header = read_gguf_header(file)
    assert header.architecture == "llama"
    assert header.values["llama.block_count"] == 2
    assert header.values["clip.use_gelu"] is True
    assert len(header.values["tokenizer.ggml.tokens"]) == 3
    assert header.tensors == {"token_embd.weight": (8, 3), "norm.weight": (8,)}


def test_every_cut_is_refused(file):
    data = file.read_bytes()
    for length in [*range(0, 200, 7), len(data) // 2, len(data) - 40]:
        file.write_bytes(data[:length])
        with pytest.raises(AssetError, match="is damaged, cut short or no GGUF file"):
            read_gguf_header(file)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 99), "version 99"),
        (8, struct.pack("<Q", 2**62), "entries are announced"),
        (16, struct.pack("<Q", 2**62), "entries are announced"),
        (24, struct.pack("<Q", 2**63 - 1), "bytes are announced"),
    ],
)
def test_absurd_sizes_are_refused(file, place, value, message):
    data = bytearray(file.read_bytes())
    data[place : place + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(AssetError, match=message):
        read_gguf_header(file)


def test_a_tensor_beyond_the_end_is_named(file):
    data = bytearray(file.read_bytes())
    place = data.index(b"token_embd.weight") + len("token_embd.weight") + 4
    data[place : place + 8] = struct.pack("<Q", 2**40)
    file.write_bytes(data)
    with pytest.raises(AssetError, match=r"tensor 'token_embd.weight' of shape \(1099511627776, 3\) ends at byte"):
        read_gguf_header(file)


def test_random_damage_never_escapes(file):
    data, random = file.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 3):
            damaged[place] = random.integers(0, 256)
        file.write_bytes(damaged)
        with suppress(AssetError):
            read_gguf_header(file)
