"""Rows of files, and packed batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def pack_samples(collator: Any, samples: list[Any], packing: str = "trie") -> Any:
    """A `PackedBatch` of samples that share one image each."""
    from frozenprefix.models.packing import pack

    return pack(
        [[collator.target(sample, text) for text in sample.targets] for sample in samples],
        image_token_id=collator.processor.image_token_id,
        prefix_length=collator.processor.prefix_length,
        packing=packing,
    )
