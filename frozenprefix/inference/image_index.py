"""An index of images that is searched by text: built once, kept on disk, refreshed when files change."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from frozenprefix.data.cache import ImageKeys, image_key
from frozenprefix.data.images import BadImages, read_image
from frozenprefix.errors import BadImageError, CacheError, ConfigError, DataError
from frozenprefix.inference.captioner import batched
from frozenprefix.inference.embedding import Embedder
from frozenprefix.utils import content_hash, parse_json, user_cache, write_bytes_atomic, write_text_atomic

logger = logging.getLogger(__name__)
INDEX_FILE = "index.json"
FORMAT = 2


@dataclass(frozen=True)
class Hit:
    """An image of the index, and its cosine similarity with the query.

    Example:
        >>> Hit(image_path, 0.31).score
        0.31
    """

    path: Path
    score: float


def nearest(queries: np.ndarray, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` items with the largest products with each query, best first: float[q, k], and their places int64[q, k].

    Args:
        queries: float[q, D]; items: float[n, D], n >= k.

    Example:
        >>> scores, places = nearest(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]), k=2)
        >>> places.tolist()
        [[1, 2]]
    """
    scores = queries @ items.T
    top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    best = np.take_along_axis(scores, top, axis=1)
    order = np.lexsort((top, -best), axis=1)
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(top, order, axis=1)


