"""The fields that the configs of all sources have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from frozenprefix.data.samples import Sample
from frozenprefix.data.streaming.groups import StreamedGroups


class Holdout(BaseModel):
    """Split off a validation part by image. The part of an image depends on its name and the seed alone.

    With `versions: together`, it depends on the name of the photo that the image is a version of: IMG_1-2.jpg, IMG_1
    (1).jpg and IMG_1_edited.jpg are in the part of IMG_1.jpg.

    Example:
        >>> Holdout(part="val", fraction=0.2).seed
        0
    """

    model_config = ConfigDict(extra="forbid")

    fraction: float = Field(0.1, gt=0, lt=1, description="share of the images in the validation part")
    seed: int = 0
    versions: Literal["apart", "together"] = Field("apart", description="of the same photo, by their names")
    part: Literal["train", "val"] = Field(description="the part to return")


class SourceConfig(BaseModel, ABC):
    """Place of data in one format, and which samples of it to return.

    Example:
        >>> class NamesSource(SourceConfig):
        ...     type: Literal["names"] = "names"
        ...     def read(self, root):
        ...         return [Sample(path.name, (path,), (path.stem,)) for path in root.glob("*.png")]
        >>> len(NamesSource(path=str(images_folder)).read(images_folder))
        12
    """

    model_config = ConfigDict(extra="forbid")

    type: str
    path: str = Field(min_length=1, description="folder: local, or a pypi:// reference")
    split: str | list[str] | None = Field(None, description="name(s) of the split(s) to return; all when not given")
    holdout: Holdout | None = Field(None, description="return only one part of a split by image")
    limit: int | None = Field(None, ge=1, description="return only the samples of the first N images")
    prompt: str | None = Field(None, description="prompt template of these samples; the task's own when not given")
    weight: float | None = Field(None, gt=0, description="relative share of this source in the training steps")
    name: str | None = Field(None, description="put before every id as 'name:', to join sources that share ids")

    @property
    def streamed(self) -> bool:
        """Whether training reads the samples one by one from their shards."""
        return False

    @abstractmethod
    def read(self, root: Path) -> list[Sample]:
        """Read all samples under the resolved `path`. Malformed rows raise `DataError`."""


class StreamedSource(SourceConfig):
    """A source whose samples can also be streamed: read when a step needs them, and not kept.

    Example:
        >>> issubclass(StreamedSource, SourceConfig)
        True
    """

    stream: bool = Field(False, description="read samples when they are needed, in blocks of whole shards")
    shuffle_images: int = Field(20_000, ge=1, description="with `stream`: images of a block, shuffled together")

    @property
    def streamed(self) -> bool:
        return self.stream

    @model_validator(mode="after")
    def _fits_a_stream(self) -> Self:
        for field in ("holdout", "limit"):
            if self.stream and getattr(self, field) is not None:
                raise ValueError(f"`{field}` needs all samples at once; leave it out, or leave out `stream`")
        if not self.stream and "shuffle_images" in self.model_fields_set:
            raise ValueError("`shuffle_images` has no effect without `stream: true`")
        return self

    @abstractmethod
    def open(self, root: Path, finish: Callable[[Sample], Sample]) -> StreamedGroups:
        """The samples under the resolved `path`, to be read from shards.

        Args:
            finish: completes a sample that was read.
        """
