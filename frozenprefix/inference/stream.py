"""Rolling captions of a file or a camera, with the latency of each frame."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.video import Frame, SceneDetector, open_video, upright

REMEMBERED = 100_000  # frames whose latency is kept, about an hour of a camera


@dataclass(frozen=True)
class RollingCaption:
    """A caption, the second of the stream at which its scene begins, and the seconds it took from the decoded frame.

    Example:
        >>> RollingCaption(time=2.0, caption="a dog", latency=0.25).caption
        'a dog'
    """

    time: float
    caption: str
    latency: float


def live_frames(source: str | Path) -> Iterator[Frame]:
    """Frames of a file, an address such as `rtsp://…`, or a camera (`/dev/video0`), as they come.

    Raises:
        BadImageError: as of `open_video`.
    """
    is_camera = str(source).startswith("/dev/video")
    with open_video(source, **({"format": "v4l2"} if is_camera else {})) as (container, stream):
        start: float | None = None
        for number, frame in enumerate(container.decode(stream)):
            seconds = frame.time if frame.time is not None else number / float(stream.average_rate or 25)
            start = seconds if start is None else start
            yield Frame(seconds - start, upright(frame))


class StreamCaptioner:
    """Captions a stream whenever its scene changes.

    Args:
        captioner: the model.
        scenes: options of `SceneDetector`, which decides where a new scene begins.

    Example:
        >>> image.save(tmp_path / "clip.gif")
        >>> stream = StreamCaptioner(captioner, min_seconds=1.0)
        >>> [caption.time for caption in stream.follow(tmp_path / "clip.gif", max_new_tokens=2)]
        [0.0]
    """

    def __init__(self, captioner: Captioner, **scenes: float):
        self.captioner = captioner
        self.scenes = scenes
        self._latencies: deque[tuple[float, bool]] = deque(maxlen=REMEMBERED)  # seconds, and whether it was captioned

    def follow(
        self,
        source: str | Path,
        *,
        prompt: str | None = None,
        num_beams: int = 1,
        max_new_tokens: int = 30,
        **generate: Any,
    ) -> Iterator[RollingCaption]:
        """Captions as scenes change, until the stream ends; options as of `Captioner.caption`."""
        processor = self.captioner.processor
        text = processor.prompt_for("caption") if prompt is None else processor.with_image(prompt)
        options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, **generate}
        detector = SceneDetector(**self.scenes)
        self._latencies.clear()
        for frame in live_frames(source):
            begun = time.perf_counter()
            caption = None
            if detector.is_new(frame):
                caption = self.captioner.generate([text], [frame.image], **options)[0].text
            seconds = time.perf_counter() - begun
            self._latencies.append((seconds, caption is not None))
            if caption is not None:
                yield RollingCaption(frame.time, caption, seconds)

    def latency(self) -> dict[str, float]:
        """Number of frames followed so far, number of captions, and percentiles of the latency in milliseconds.

        `p50_ms` and `p95_ms` are over all frames, most of which only pass the scene detector; `captioned_p50_ms` and
        `captioned_p95_ms` are over the frames that were captioned.
        """
        captioned = [seconds for seconds, new in self._latencies if new]
        result: dict[str, float] = {"frames": len(self._latencies), "captioned": len(captioned)}
        for name, values in (("", [seconds for seconds, _ in self._latencies]), ("captioned_", captioned)):
            if values:
                p50, p95 = np.percentile(values, [50, 95]) * 1000
                result |= {f"{name}p50_ms": float(p50), f"{name}p95_ms": float(p95)}
        return result
