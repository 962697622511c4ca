"""Videos: frames with their times, captions of whole clips, and captions scene by scene. Needs PyAV."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from frozenprefix.errors import BadImageError, ConfigError
from frozenprefix.inference.captioner import Captioner, Generation, batched

Pooling = Literal["mean", "frames"]
Sampler = Literal["scenes", "uniform"]


@dataclass(frozen=True)
class Frame:
    """An upright RGB image, and its time in seconds from the first frame.

    Example:
        >>> Frame(0.5, image).time
        0.5
    """

    time: float
    image: Image.Image


@dataclass(frozen=True)
class Segment:
    """A part of a video, from second `start` to second `end`, and its caption.

    Example:
        >>> Segment(0.0, 2.5, "a dog runs").caption
        'a dog runs'
    """

    start: float
    end: float
    caption: str


# ── reading ──


@contextmanager
def open_video(source: str | Path, **options: Any) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and first video stream of a file, an address with `://`, or a device; `options` as of `av.open`.

    Raises:
        BadImageError: with reason `missing`, `not_a_video` or, for what FFmpeg cannot decode inside, `truncated`.
    """
    if importlib.util.find_spec("av") is None:
        raise ConfigError("videos are read with PyAV, which is not installed: pip install 'frozenprefix[video]'")
    import av

    if "://" not in str(source) and not Path(source).exists():
        raise BadImageError("missing", f"{source}: no such file or device")
    try:
        container = av.open(str(source), **options)
    except (av.FFmpegError, ValueError) as error:
        raise BadImageError("not_a_video", f"{source}: FFmpeg cannot open it ({error})") from error
    with container:
        if not container.streams.video:
            raise BadImageError("not_a_video", f"{source}: holds no video stream")
        try:
            yield container, container.streams.video[0]
        except av.FFmpegError as error:
            raise BadImageError("truncated", f"{source}: cannot be decoded ({error})") from error


def upright(frame: Any) -> Image.Image:
    """An RGB image of PyAV's frame, turned as the camera noted."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


class Clip:
    """A video file.

    Args:
        path: any file that FFmpeg reads.

    Attributes:
        times: float64[frames], the second at which each frame begins; the first is 0.
        duration: seconds.

    Example:
        >>> image.save(tmp_path / "clip.gif", save_all=True, append_images=[image.rotate(45)], duration=500)
        >>> clip = Clip(tmp_path / "clip.gif")
        >>> len(clip), clip.duration
        (2, 1.0)
    """

    def __init__(self, path: str | Path):
        self.path = path
        with open_video(path) as (container, stream):
            # packets are not decoded: this reads the file, but costs little else
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            # AVI notes the order of decoding only
            stamps = {stamp: p for p in packets if (stamp := p.dts if p.pts is None else p.pts) is not None}
            if not stamps:
                reason = "no frames" if not packets else "frames without times; put it into a container such as MP4"
                raise BadImageError("not_a_video", f"{path}: holds {reason}")
            self._stamps = np.array(sorted(stamps))
            self._keys = np.array(sorted(stamp for stamp, packet in stamps.items() if packet.is_keyframe))
            self.times = (self._stamps - self._stamps[0]) * float(stream.time_base)
            rate = stream.average_rate
        last = float(np.median(np.diff(self.times))) if len(self.times) > 1 else float(1 / rate) if rate else 0.0
        self.duration = float(self.times[-1]) + last

    def __len__(self) -> int:
        return len(self.times)

    def frames(self) -> Iterator[Frame]:
        """All frames in order."""
        with open_video(self.path) as (container, stream):
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield self._frame(frame)

    def at(self, indices: Sequence[int]) -> list[Frame]:
        """The frames with these numbers, which must ascend and may repeat. Seeks to key frames, to decode less."""
        chosen: list[Frame] = []
        with open_video(self.path) as (container, stream):
            frames, position = container.decode(stream), self._stamps[0] - 1
            for wanted in self._stamps[list(indices)]:
                if wanted == position:
                    chosen.append(chosen[-1])
                    continue
                keys = self._keys[self._keys <= wanted]
                if len(keys) and keys[-1] > position + 1:
                    container.seek(int(keys[-1]), stream=stream)
                    frames = container.decode(stream)
                frame = next((frame for frame in frames if _stamp(frame) >= wanted), None)
                if frame is None:
                    raise BadImageError("truncated", f"{self.path}: ends before its frame at {wanted}")
                position = wanted
                chosen.append(self._frame(frame))
        return chosen

    def index_at(self, time: float) -> int:
        """Number of the frame on the screen at a time, in seconds."""
        return max(0, int(np.searchsorted(self.times, time, side="right")) - 1)

    def _frame(self, frame: Any) -> Frame:
        return Frame(float((_stamp(frame) - self._stamps[0]) * frame.time_base), upright(frame))


def _stamp(frame: Any) -> int:
    return frame.dts if frame.pts is None else frame.pts


# ── choosing frames ──


def uniform_spans(clip: Clip, count: int) -> list[tuple[float, float]]:
    """`count` parts of equal length (start, end), in seconds."""
    return list(pairwise(np.linspace(0.0, clip.duration, count + 1).tolist()))


def scene_spans(clip: Clip, **options: float) -> list[tuple[float, float]]:
    """Parts between changes of the scene (start, end), in seconds; options as of `SceneDetector`."""
    detector = SceneDetector(**options)
    starts = [frame.time for frame in clip.frames() if detector.is_new(frame)]
    return list(pairwise([*starts, clip.duration]))


def colour_histogram(image: Image.Image) -> np.ndarray:
    """float32[4, 64]: shares of 64 colours in each quarter of an image."""
    pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX)) >> 6
    colours = pixels[..., 0] * 16 + pixels[..., 1] * 4 + pixels[..., 2]
    quarters = colours.reshape(2, 16, 2, 16).swapaxes(1, 2).reshape(4, 256)
    return np.stack([np.bincount(quarter, minlength=64) for quarter in quarters]).astype(np.float32) / 256


class SceneDetector:
    """Tells which frames begin a new scene, by the colour histograms of the image's quarters.

    Args:
        cut: difference from the previous frame, 0 to 1, at which a scene begins. Two unrelated photos differ by 0.4 to
            0.9, frames of the same take rarely by more than 0.15.
        drift: difference from the first frame of the scene at which a new one begins, for fades and pans.
        min_seconds: shortest scene; an earlier cut counts once that time is over.

    Example:
        >>> detector = SceneDetector()
        >>> [detector.is_new(Frame(time, image)) for time in (0.0, 1.0)]
        [True, False]
    """

    def __init__(self, *, cut: float = 0.25, drift: float = 0.5, min_seconds: float = 0.5):
        self.cut, self.drift, self.min_seconds = cut, drift, min_seconds
        self._since = 0.0
        self._first: np.ndarray | None = None
        self._last: np.ndarray | None = None
        self._was_cut = False

    def is_new(self, frame: Frame) -> bool:
        """Look at the next frame; the first one is always new."""
        histogram = colour_histogram(frame.image)
        first, last, self._last = self._first, self._last, histogram
        if first is not None and last is not None:
            self._was_cut = self._was_cut or difference(histogram, last) >= self.cut
            if frame.time - self._since < self.min_seconds:
                return False
            if not self._was_cut and difference(histogram, first) < self.drift:
                return False
        self._since, self._first, self._was_cut = frame.time, histogram, False
        return True


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of two histograms, 0 to 1."""
    return float(np.abs(one - other).sum()) / 2 / len(one)


