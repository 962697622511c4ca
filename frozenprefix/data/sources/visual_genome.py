"""Visual Genome: phrases for regions of an image, and questions about it. https://homes.cs.washington.edu/~ranjay/visualgenome"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_rows
from frozenprefix.errors import DataError


class VisualGenomeSource(SourceConfig):
    """`region_descriptions.json` as captions, one sample an image, and `question_answers.json` as questions.

    A region's phrase becomes a target of the whole image, without the region's place. There are no official splits:
    use `holdout`. Ids are regions/IMAGE_ID and qa/QA_ID.

    Example:
        >>> VisualGenomeSource(path="vg", questions=None).regions
        'region_descriptions.json'
    """

    type: Literal["visual_genome"] = "visual_genome"
    regions: str | None = Field("region_descriptions.json", description="file of the phrases; null: no captions")
    questions: str | None = Field("question_answers.json", description="file of the questions; null: no questions")
    images: list[str] = Field(["VG_100K", "VG_100K_2"], min_length=1, description="folders of the images, ID.jpg")

    @model_validator(mode="after")
    def _reads_something(self) -> VisualGenomeSource:
        if self.regions is None and self.questions is None:
            raise ValueError("got null for both `regions` and `questions`, expected at least one file")
        return self

    def read(self, root: Path) -> list[Sample]:
        files = self._files(root)

        def image(image_id: str) -> Path:
            # an image that is in none of the folders is reported as missing in the first one
            return files.get(f"{image_id}.jpg", root / self.images[0] / f"{image_id}.jpg")

        samples = []
        for image_id, row in _images(root, self.regions):
            phrases = [text.strip() for region in row.rows("regions") for text in region.texts("phrase")]
            samples.append(
                Sample(
                    id=f"regions/{image_id}",
                    images=(image(image_id),),
                    targets=tuple(phrases),
                    metadata={"image_id": image_id},
                    where=row.where,
                )
            )
        for image_id, row in _images(root, self.questions):
            samples += [_question(question, image_id, image(image_id)) for question in row.rows("qas")]
        return samples

    def _files(self, root: Path) -> dict[str, Path]:
        """Images of all folders by name. A copy in two folders counts once; two different images are an error."""
        files: dict[str, Path] = {}
        for name in self.images:
            for path in sorted((root / name).glob("*.jpg")):
                other = files.setdefault(path.name, path)
                if other is not path and path.stat().st_size != other.stat().st_size:
                    raise DataError(f"{path}: got another image than {other}, expected one image of that name")
        return files


def _images(root: Path, file: str | None) -> Iterator[tuple[str, Row]]:
    """Rows of a file, one an image. Early releases call the image's id `image_id`, later ones `id`."""
    for _, row in read_rows(root / file) if file is not None else []:
        yield row.identifier(row.either("image_id", "id")), row


def _question(row: Row, image_id: str, image: Path) -> Sample:
    answer = row.text("answer")
    return Sample(
        id=f"qa/{row.identifier('qa_id')}",
        images=(image,),
        targets=(answer,),
        question=row.text("question"),
        task="vqa",
        metadata={"answers": (answer,), "image_id": image_id},
        where=row.where,
    )
