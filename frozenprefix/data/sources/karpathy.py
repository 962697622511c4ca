"""Karpathy's splits of COCO, Flickr8k and Flickr30k: `dataset_coco.json` and a folder of images (CVPR 2015)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json_object


class KarpathySource(SourceConfig):
    """One sample per image, with all its sentences as people wrote them (`raw`).

    COCO has a fourth split, `restval`: the rest of the official validation part. Published results count it as
    training data, and so does the default.

    Example:
        >>> KarpathySource(path="coco", file="dataset_coco.json").restval
        'train'
    """

    type: Literal["karpathy"] = "karpathy"
    file: str = Field(description="file under `path`, e.g. dataset_coco.json")
    images: str = Field(".", description="folder under `path` that the image names start from")
    restval: Literal["train", "keep", "drop"] = Field("train", description="train: counts as split 'train'")

    def read(self, root: Path) -> list[Sample]:
        samples = []
        for row in read_json_object(root / self.file).rows("images"):
            split = row.text("split")
            if split == "restval" and self.restval == "drop":
                continue
            if split == "restval" and self.restval == "train":
                split = "train"
            samples.append(_sample(row, split, root / self.images))
        return samples


def _sample(row: Row, split: str, folder: Path) -> Sample:
    name = row.text("filename")
    sentences = row.rows("sentences")
    return Sample(
        id=name,
        images=(folder / (row.text_or_none("filepath") or ".") / name,),
        targets=tuple(text.strip() for sentence in sentences for text in sentence.texts("raw")),
        split=split,
        metadata={"image_id": row.identifier(row.either("cocoid", "imgid"))},
        where=row.where,
    )