# ── captions ──


class VideoCaptioner:
    """Captions of clips from a model trained on images.

    Args:
        captioner: the model.
        frames: frames per clip, spread evenly over it.
        pooling: "mean" gives one prefix, from the mean of the frames' image features; "frames" gives one prefix per
            frame, in order, which a model trained on single images has not learned to read.

    Example:
        >>> image.save(tmp_path / "clip.gif")
        >>> video = VideoCaptioner(captioner, frames=4)
        >>> video.features(tmp_path / "clip.gif").shape[0]
        1
    """

    def __init__(self, captioner: Captioner, *, frames: int = 8, pooling: Pooling = "mean"):
        if frames < 1 or pooling not in ("mean", "frames"):
            raise ConfigError(f"got frames={frames}, pooling={pooling!r}; expected at least 1, and 'mean' or 'frames'")
        self.captioner, self.frames, self.pooling = captioner, frames, pooling

    def caption(
        self,
        path: str | Path,
        *,
        prompt: str | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 30,
        **generate: Any,
    ) -> Generation:
        """One caption of a whole clip; options as of `Captioner.caption`.

        Raises:
            BadImageError: for a file that is not a video.
        """
        features = self.features(path)
        processor = self.captioner.processor
        text = (
            processor.prompt_for("caption", images=len(features))
            if prompt is None
            else processor.with_image(prompt, len(features))
        )
        options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, **generate}
        return self.captioner.generate([text], images=features, **options)[0]

    def summary(
        self,
        path: str | Path,
        *,
        sampler: Sampler = "scenes",
        prompt: str | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 30,
        **generate: Any,
    ) -> list[Segment]:
        """Captions of a clip's scenes, or of `frames` parts of equal length, each by its middle frame.

        Neighbours with equal captions are one segment.
        """
        if sampler not in ("scenes", "uniform"):
            raise ConfigError(f"sampler: got {sampler!r}, expected 'scenes' or 'uniform'")
        clip = Clip(path)
        spans = scene_spans(clip) if sampler == "scenes" else uniform_spans(clip, self.frames)
        processor = self.captioner.processor
        text = processor.prompt_for("caption") if prompt is None else processor.with_image(prompt)
        options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, **generate}
        segments = []
        for batch in batched(spans, self.captioner.batch_size):
            images = [frame.image for frame in clip.at([clip.index_at((start + end) / 2) for start, end in batch])]
            texts = self.captioner.generate([text] * len(images), images, **options)
            segments += [Segment(*span, generation.text) for span, generation in zip(batch, texts, strict=True)]
        return merge(segments)

    def features(self, path: str | Path) -> Tensor:
        """Image features of a clip, the mapper's input: float32[1 or frames, N, D_enc], on the CPU.

        A clip with fewer frames gives the features of all of them.
        """
        clip = Clip(path)
        middles = [clip.index_at((start + end) / 2) for start, end in uniform_spans(clip, self.frames)]
        images = [frame.image for frame in clip.at(sorted(set(middles)))]
        batches = self.captioner.encoder.batches(images, self.captioner.batch_size)
        features = torch.cat([encoded.cpu() for _, encoded in batches])
        return features.mean(dim=0, keepdim=True) if self.pooling == "mean" else features


def merge(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbours with equal captions.

    Example:
        >>> merge([Segment(0, 1, "a dog"), Segment(1, 2, "a dog"), Segment(2, 3, "a cat")])
        [Segment(start=0, end=2, caption='a dog'), Segment(start=2, end=3, caption='a cat')]
    """
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].caption == segment.caption:
            merged[-1] = Segment(merged[-1].start, segment.end, segment.caption)
        else:
            merged.append(segment)
    return merged