class ImageIndex:
    """Unit vectors of images, with the files that they belong to.

    Args:
        paths: image files; embeds: float32[n, D], a row each; keys: of the content that was embedded, see `image_key`.
        fingerprint: of the model; see `Embedder.fingerprint`.

    Example:
        >>> index = ImageIndex([image_path], np.array([[0.6, 0.8]]), ["5f3a"], fingerprint="model")
        >>> hit = index.search(np.array([0.6, 0.8]), k=1)[0][0]
        >>> hit.path.name, round(hit.score, 3)
        ('red_circle.png', 1.0)
    """

    def __init__(self, paths: Sequence[Path], embeds: np.ndarray, keys: Sequence[str], fingerprint: str):
        if not len(paths) == len(embeds) == len(keys):
            raise CacheError(f"index: got {len(paths)} paths, {len(embeds)} vectors and {len(keys)} keys")
        self.paths, self.keys = list(paths), list(keys)
        self.embeds = np.ascontiguousarray(embeds, dtype=np.float32)
        self.fingerprint = fingerprint
        self._faiss: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def build(
        cls,
        embedder: Embedder,
        paths: Iterable[str | Path],
        *,
        previous: ImageIndex | None = None,
        key_of: Callable[[Path], str] | None = None,
        bad: BadImages | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ImageIndex:
        """Embed images.

        Args:
            previous: an index whose vectors are taken over for images with the same content, whatever their names.
            key_of: image file → key of its content; by default the file is hashed.
            bad: collects the images that cannot be read, which are left out; without it the first one raises.
            progress: called with (images embedded, images to embed).

        Raises:
            DataError: when no image is left.
            CacheError: when `previous` was built with another model.
        """
        fingerprint = embedder.fingerprint()
        if previous is not None:
            previous.check(fingerprint)
        known = {} if previous is None else dict(zip(previous.keys, previous.embeds, strict=True))
        keys = {path: _key(path, key_of) for path in dict.fromkeys(Path(p).absolute() for p in paths)}
        vectors = {path: known[key] for path, key in keys.items() if key in known}
        missing = [path for path in keys if path not in vectors]
        for done, batch in enumerate(batched(missing, embedder.batch_size)):
            read, embeds = embedder.embed_images(batch, bad)
            vectors |= dict(zip(read, embeds, strict=True))
            if progress is not None:
                progress(min(len(missing), (done + 1) * embedder.batch_size), len(missing))
        if not vectors:
            raise DataError("index: got no image that can be read, expected at least one")
        kept = [path for path in keys if path in vectors]
        embeds = np.stack([vectors[path] for path in kept])
        return cls(kept, embeds, [keys[path] for path in kept], fingerprint)

    def search(self, queries: np.ndarray, k: int = 5, *, faiss: bool = False) -> list[list[Hit]]:
        """The `k` nearest images of each query, best first; of equal ones the first in the index.

        Args:
            queries: unit vectors, float[q, D] or float[D].
            faiss: search with faiss (exactly, by inner product), which pays off from about a million images.
        """
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        if k < 1 or queries.shape[1] != self.embeds.shape[1]:
            raise ConfigError(
                f"search: got k={k} and queries of {queries.shape[1]} numbers, expected k >= 1 and "
                f"{self.embeds.shape[1]} numbers"
            )
        k = min(k, len(self))
        scores, places = self._search_faiss(queries, k) if faiss else nearest(queries, self.embeds, k)
        return [
            [Hit(self.paths[place], float(score)) for score, place in zip(*row, strict=True)]
            for row in zip(scores, places, strict=True)
        ]

    def _search_faiss(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._faiss is None:
            try:
                import faiss
            except ImportError as error:
                raise ConfigError("faiss: is not installed; pip install faiss-cpu, or search without it") from error
            self._faiss = faiss.IndexFlatIP(self.embeds.shape[1])
            self._faiss.add(self.embeds)
        return self._faiss.search(queries, k)

    def save(self, folder: str | Path) -> None:
        """Write `index.json` and the file of vectors that it names. An older index stays readable until then."""
        folder, data = Path(folder), save({"embeds": self.embeds})
        name = f"embeds-{content_hash(data)[:12]}.safetensors"
        write_bytes_atomic(folder / name, data)
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "embeds": name,
            "images": [[str(path), key] for path, key in zip(self.paths, self.keys, strict=True)],
        }
        write_text_atomic(folder / INDEX_FILE, json.dumps(content, ensure_ascii=False))
        for old in folder.glob("embeds-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str | None = None) -> ImageIndex:
        """Read a saved index.

        Args:
            fingerprint: of the model that it must have been built with; None accepts any.

        Raises:
            CacheError: for an index that is missing, damaged, or another model's.
        """
        path = Path(folder) / INDEX_FILE
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format: got {content['format']}, expected {FORMAT}")
            rows = [(Path(name), str(key)) for name, key in content["images"]]
            embeds = load_file(Path(folder) / content["embeds"])["embeds"]
            index = cls([name for name, _ in rows], embeds, [key for _, key in rows], content["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CacheError(
                f"{path}: the index cannot be read ({error}); remove the folder to have it built again"
            ) from error
        if fingerprint is not None:
            index.check(fingerprint)
        return index

    def check(self, fingerprint: str) -> None:
        if self.fingerprint != fingerprint:
            raise CacheError(
                f"index: was built with model {self.fingerprint[:12]}, not with this one ({fingerprint[:12]}); build "
                "a new index in another folder"
            )


def index_folder(images: Path, fingerprint: str) -> Path:
    """The folder in the user's cache for the index of a folder of images.

    Example:
        >>> index_folder(images_folder, "0123456789abcdef").name[-12:]
        '0123456789ab'
    """
    name = content_hash(str(images.resolve()))[:12]
    return user_cache() / "indexes" / f"{name}-{fingerprint[:12]}"


def open_index(
    embedder: Embedder,
    images: Sequence[Path],
    folder: Path,
    *,
    bad: BadImages | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageIndex:
    """Load the index in `folder` and bring it up to date with the files `images`, or build and save a new one.

    Example:
        >>> from frozenprefix.models.contrastive.heads import ContrastiveHeads
        >>> model.contrastive = ContrastiveHeads(model.lm.dim, dim=8, loss="infonce")
        >>> len(open_index(Embedder(model, processor), [image_path], tmp_path / "index"))
        1
    """
    previous = ImageIndex.load(folder, embedder.fingerprint()) if (folder / INDEX_FILE).is_file() else None
    keys = ImageKeys(folder)  # remembers them, so that a file is hashed once
    index = ImageIndex.build(embedder, images, previous=previous, key_of=keys.key_of, bad=bad, progress=progress)
    if previous is None or (index.paths, index.keys) != (previous.paths, previous.keys):
        index.save(folder)
        keys.save()
    return index


def _key(path: Path, key_of: Callable[[Path], str] | None) -> str:
    try:
        return image_key(read_image(path)) if key_of is None else key_of(path)
    except BadImageError:
        return ""  # reading it for the encoder says what is wrong
